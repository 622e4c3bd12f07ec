"""Checkpoints come back bit for bit; damaged ones are seen, kept and passed over; others are refused."""

import json
import os
import re
import shutil
from dataclasses import field, replace
from pathlib import Path
from typing import Any

import chex
import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from train_cases import small_run

from dynmask_jax.array_typing import pytree
from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.restore import FROZEN, restore_newest
from train.config.operation import Checkpoints as Options
from train.disk import WriteError

# orbax leaves the files of a read that it gave up to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytree
class Toy:
    """A state of every kind of leaf that a real one has, and a step."""

    step: Any
    params: Any
    key: Any
    frozen: Any = field(default_factory=dict)


def toy(step: int = 0, width: int = 2_000) -> Toy:
    numbers = jax.random.normal(jax.random.key(step), (width,))
    params = {"w": numbers, "half": numbers[:5].astype(jnp.bfloat16), "flag": numbers[:3] > 0}
    return Toy(jnp.int32(step), params, jax.random.key_data(jax.random.key(step + 9)))


def rows() -> grain.DatasetIterator:
    return iter(grain.MapDataset.range(50).seed(3).shuffle().repeat().batch(4).to_iter_dataset())


def opened(tmp_path, data="texts", **options) -> Checkpoints:
    run = replace(small_run(tmp_path), checkpoints=Options(**options))
    return Checkpoints(tmp_path / "checkpoint", run, data)


def saved(tmp_path, *steps, **options):
    """A folder with checkpoints of the steps, each at a position of its own; and those positions."""
    batches, positions = rows(), {}
    with opened(tmp_path, **options) as checkpoints:
        for step in steps:
            next(batches)
            checkpoints.save(toy(step), batches)
            positions[step] = batches.get_state()
    return positions


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Every file's bytes, and None for every folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_a_state_and_the_position_come_back_bit_for_bit(tmp_path):
    positions = saved(tmp_path, 3)
    batches, expected = rows(), rows()
    next(expected)
    with opened(tmp_path) as checkpoints:
        restored = checkpoints.resume(toy(0), batches)
    chex.assert_trees_all_equal(restored, toy(3), strict=True)
    assert batches.get_state() == positions[3]
    for _ in range(20):  # past the end of the epoch
        np.testing.assert_array_equal(next(batches), next(expected))


def test_the_position_is_that_of_the_call_though_the_data_goes_on_at_once(tmp_path):
    batches = rows()
    with opened(tmp_path) as checkpoints:
        for step in range(1, 4):
            before = batches.get_state()
            checkpoints.save(toy(step), batches)
            next(batches)
    again = rows()
    with opened(tmp_path) as checkpoints:
        checkpoints.resume(toy(0), again)
    assert again.get_state() == before


def test_nothing_saved_is_none(tmp_path):
    with opened(tmp_path) as checkpoints:
        assert checkpoints.resume(toy(0), rows()) is None


def test_the_latest_are_kept_and_those_at_multiples(tmp_path):
    saved(tmp_path, 2, 4, 5, 6, 8, 9, 10, keep=2, keep_every=4)
    assert names(tmp_path / "checkpoint") == ["10", "4", "8", "9"]


def test_a_step_that_is_saved_is_not_saved_again(tmp_path):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(toy(1), rows())
        checkpoints.save(replace(toy(1), params=toy(2).params), rows())
    with opened(tmp_path) as checkpoints:
        chex.assert_trees_all_equal(checkpoints.resume(toy(0), rows()), toy(1))


def test_the_next_steps_may_write_over_the_state_at_once(tmp_path):
    """The writer's hold on the numbers keeps donated ones as they were, so none are copied here."""
    onward = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    like = Toy(jnp.int32(0), jnp.zeros(300_000), jnp.zeros(3))
    with opened(tmp_path, keep=9) as checkpoints:
        state = like
        for step in range(1, 5):
            state = onward(state)
            checkpoints.save(state, rows())
            ahead = state
            for _ in range(3):
                ahead = onward(ahead)
            state = Toy(jnp.int32(step), jnp.full(300_000, step, jnp.float32), jnp.full(3, step, jnp.float32))
    for step in range(4, 0, -1):
        with opened(tmp_path, keep=9) as checkpoints:
            restored = checkpoints.resume(Toy(*map(jnp.zeros_like, jax.tree.leaves(state))), rows())
        assert restored is not None
        assert {float(x) for leaf in jax.tree.leaves(restored) for x in jnp.unique(leaf)} == {step}
        shutil.rmtree(tmp_path / "checkpoint" / str(step))


def flipped(file: Path):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_short(file: Path):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda path: path.stat().st_size)


