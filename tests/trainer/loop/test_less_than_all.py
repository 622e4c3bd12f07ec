"""Runs that train less than all weights: by LoRA, or with groups of them frozen."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import chex
import flax.nnx as nnx
import jax
import numpy as np
import optax
import pytest
from pretrained_cases import tiny_pretrained
from safetensors import safe_open
from train_cases import small_run, write_text

from dynmask_jax import Tokens
from train.checkpoint.export import Weights
from train.checkpoint.folder import RunFolder
from train.checkpoint.load import load_model
from train.checkpoint.restore import FROZEN
from train.cli import main, parse
from train.config.operation import Mesh
from train.config.sections import Lora
from train.loop.prepare import prepare
from train.loop.training import train
from train.model.lora import merge_lora, split_lora
from train.step.program import program_of

WORDS = (
    "--steps 4 --block 8 --data.length 32 --data.batch 4 --evaluation.rows 2 --checkpoints.every 2 "
    "--optimizer.accumulate 2 --optimizer.ema 0.5 --lora.rank 2 --optimizer.learning-rate 0.05 "
    "--optimizer.frozen embedding layers norms"  # all but LoRA, which trains in any case
)
RANK = 2


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("less")
    # Two groups of (local, global) and a rest, in one loop; bfloat16 in its file.
    tiny_pretrained(folder, layers=5, remat="full")
    return folder


def words(place: Path, name: str, *more: str) -> list[str]:
    paths = ["--name", name, "--folder", str(place / "runs"), "--data.paths", str(write_text(place))]
    return ["demo", "--init-from", str(place / "hub"), *WORDS.split(), *paths, *more]


def losses(weights: Weights, tokens: np.ndarray) -> np.ndarray:
    """The loss of each token of a row but the first, from the logits."""
    program = program_of(weights.run, weights.vocabulary)
    plans = program.masks.plans(program.masks.full, Tokens.sequence(len(tokens) - 1))

    @jax.jit
    def logits(params):
        model = nnx.merge(program.graph, params)
        return model.unembed(model(tokens[None, :-1], plans))[0]

    return np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits(weights.params), tokens[1:]))


@pytest.fixture(scope="module")
def tuned(place):
    """A run by LoRA that has ended: its session, the first weights, and the state after the last step."""
    session = prepare(parse(words(place, "tuned", "--model.remat", "full")).run)
    first = jax.tree.map(np.asarray, session.program.weights(session.state))
    counts = session.counts
    train(session)
    return session, first, counts, prepare(session.run).state


def test_the_optimizer_knows_only_what_trains(tuned):
    session, first, counts, state = tuned
    model = session.run.model
    sizes = [(model.width, size) for size in (16, 8, 8)] + [(16, model.width)]
    sizes += [(model.width, model.hidden)] * 2 + [(model.hidden, model.width)]
    trained = model.layers * sum(RANK * (inputs + outputs) for inputs, outputs in sizes)
    assert counts.trained == trained < counts.weights / 2
    assert counts.weights == sum(leaf.size for leaf in jax.tree.leaves(first))
    assert counts.optimizer_bytes == pytest.approx(2 * 4 * trained, abs=64)  # moments, and a few counts
    moments = {leaf.shape for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim}
    assert moments == {leaf.shape for leaf in jax.tree.leaves(state.params)}
    chex.assert_trees_all_equal_shapes(state.ema, state.params)
    assert str(counts).startswith(f"{trained:,} of {counts.weights:,} weights (")


def test_frozen_weights_stay_bit_for_bit_and_the_others_move(tuned):
    session, first, _, state = tuned
    base, factors = split_lora(first)
    hub = load_model(Path(session.run.init_from))[0].params
    chex.assert_trees_all_equal(base, hub)
    chex.assert_trees_all_equal(base, state.frozen)
    after = dict(jax.tree_util.tree_leaves_with_path(state.params))
    for path, before in jax.tree_util.tree_leaves_with_path(factors):
        assert (before.any()) == ("lora_a" in str(path)), "A is random, B zero"
        assert (after[path] != before).any(), path


def test_what_is_served_is_merged_and_is_the_model_that_was_trained(tuned, tmp_path):
    session, _, _, state = tuned
    run, folder = session.run, RunFolder.of(session.run).path
    merged, tokenizer = load_model(folder)
    unmerged = replace(merged, run=run, params=session.program.weights(state))
    tokens = np.asarray(tokenizer.encode([write_text(tmp_path).read_text()])[0][:24])
    expected = losses(unmerged, tokens)
    np.testing.assert_allclose(losses(merged, tokens), expected, rtol=0, atol=1e-5)
    # Without what was learnt it is another model.
    base = replace(merged, params=split_lora(unmerged.params)[0])
    assert np.abs(losses(base, tokens) - expected).max() > 1e-2
    chex.assert_trees_all_equal(merged.params, merge_lora(unmerged.params, run.lora))

    main(["export", str(folder), "--to", str(tmp_path / "w.safetensors")])
    chex.assert_trees_all_equal(load_model(tmp_path / "w.safetensors")[0].params, merged.params)
    to = ["--to", str(tmp_path / "served"), "--format", "huggingface", "--dtype", "float32"]
    main(["export", str(folder), *to])
    served = load_model(tmp_path / "served")[0]
    chex.assert_trees_all_equal(served.params, merged.params)
    with safe_open(tmp_path / "served" / "model.safetensors", "numpy") as file:
        assert not [name for name in file.keys() if "lora" in name]  # noqa: SIM118


def test_a_merged_model_generates_is_evaluated_and_is_tuned_again(tuned, place, tmp_path, capsys):
    session, *_ = tuned
    folder = RunFolder.of(session.run).path
    main(["generate", str(folder), "--prompt", "mask key", "--tokens", "2"])
    assert capsys.readouterr().out.startswith("> mask key\n")
    (tmp_path / "a.txt").write_text("mask key query", encoding="utf-8")
    main(["evaluate", str(folder), str(tmp_path / "a.txt"), "--json", str(tmp_path / "found.json")])
    weights, tokenizer = load_model(folder)
    nats = losses(weights, tokenizer.begun(tokenizer.encode(["mask key query"])[0]))
    found = json.loads((tmp_path / "found.json").read_text())
    np.testing.assert_allclose(found["nats_per_token"], nats.mean(), rtol=1e-5)
    again = ["demo", "--init-from", str(folder), *words(place, "again")[3:], "--model.remat", "full"]
    second = prepare(parse(again).run)
    base, factors = split_lora(second.program.weights(second.state))
    chex.assert_trees_all_equal(base, weights.params)
    assert jax.tree.leaves(factors)


def test_checkpoints_hold_what_trains_and_the_frozen_weights_once(tuned):
    session, *_, state = tuned
    checkpoints = RunFolder.of(session.run).checkpoints
    assert sorted(path.name for path in checkpoints.iterdir()) == ["2", "4", FROZEN]
    about = json.loads((checkpoints / "4" / "about" / "metadata").read_text())
    names = [name for name in about["leaves"] if name.startswith(("params", "ema", "frozen"))]
    assert len(names) == 2 * len(jax.tree.leaves(state.params))
    assert len(about[FROZEN]) == len(jax.tree.leaves(state.frozen))
    assert all(".lora." in name for name in names)


def test_a_resumed_run_is_the_uninterrupted_one_and_needs_no_folder(tuned, place):
    session, *_, state = tuned
    hub, checkpoints = place / "hub", RunFolder.of(session.run).checkpoints
    hub.rename(place / "gone")
    shutil.rmtree(checkpoints / "4")
    try:
        again = prepare(session.run)
        assert int(again.state.step) == 2
        assert again.counts == session.counts
        train(again)
        chex.assert_trees_all_equal(prepare(session.run).state, state)
    finally:
        (place / "gone").rename(hub)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["2", "4", FROZEN]


def test_the_state_comes_back_in_shards_on_a_mesh(tuned):
    session, *_, state = tuned
    sharded = prepare(replace(session.run, mesh=Mesh(fsdp=2, context=2))).state
    chex.assert_trees_all_equal(sharded, state)
    parts = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf.size / leaf.addressable_data(0).size
        for path, leaf in jax.tree_util.tree_leaves_with_path(sharded)
    }
    inner = {"query.lora_a", "down.lora_b", "query.kernel", "embed.embedding"}
    found = {name: count for name, count in parts.items() if ".".join(name.split(".")[-2:]) in inner}
    assert len(found) == 2 * 3 * (2 + 2) + 3 + 1  # weight, mean, two moments, in three stacks; frozen ones
    assert set(found.values()) == {4.0}


def test_lora_of_random_weights_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"lora\.rank 2 adds to weights that exist: name them with --init-from"
    ):
        prepare(small_run(tmp_path, lora=Lora(rank=2)))
