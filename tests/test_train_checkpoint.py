"""Checkpoints come back whole, or are refused with their path."""

import gc
from dataclasses import replace

import chex
import jax
import pytest
from train_cases import small_run

from train.checkpoint import Checkpoints
from train.step import begin

# What orbax was about to read when it met a damaged file it leaves behind, unawaited.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _collect_what_orbax_left():
    yield
    gc.collect()


@pytest.fixture
def state(tmp_path):
    _, state = begin(small_run(tmp_path))
    return jax.tree.map(lambda leaf: leaf + 3, state)


def test_a_state_comes_back_bit_for_bit(tmp_path, state):
    with Checkpoints(tmp_path / "checkpoint", keep=1) as checkpoints:
        checkpoints.save(state)
    _, fresh = begin(small_run(tmp_path, seed=1))
    with Checkpoints(tmp_path / "checkpoint", keep=1) as checkpoints:
        chex.assert_trees_all_equal(checkpoints.restore(fresh), state)


def test_the_latest_are_kept(tmp_path, state):
    with Checkpoints(tmp_path / "checkpoint", keep=2) as checkpoints:
        for _ in range(3):
            state = jax.tree.map(lambda leaf: leaf + 1, state)
            checkpoints.save(state)
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == ["5", "6"]


def test_none_at_all_is_said(tmp_path, state):
    with (
        Checkpoints(tmp_path / "checkpoint", keep=1) as checkpoints,
        pytest.raises(FileNotFoundError, match=r"checkpoint holds no checkpoint to resume from"),
    ):
        checkpoints.restore(state)


@pytest.mark.parametrize("damage", ["cut short", "overwritten", "removed"])
def test_a_damaged_file_is_refused_with_its_path(tmp_path, state, damage):
    with Checkpoints(tmp_path / "checkpoint", keep=1) as checkpoints:
        checkpoints.save(state)
    files = [path for path in (tmp_path / "checkpoint" / "3" / "state").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    if damage == "removed":
        largest.unlink()
    elif damage == "cut short":
        largest.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        content[middle : middle + 64] = bytes(64)
        largest.write_bytes(content)
    with (
        Checkpoints(tmp_path / "checkpoint", keep=1) as checkpoints,
        pytest.raises(ValueError, match=r"the checkpoint .*checkpoint/3 is corrupted or belongs to another"),
    ):
        checkpoints.restore(state)


def test_a_state_of_another_model_is_refused(tmp_path, state):
    with Checkpoints(tmp_path / "checkpoint", keep=1) as checkpoints:
        checkpoints.save(state)
    run = small_run(tmp_path)
    _, wider = begin(replace(run, model=replace(run.model, width=32)))
    with (
        Checkpoints(tmp_path / "checkpoint", keep=1) as checkpoints,
        pytest.raises(ValueError, match=r"corrupted or belongs to another model"),
    ):
        checkpoints.restore(wider)