DAMAGES = {
    "a bit of the numbers": lambda step: flipped(largest(step / "state")),
    "half of the numbers": lambda step: cut_short(largest(step / "state")),
    "no numbers": lambda step: largest(step / "state").unlink(),
    "no state": lambda step: shutil.rmtree(step / "state"),
    "a bit of what it is about": lambda step: flipped(step / "about" / "metadata"),
    "nothing it is about": lambda step: cut_short(step / "about" / "metadata"),
    "nothing": lambda step: [shutil.rmtree(step), step.mkdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_set_aside_by_name_and_the_next_older_is_taken(tmp_path, damage):
    positions = saved(tmp_path, 1, 2)
    DAMAGES[damage](tmp_path / "checkpoint" / "2")
    batches = rows()
    words = (
        r"the checkpoint .*/checkpoint/2 is damaged \(.+\) and was moved to .*/checkpoint-damaged/2; an older"
    )
    with opened(tmp_path) as checkpoints:
        with pytest.warns(UserWarning, match=words):
            restored = checkpoints.resume(toy(0), batches)
        chex.assert_trees_all_equal(restored, toy(1))
        assert batches.get_state() == positions[1]
        checkpoints.save(toy(2), batches)  # and the run comes by here once more
    assert names(tmp_path / "checkpoint") == ["1", "2"]
    assert names(tmp_path / "checkpoint-damaged") == ["2"]


def partly_frozen(step: int) -> Toy:
    """A state whose frozen weights are the same at every step."""
    return replace(toy(step), frozen={"deep": {0: toy(7).params}})


def test_frozen_weights_are_written_once_and_come_back_with_every_checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    with opened(tmp_path, keep=1) as checkpoints:
        for step in (1, 2):
            checkpoints.save(partly_frozen(step), rows())
        checkpoints.wait()
        written = contents(folder / FROZEN)
    with opened(tmp_path, keep=1) as checkpoints:
        assert checkpoints.steps() == [2]
        like = jax.tree.map(jnp.zeros_like, partly_frozen(0))
        chex.assert_trees_all_equal(checkpoints.resume(like, rows()), partly_frozen(2), strict=True)
        checkpoints.save(partly_frozen(3), rows())
    assert names(folder) == ["3", FROZEN]
    assert contents(folder / FROZEN) == written
    about = json.loads((folder / "3" / "about" / "metadata").read_text())
    assert set(about["leaves"]) == {"step", "key", "params.w", "params.half", "params.flag"}
    assert set(about[FROZEN]) == {"deep.0.w", "deep.0.half", "deep.0.flag"}
    like, frozen = {"params": toy(0).params}, partly_frozen(0).frozen
    restored = restore_newest(folder, like, frozen=frozen, partial=True)
    assert restored is not None
    chex.assert_trees_all_equal((restored.tree["params"], restored.frozen), (toy(3).params, frozen))


def test_frozen_weights_that_are_damaged_or_of_another_model_are_refused(tmp_path):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(partly_frozen(1), rows())
    before = contents(tmp_path)
    other = replace(toy(0), frozen={"deep": toy(0).params})
    for like, words in (
        (other, r"is of another model: deep\.0\.flag: .* saved, nothing needed"),
        (toy(0), r"is of another model: deep\.0\.flag: .* saved, nothing needed"),
    ):
        with opened(tmp_path) as checkpoints, pytest.raises(ValueError, match=words):
            checkpoints.resume(like, rows())
    assert contents(tmp_path) == before
    shutil.rmtree(tmp_path / "checkpoint" / FROZEN)
    with (
        opened(tmp_path) as checkpoints,
        pytest.raises(ValueError, match=r"is intact \(1: .*\)\. Begin anew"),
    ):
        checkpoints.resume(partly_frozen(0), rows())
    assert names(tmp_path / "checkpoint") == ["1"], "nothing is moved, and nothing begins anew"


def test_frozen_weights_with_another_checksum_are_damage(tmp_path):
    folder = tmp_path / "checkpoint"
    with opened(tmp_path) as checkpoints:
        checkpoints.save(partly_frozen(1), rows())
    shutil.rmtree(folder / FROZEN)
    with ocp.PyTreeCheckpointer() as writer:
        writer.save(folder / FROZEN, {"deep": {0: toy(8).params}})
    with (
        opened(tmp_path) as checkpoints,
        pytest.raises(ValueError, match=r"1: the checksum of .*deep\.0\.w differs"),
    ):
        checkpoints.resume(partly_frozen(0), rows())


@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_alone_are_taken_from_the_next_older_and_nothing_is_written(tmp_path, damage):
    saved(tmp_path, 1, 2)
    DAMAGES[damage](tmp_path / "checkpoint" / "2")
    before = contents(tmp_path)
    restored = restore_newest(tmp_path / "checkpoint", {"params": toy(0).params}, partial=True)
    assert restored is not None
    chex.assert_trees_all_equal(restored.tree, {"params": toy(1).params}, strict=True)
    assert list(restored.damaged) == [2]
    assert contents(tmp_path) == before


def test_where_all_are_damaged_that_is_said_and_nothing_is_deleted(tmp_path):
    saved(tmp_path, 1, 2)
    for step in ("1", "2"):
        DAMAGES["nothing it is about"](tmp_path / "checkpoint" / step)
    for _ in range(2):  # nor does it begin anew when it is asked again
        with (
            opened(tmp_path) as checkpoints,
            pytest.raises(
                ValueError, match=r"none of the checkpoints in .* is intact \(2: .*; 1: .*\)\. Begin"
            ),
        ):
            checkpoints.resume(toy(0), rows())
        assert names(tmp_path / "checkpoint") == ["1", "2"]


def test_damaged_ones_of_one_step_lie_side_by_side(tmp_path):
    saved(tmp_path, 1)
    for _ in range(2):
        with opened(tmp_path) as checkpoints:
            checkpoints.save(toy(2), rows())
        DAMAGES["nothing it is about"](tmp_path / "checkpoint" / "2")
        with opened(tmp_path) as checkpoints, pytest.warns(UserWarning, match="damaged"):
            checkpoints.resume(toy(0), rows())
    assert names(tmp_path / "checkpoint-damaged") == ["2", "2-2"]


def test_what_interrupted_saves_left_is_removed(tmp_path):
    saved(tmp_path, 1)
    left = tmp_path / "checkpoint" / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoint" / "1", left)
    with opened(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]
        chex.assert_trees_all_equal(checkpoints.resume(toy(0), rows()), toy(1))
        checkpoints.save(toy(2), rows())
    assert names(tmp_path / "checkpoint") == ["1", "2"]


def test_one_of_another_config_is_refused_with_the_fields_and_kept(tmp_path):
    saved(tmp_path, 1)
    run = replace(small_run(tmp_path, steps=7, seed=1), checkpoints=Options(keep=7))
    words = r"checkpoint/1 is of another config: seed: 0 saved, 1 asked for; steps: 8 saved, 7 asked for$"
    with (
        Checkpoints(tmp_path / "checkpoint", run, "texts") as checkpoints,
        pytest.raises(ValueError, match=words),
    ):
        checkpoints.resume(toy(0), rows())
    assert names(tmp_path / "checkpoint") == ["1"]


def test_one_of_other_texts_is_refused(tmp_path):
    saved(tmp_path, 1)
    words = r"data\.paths: the texts have changed since the checkpoint .*/1 was saved"
    with opened(tmp_path, data="other texts") as checkpoints, pytest.raises(ValueError, match=words):
        checkpoints.resume(toy(0), rows())


def test_one_of_another_model_is_refused_with_the_leaves_and_kept(tmp_path):
    saved(tmp_path, 1)
    other = replace(toy(0, width=7), key=None)
    words = re.escape(
        "checkpoint/1 is of another model: key: uint32[2] saved, nothing needed; "
        "params.w: float32[2000] saved, float32[7] needed"
    )
    batches = rows()
    next(batches)
    before = batches.get_state()
    with opened(tmp_path) as checkpoints, pytest.raises(ValueError, match=words):
        checkpoints.resume(other, batches)
    assert batches.get_state() == before, "the data stays where it was"
    assert names(tmp_path / "checkpoint") == ["1"]


def test_of_many_leaves_that_differ_some_are_named_and_the_rest_counted(tmp_path):
    saved(tmp_path, 1)
    like = {"params": {f"w{i}": jnp.zeros(3) for i in range(9)}}
    words = (
        r"checkpoint/1 is of another model: params\.w0: nothing saved, float32\[3\] needed; .*params\.w3: "
        r"nothing saved, float32\[3\] needed; and 5 more\. Has the config, the tokenizer or the trainer's"
    )
    with pytest.raises(ValueError, match=words):
        restore_newest(tmp_path / "checkpoint", like, partial=True)


def test_a_folder_that_cannot_be_written_to_stops_the_save_with_its_path(tmp_path):
    saved(tmp_path, 1)
    with opened(tmp_path) as checkpoints:
        (tmp_path / "checkpoint").rename(tmp_path / "gone")
        (tmp_path / "checkpoint").write_text("a file")
        with pytest.raises(WriteError, match=r"the checkpoint .*checkpoint/2 could not be written: "):
            save_and_wait(checkpoints)


@pytest.mark.parametrize("inside", ["2.orbax", "state", "about"])
def test_a_disk_without_room_for_a_folder_stops_the_save_at_once(tmp_path, monkeypatch, inside):
    saved(tmp_path, 1)
    make = os.mkdir

    def full(path, *arguments, **options):
        if inside in str(path):
            raise OSError(28, "No space left on device", str(path))
        make(path, *arguments, **options)

    with opened(tmp_path) as checkpoints, monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", full)
        with pytest.raises(WriteError, match=r"checkpoint/2 could not be written: No space left on device$"):
            save_and_wait(checkpoints)
    with opened(tmp_path) as checkpoints:
        chex.assert_trees_all_equal(checkpoints.resume(toy(0), rows()), toy(1))


def save_and_wait(checkpoints):
    checkpoints.save(toy(2), rows())
    checkpoints.wait()
