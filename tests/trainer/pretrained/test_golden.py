"""Logits of tiny models of transformers, made by `make_golden.py`, beside ours of the same weights."""

from dataclasses import replace
from pathlib import Path

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from slow import mostly

from dynmask_jax import Causal, SameSegment, Tokens, Window, plan
from train.config.model import Model, RopeScaling
from train.model.cache import slot_tokens, slots_of
from train.model.transformer import Transformer
from train.pretrained.config import model_of
from train.pretrained.folder import PretrainedFolder
from train.pretrained.read import open_tensors

GOLDEN = Path(__file__).parent / "golden"
NTK = 2.0 * 48 / 16 - 1.0  # transformers' factor for 48 tokens of a model of 16, by its formula


def golden_model(name: str) -> Model:
    """The options of a golden model."""
    config = PretrainedFolder(GOLDEN / name).config()
    if name == "llama-ntk":  # transformers has only the dynamic form, whose factor follows the length
        config["rope_parameters"] = {"rope_theta": 10_000.0}
        return replace(model_of(config), rope_scaling=RopeScaling("ntk", NTK))
    return model_of(config)


def golden(name: str) -> tuple[Model, nnx.GraphDef, dict, dict[str, np.ndarray]]:
    """The options, the model in two parts, and transformers' logits with their tokens."""
    model = golden_model(name)
    whole = nnx.eval_shape(lambda: Transformer(model, model.vocabulary(0), rngs=nnx.Rngs(0)))
    graph, state = nnx.split(whole)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), nnx.to_pure_dict(state)
    )
    with open_tensors(PretrainedFolder(GOLDEN / name), model) as tensors:
        tensors.check(like)
        params = jax.tree.map_with_path(tensors.array, like)
    return model, graph, params, load_file(GOLDEN / name / "logits.safetensors")


def plans(model: Model, q: Tokens, k: Tokens | None = None):
    seen = Causal() & SameSegment()
    masks = {"global": seen, "local": seen & Window(model.local_window)}
    return {
        reach: plan(mask, q, k, block_q=16, block_k=16)
        for reach, mask in masks.items()
        if reach in model.pattern
    }


@pytest.mark.parametrize("name", sorted(folder.name for folder in GOLDEN.iterdir()))
def test_logits_are_those_of_transformers(name):
    model, graph, params, expected = golden(name)

    @jax.jit
    def logits(params, tokens):
        whole = nnx.merge(graph, params)
        return whole.unembed(whole(tokens, plans(model, Tokens.sequence(tokens.shape[1]))))

    actual = logits(params, jnp.asarray(expected["tokens"]))
    np.testing.assert_allclose(actual, expected["logits"], atol=1e-4)


@pytest.mark.parametrize("name", mostly(["gemma2", "gemma3_text", "qwen2", "qwen3"], ["gemma3_text"]))
def test_logits_with_a_cache_are_the_same(name):
    model, graph, params, expected = golden(name)
    tokens, prompt = jnp.asarray(expected["tokens"]), 40
    slots = slots_of(model, tokens.shape[1])
    assert "local" not in model.pattern or slots["local"] < prompt
    starts, lengths = jnp.zeros(len(tokens), jnp.int32), jnp.full(len(tokens), prompt, jnp.int32)

    @jax.jit
    def begin(params, prompts):
        whole, cache = (
            nnx.merge(graph, params),
            nnx.merge(graph, params).begin_cache(len(tokens), tokens.shape[1]),
        )
        hidden, cache = whole.prefill(prompts, plans(model, Tokens.sequence(prompt)), cache, lengths)
        return whole.unembed(hidden), cache

    @jax.jit
    def step(params, token, cache, slot):
        whole, query = nnx.merge(graph, params), Tokens(jnp.full((len(tokens), 1), slot))
        seen = {
            reach: plans(model, query, slot_tokens(reach, count, starts, lengths, prompt, slot + 1 - prompt))[
                reach
            ]
            for reach, count in slots.items()
            if reach in model.pattern
        }
        hidden, cache = whole.decode(token, seen, cache, slot)
        return whole.unembed(hidden), cache

    logits, cache = begin(params, tokens[:, :prompt])
    pieces = [logits]
    for place in range(prompt, tokens.shape[1]):
        logits, cache = step(params, tokens[:, place : place + 1], cache, jnp.int32(place))
        pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), expected["logits"], atol=1e-4)


@pytest.mark.parametrize("name", sorted(folder.name for folder in GOLDEN.iterdir()))
def test_transformers_still_gives_these_logits(name):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    expected = load_file(GOLDEN / name / "logits.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        GOLDEN / name, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        logits = model(torch.from_numpy(expected["tokens"]).long()).logits
    np.testing.assert_allclose(logits.numpy(), expected["logits"], atol=1e-4)
