"""Runs of several real processes: the same losses, stopped and killed together, refused together."""

import re
import shutil
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from jax.experimental import multihost_utils
from kill_run import differences
from process_run import STEPS, Deviation, ParallelRun, run_processes, set_up_process
from train_cases import steps_of

from train.checkpoint.folder import RunFolder
from train.config.operation import Mesh
from train.config.run import Run
from train.loop.prepare import prepare
from train.loop.training import train
from train.metrics.log import read
from train.parallel import processes
from train.parallel.initialize import join
from train.parallel.processes import Processes

ROWS_AND_TOKENS = ("--mesh.data", "2", "--mesh.context", "4")
TOKENS = ("--mesh.data", "1", "--mesh.context", "8")


def losses(run: ParallelRun) -> list[float]:
    """Of each step, from 0, none of which is missing."""
    records = steps_of(read(run.where.metrics))
    assert [record.step for record in records] == list(range(len(records)))
    return [record.loss for record in records]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> ParallelRun:
    """A run of two processes with four devices each, that nothing disturbs."""
    run = ParallelRun(tmp_path_factory.mktemp("processes"), "undisturbed", ROWS_AND_TOKENS)
    assert run.finish() == [0, 0], run.printed(0) + run.printed(1)
    return run


@pytest.fixture(scope="module")
def single(undisturbed) -> ParallelRun:
    """The same run in this process, with eight devices."""
    run = replace(undisturbed, name="one")
    train(prepare(run.run))
    return run


def test_two_processes_train_as_one_does_and_only_the_first_writes(undisturbed, single):
    np.testing.assert_allclose(losses(undisturbed), losses(single), rtol=1e-5)
    assert len(losses(single)) == STEPS
    assert "A run of 12 steps begins in" in undisturbed.printed(0)
    assert "It takes 8 devices, of 2 processes." in undisturbed.printed(0)
    assert "begins" not in undisturbed.printed(1)
    assert "step/s" not in undisturbed.printed(1)


def test_a_signal_to_one_saves_on_both_and_the_same_command_goes_on_on_another_mesh(undisturbed, single):
    stopped = replace(undisturbed, name="stopped", deviations={1: Deviation(at=2, signal=signal.SIGTERM)})
    assert stopped.finish() == [0, 0], stopped.printed(0) + stopped.printed(1)
    done = len(losses(stopped))
    assert 2 < done < STEPS
    assert f"preempted: stopped after step {done} of {STEPS}, which is saved" in stopped.printed(0)
    assert stopped.where.saved_steps[-1] == done
    again = replace(stopped, deviations={}, options=TOKENS)
    assert again.finish() == [0, 0], again.printed(0) + again.printed(1)
    assert f"goes on after step {done} of {STEPS}" in again.printed(0)
    np.testing.assert_allclose(losses(again), losses(single), rtol=1e-5)


@pytest.mark.slow
def test_one_is_killed_both_end_and_both_started_again_go_on_bit_for_bit(undisturbed):
    killed = replace(undisturbed, name="killed", deviations={1: Deviation(at=7, signal=signal.SIGKILL)})
    first, second = killed.finish()
    assert second == -signal.SIGKILL
    assert first not in (0, None)
    assert killed.where.saved_steps[-1] < STEPS
    again = replace(killed, deviations={})
    assert again.finish() == [0, 0], again.printed(0) + again.printed(1)
    assert differences(again.run, undisturbed.run) == []


