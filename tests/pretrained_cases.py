"""A Hugging Face folder small enough for a test: a tokenizer with a begin token, and random weights."""

import json
from dataclasses import replace
from pathlib import Path

import flax.nnx as nnx
import jax
import numpy as np
import optax
from train_cases import MODEL, small_run, write_text

from dynmask_jax import Causal, Tokens, Window, plan
from train.checkpoint.export import Weights
from train.config.model import Model
from train.data.bpe import train_bpe
from train.pretrained.export_config import config_of
from train.pretrained.write import Contents, write_folder
from train.step.program import program_of, state_like

BEGIN, END, OTHER_END = "<s>", "<|endoftext|>", 5
CHAT = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
CHAT += "{% if add_generation_prompt %}assistant:{% endif %}"


def tiny_pretrained(folder: Path, **options) -> Path:
    """The folder, a `gemma3_text` in bfloat16 with the vocabulary of a tokenizer of `train_bpe`."""
    from tokenizers import Tokenizer, processors

    train_bpe([str(write_text(folder))], 270, {}, folder / "bpe.json")
    library = Tokenizer.from_file(str(folder / "bpe.json"))
    library.add_special_tokens([BEGIN])
    begin = library.token_to_id(BEGIN)
    library.post_processor = processors.TemplateProcessing(f"{BEGIN} $A", special_tokens=[(BEGIN, begin)])
    model = replace(gemma(begin + 1), **options)
    program = program_of(small_run(folder, model=model), begin + 1)
    shapes = state_like(program, begin + 1).params
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: draw.normal(0, 0.3, leaf.shape).astype("bfloat16"), shapes)
    special = {"__type": "AddedToken", "content": BEGIN, "special": True}  # one form of two, which both occur
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "bos_token": special}
    files = {
        "tokenizer.json": library.to_str(),
        "tokenizer_config.json": json.dumps(about),
        "generation_config.json": f'{{"eos_token_id": [0, {OTHER_END}]}}',
        "chat_template.jinja": CHAT,
    }
    config = config_of(model, "bfloat16") | {"eos_token_id": 0, "bos_token_id": begin}
    write_folder(Contents(model, params, config, "bfloat16", files), folder / "hub")
    return folder / "hub"


def logits_by_hand(weights: Weights, tokens: np.ndarray) -> np.ndarray:
    """The logits after each token of a row, by the forward pass of the whole row."""
    model = nnx.merge(program_of(weights.run, weights.vocabulary).graph, weights.params)
    masks = {"local": Causal() & Window(weights.run.model.local_window), "global": Causal()}
    plans = {reach: plan(mask, Tokens.sequence(len(tokens))) for reach, mask in masks.items()}
    return np.asarray(model.unembed(model(tokens[None], plans))[0])


def greedy_by_hand(weights: Weights, tokens: list[int], count: int) -> list[int]:
    """The most likely tokens after those of a row, one after another, each by a whole forward pass."""
    row = np.zeros(len(tokens) + count, np.int32)  # under the causal mask what comes later changes nothing
    row[: len(tokens)] = tokens
    for at in range(len(tokens), len(row)):
        row[at] = logits_by_hand(weights, row)[at - 1].argmax()
    return row[len(tokens) :].tolist()


def losses_by_hand(weights: Weights, tokens: np.ndarray) -> np.ndarray:
    """The loss of each token of a row but the first."""
    logits = logits_by_hand(weights, tokens[:-1])
    return np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1:]))


def gemma(vocabulary: int) -> Model:
    """The options of a small Gemma 3 with a local and a global layer."""
    return replace(
        MODEL,
        layers=2,
        head_dim=8,
        vocab_size=vocabulary,
        max_position_embeddings=32,
        activation="gelu_tanh",
        tied_embeddings=True,
        embedding_scale=4.0,
        qk_norm=True,
        post_norms=True,
        norm_unit_offset=True,
        query_scale=0.5,
        pattern=("local", "global"),
        local_window=8,
        rope_local_theta=100.0,
    )
