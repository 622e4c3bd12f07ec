"""Checkpoints come back whole, or are refused with their path."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import chex
import jax
import pytest
from train_cases import small_run

from train.checkpoint import Checkpoints
from train.step import begin


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


RESTORE = """
import sys
from pathlib import Path
from train_cases import small_run
from train.checkpoint import Checkpoints
from train.step import begin
_, like = begin(small_run(Path(sys.argv[1])))
for folder in sys.argv[2:]:
    with Checkpoints(Path(folder), keep=1) as checkpoints:
        try:
            checkpoints.restore(like)
        except ValueError as error:
            print(error)
"""


def cut_short(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def overwritten(file):
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    file.write_bytes(content)


def test_a_damaged_or_foreign_checkpoint_is_refused_with_its_path(tmp_path, state):
    folders = {name: tmp_path / name for name in ("cut_short", "overwritten", "removed", "foreign", "whole")}
    run = small_run(tmp_path)
    _, wider = begin(replace(run, model=replace(run.model, width=32)))
    for name, folder in folders.items():
        with Checkpoints(folder, keep=1) as checkpoints:
            checkpoints.save(wider if name == "foreign" else state)
    for name, damage in (("cut_short", cut_short), ("overwritten", overwritten), ("removed", Path.unlink)):
        files = [path for path in (folders[name] / "3" / "state").rglob("*") if path.is_file()]
        damage(max(files, key=lambda path: path.stat().st_size))
    # In a process of its own: orbax leaves the reads it gave up to the garbage collector, which warns.
    command = [sys.executable, "-c", RESTORE, str(tmp_path), *map(str, folders.values())]
    paths = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    said = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True, check=True).stdout
    for name, line in zip(["cut_short", "overwritten", "removed", "foreign"], said.splitlines(), strict=True):
        step = 0 if name == "foreign" else 3
        assert line.startswith(
            f"the checkpoint {folders[name] / str(step)} is corrupted or belongs to another model"
        )
        assert line.endswith("delete it to go on from an older one, or start anew")