@pytest.mark.parametrize(
    ("deviation", "options", "words"),
    [
        (
            Deviation(words=("--seed", "1", "--data.batch", "4")),
            ROWS_AND_TOKENS,
            "the processes disagree on the config: seed: 0 in process 0, 1 in process 1; data.batch: 2 in "
            "process 0, 4 in process 1",
        ),
        (Deviation(folder=Path("/")), ROWS_AND_TOKENS, "data.paths: words.txt does not exist"),
        (
            Deviation(),
            ("--mesh.context", "4"),
            "mesh: with 2 processes all their 8 devices must be in it, got ",
        ),
        (Deviation(words=("--sed", "1")), ROWS_AND_TOKENS, "unknown option --sed (did you mean --seed?)"),
    ],
    ids=["config", "texts", "mesh", "option"],
)
def test_what_one_refuses_ends_both_before_anything_is_written(undisturbed, deviation, options, words):
    relative = ("--data.paths", "words.txt", "--data.cache", str(undisturbed.folder / "cache"))
    run = replace(
        undisturbed,
        name="refused",
        options=(*options, *relative),
        deviations={
            0: Deviation(folder=undisturbed.folder),
            1: replace(deviation, folder=deviation.folder or undisturbed.folder),
        },
    )
    shutil.rmtree(run.where.path, ignore_errors=True)
    for process in (0, 1):
        run._out(process).unlink(missing_ok=True)
    assert run.finish() == [2, 2], run.printed(0) + run.printed(1)
    for process in (0, 1):
        assert words in run.printed(process)
    assert not run.where.path.exists()


def _fails_or_waits(index: int, folder: Path, where: Mapping[str, str]):
    set_up_process(folder / f"fails-{index}.out", where, devices=1)
    processes = join()
    with processes.end_together():
        if index == 1:
            raise SystemExit(3) from OSError("the disk of this test is full")
        multihost_utils.process_allgather(np.zeros(1))  # waits for the other as a train step does


def test_one_that_fails_while_others_wait_for_its_devices_ends_them_with_its_words(tmp_path):
    assert run_processes(_fails_or_waits, [(0, tmp_path), (1, tmp_path)]) == [3, 3]
    assert "process 1 failed: the disk of this test is full" in (tmp_path / "fails-0.out").read_text()


def _tells_late(index: int, folder: Path, where: Mapping[str, str]):
    set_up_process(folder / f"late-{index}.out", where, devices=1)
    processes.PATIENCE = 0.2
    with join().end_together():
        if index == 1:
            time.sleep(2)
        assert Processes.current().all_gather(f"word {index}") == ["word 0", "word 1"]
        assert Processes.current().all_gather("again") == ["again", "again"]


def test_those_who_wait_for_another_say_for_whom(tmp_path):
    assert run_processes(_tells_late, [(0, tmp_path), (1, tmp_path)]) == [0, 0]
    assert "waiting for process 1\n" in (tmp_path / "late-0.out").read_text()
    assert "waiting" not in (tmp_path / "late-1.out").read_text()


def _joins(index: int, folder: Path, where: Mapping[str, str]):
    set_up_process(folder / f"joins-{index}.out", where, devices=1)
    if index == 1:
        raise SystemExit(0)  # never comes
    join(timeout=2)


def test_one_that_waits_for_others_in_vain_says_where(tmp_path):
    assert run_processes(_joins, [(0, tmp_path), (1, tmp_path)]) == [2, 0]
    assert re.match(
        r"gave up after 2 s: not all processes of this run came to localhost:\d+\. Is the command running",
        (tmp_path / "joins-0.out").read_text(),
    )


def onward(saved: Run, start: int, mesh: Mesh, folder: Path) -> Run:
    """A run that has gone on, on this mesh, from a checkpoint that another one saved."""
    run = replace(saved, folder=str(folder), mesh=mesh)
    where = RunFolder.of(run)
    shutil.copytree(RunFolder.of(saved).path, where.path)
    for later in where.saved_steps:
        if later > start:
            shutil.rmtree(where.checkpoints / str(later))
    session = prepare(run)
    assert int(session.state.step) == start  # and its sums are those that were saved
    train(session)
    return run


@pytest.mark.slow  # the signal below goes on on another mesh too
def test_checkpoints_go_on_on_other_meshes_with_the_same_losses(single, tmp_path):
    eight = replace(single.run, data=replace(single.run.data, cache=f"{single.run.folder}/cache"))
    two = onward(eight, 4, Mesh(fsdp=2, layout="contiguous"), tmp_path / "two")
    one = onward(two, 8, Mesh(), tmp_path / "one")
    back = onward(two, 8, eight.mesh, tmp_path / "back")
    for run in (two, one, back):
        found = [record.loss for record in steps_of(read(RunFolder.of(run).metrics))]
        np.testing.assert_allclose(found, losses(single), rtol=1e-5)
