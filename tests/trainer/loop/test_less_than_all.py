"""Runs that train less than all weights: by LoRA, or with groups of them frozen."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from pretrained_cases import losses_by_hand, tiny_pretrained
from safetensors import safe_open
from train_cases import small_run, write_text

from train.checkpoint.folder import RunFolder
from train.checkpoint.load import load_model
from train.checkpoint.restore import FROZEN
from train.cli import main, parse
from train.loop.prepare import prepare
from train.loop.training import train
from train.model.lora import merge_lora, split_lora
from train.step.trainable import WeightCounts, join_weights

WORDS = (
    "--steps 4 --block 8 --data.length 32 --data.batch 4 --evaluation.rows 2 --checkpoints.every 2 "
    "--optimizer.accumulate 2 --optimizer.ema 0.5 --lora.rank 2 --optimizer.learning-rate 0.05"
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
