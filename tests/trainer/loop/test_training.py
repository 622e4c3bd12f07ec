"""A run from its config to its folder, and all that can stop it."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import kill_run
import pytest
from train_cases import small_run, steps_of, validations_of

from train.checkpoint.folder import RunFolder
from train.checkpoint.load import load_model
from train.config.operation import Checkpoints, Evaluation, Watch
from train.config.sections import Curriculum, Optimizer
from train.data.corpus import read_corpus
from train.loop import prepare as preparation
from train.loop.prepare import prepare
from train.loop.training import NotFinite, train
from train.metrics.log import read
from train.report.outcome import Outcome

FILES = ["checkpoint", "config.json", "curriculum.png", "metrics.jsonl", "positions.png", "report.md"]


def run_of(folder: Path, **options):
    """8 steps, with validations and checkpoints at 4 and 8."""
    defaults = {
        "evaluation": Evaluation(every=4, rows=2),
        "checkpoints": Checkpoints(every=4),
        "watch": Watch(peak_flops=1e9),
    }
    return small_run(folder, **(defaults | options))


def folder_of(run) -> RunFolder:
    return RunFolder(Path(run.folder) / run.name)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: its config, its summary, and what was said when it began."""
    run = run_of(tmp_path_factory.mktemp("finished"))
    session = prepare(run)
    opening = session.opening
    return run, train(session), opening


def test_a_run_leaves_all_its_files(finished):
    run, _, _ = finished
    left = sorted(path.name for path in folder_of(run).path.iterdir())
    assert left == [*FILES, "tensorboard"]
    assert sorted(path.name for path in folder_of(run).checkpoints.iterdir()) == ["4", "8"]


def test_every_step_and_validation_is_recorded(finished):
    run, summary, _ = finished
    records = read(folder_of(run).metrics)
    assert records == summary.records
    assert [r.step for r in steps_of(records)] == list(range(8))
    assert [r.step for r in validations_of(records)] == [0, 4, 8]
    assert summary.compilations == 1


def test_a_finished_run_says_so_and_trains_no_more(finished):
    run, summary, opening = finished
    begins = f"A run of 8 steps begins in {folder_of(run).path}. It takes 1 of the 8 devices; --mesh.data,"
    assert opening.startswith(begins)
    session = prepare(run)
    assert session.opening == (
        f"The run in {folder_of(run).path} is finished, all its 8 steps; "
        "more --steps extend it, --overwrite begins it anew."
    )
    again = train(session)
    assert (again.compilations, again.records) == (0, summary.records)


def test_another_config_is_refused_and_what_may_change_is_written_down(finished):
    run, _, _ = finished
    with pytest.raises(ValueError, match=r"another config: steps: 8 saved, 7 asked for"):
        prepare(replace(run, steps=7))
    prepare(replace(run, watch=replace(run.watch, log_every=2)))
    assert json.loads(folder_of(run).config.read_text())["watch"]["log_every"] == 2


def test_other_texts_are_refused(tmp_path):
    run = run_of(tmp_path)
    train(prepare(run))
    text = Path(run.data.paths[0])
    text.write_text(text.read_text().replace("mask", "task"))
    with pytest.raises(
        ValueError, match=r"data\.paths: the texts have changed since the checkpoint .*/8 was"
    ):
        prepare(run)


def test_a_refused_run_overwrites_nothing(finished):
    run, summary, _ = finished
    gone = replace(run, data=replace(run.data, paths=("nowhere.txt",)))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        prepare(gone, overwrite=True)
    assert read(folder_of(run).metrics) == summary.records


def test_overwriting_begins_anew_and_so_does_a_run_without_a_checkpoint(tmp_path):
    run = run_of(tmp_path)
    train(prepare(run))
    session = prepare(replace(run, seed=1), overwrite=True)
    assert int(session.state.step) == 0
    assert [path.name for path in folder_of(run).path.iterdir()] == ["config.json"]
    folder_of(run).metrics.write_text('{"step": 0, "loss": 1.0}\n')  # killed before its first checkpoint
    assert train(prepare(replace(run, seed=1))).steps[0].loss != 1.0


def test_a_folder_in_use_is_refused(finished):
    run, _, _ = finished
    with (
        folder_of(run).lock(),
        pytest.raises(FileExistsError, match="small is in use: another process trains in it"),
    ):
        prepare(run)


def test_a_disk_without_room_for_the_checkpoints_is_refused(tmp_path, monkeypatch):
    run = run_of(tmp_path)
    monkeypatch.setattr("train.disk.shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(
        OSError, match=r"small has too little space: 1\.0 kB are free, and 3 more checkpoints"
    ):
        prepare(run)
    assert not folder_of(run).config.exists()


def test_processes_that_have_not_joined_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    words = r"^the devices belong to 2 processes that have not joined: call jax\.distributed\.initialize"
    with pytest.raises(ValueError, match=words):
        prepare(run_of(tmp_path))


def test_a_run_that_another_process_finished_meanwhile_is_not_begun_anew(tmp_path, monkeypatch):
    run = run_of(tmp_path)

    def meanwhile(run, tokenizer, conventions):
        with monkeypatch.context() as patch:
            patch.setattr(preparation, "read_corpus", read_corpus)
            train(prepare(run))
        return read_corpus(run, tokenizer, conventions)

    monkeypatch.setattr(preparation, "read_corpus", meanwhile)
    assert int(prepare(run).state.step) == 8


def test_a_run_whose_machine_is_lost_goes_on_from_checkpoints_elsewhere(finished, tmp_path):
    run = run_of(tmp_path, checkpoints=Checkpoints(every=4, folder=str(tmp_path / "elsewhere")))
    train(prepare(run))
    shutil.rmtree(tmp_path / "elsewhere" / "small" / "8")
    shutil.rmtree(folder_of(run).path)
    with pytest.raises(ValueError, match=r"checkpoint .*elsewhere/small/4 is of another config: seed"):
        prepare(replace(run, seed=1))
    lost = prepare(run)
    assert "goes on after step 4 of 8" in lost.opening
    train(lost)
    there, whole = (read(folder_of(each).metrics) for each in (run, finished[0]))
    assert [record.step for record in there] == [4, 5, 6, 7, 8]
    assert [r.loss for r in there[:4]] == [r.loss for r in steps_of(whole)][4:]
    assert load_model(folder_of(run).path)[0].run == run
    assert prepare(run, overwrite=True).opening.startswith("A run of 8 steps begins")
    assert not (tmp_path / "elsewhere" / "small").exists()


def test_a_disk_that_is_full_when_the_report_is_written_is_named_and_a_report_is_whole(
    finished, tmp_path, monkeypatch
):
    run, _, _ = finished
    report = folder_of(run).report
    written = report.read_text()
    report.unlink()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    session = prepare(run)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        outcome = train(session)
    assert isinstance(outcome, Outcome)
    (failure,) = outcome.failures
    assert "report.md could not be written: No space left on device): the same command tries again" in failure
    assert not report.exists()
    train(prepare(run))
    assert report.read_text().splitlines()[:3] == written.splitlines()[:3]


def test_the_loss_moves_the_curriculum_and_the_checkpoint_knows(tmp_path):
    curriculum = Curriculum(start=4, pace="loss", stages=2, patience=1)
    run = run_of(tmp_path, curriculum=curriculum)
    train(prepare(run))
    state = prepare(run).state
    assert int(state.pace.stage) == 2  # after the validations at 4 and 8, not that before training
    windows = [r.window for r in steps_of(read(folder_of(run).metrics))]
    assert windows[:4] == [4] * 4
    assert windows[4] > 4


def poisoned(session, steps):
    """The session with data whose loss is not finite at some steps."""

    class Batches:
        count = 0

        def __getattr__(self, name):
            return getattr(session.batches, name)

        def __next__(self):
            batch = next(session.batches)
            self.count += 1
            if self.count - 1 in steps:
                batch = replace(batch, weights=jnp.full_like(batch.weights, jnp.nan))
            return batch

    return replace(session, batches=Batches())


def unsaved(monkeypatch):
    """`poisoned` stands for an iterator that grain does not know."""
    monkeypatch.setattr("train.loop.training.Checkpoints.save", lambda self, state, batches: None)


def test_after_so_many_steps_that_are_not_finite_it_stops(tmp_path, monkeypatch):
    unsaved(monkeypatch)
    run = run_of(tmp_path, optimizer=Optimizer(give_up=3))
    words = (
        r"the loss or gradient of steps 3 to 5 was not finite, 3 in a row \(optimizer\.give_up\), and none "
        r"of them was taken\. Lower optimizer\.learning_rate .*; there is no checkpoint yet: the same command"
    )
    with pytest.raises(NotFinite, match=words):
        train(poisoned(prepare(run), {1, 3, 4, 5, 6, 7}))
    steps = steps_of(read(folder_of(run).metrics))
    assert steps[5].loss is None
    assert [r.skipped for r in steps] == [0, 1, 1, 2, 3, 4]


def test_fewer_are_skipped_and_nothing_is_saved_meanwhile(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(
        "train.loop.training.Checkpoints.save", lambda self, state, batches: saved.append(int(state.step))
    )
    run = run_of(tmp_path, checkpoints=Checkpoints(every=2), optimizer=Optimizer(give_up=3))
    train(poisoned(prepare(run), {3, 6, 7}))
    assert saved == [2, 6, 8]  # not 4, whose last step was skipped; the end is saved whatever


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    run = run_of(tmp_path)
    session = prepare(run)
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.inf), session.state.params)
    run = replace(run, optimizer=Optimizer(give_up=99))
    program = replace(session.program, run=run)
    session = replace(session, program=program, state=replace(session.state, params=broken))
    with pytest.raises(NotFinite, match=r"the weights after step 8 are not finite; they were not saved"):
        train(session)


FULL = """
import resource, sys
from pathlib import Path
import train_cases
from tests.trainer.loop.test_training import run_of
from train.loop import prepare, training
whole = training._Training._step
def step(self, number):
    if number == 5:
        self._checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
    whole(self, number)
training._Training._step = step
try:
    training.train(prepare.prepare(run_of(Path(sys.argv[1]))))
except OSError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("limit", "what"),
    [
        pytest.param(1_000, r"metrics\.jsonl", marks=pytest.mark.slow, id="metrics"),
        pytest.param(20_000, r"checkpoint/8", id="checkpoint"),
    ],
)
def test_a_disk_that_fills_up_stops_it_and_leaves_the_last_checkpoint(
    finished, tmp_path, limit, what, compiles_as_here
):
    path = os.pathsep.join([*map(str, Path(__file__).parents[2:4]), *sys.path])
    environment = {**os.environ, **compiles_as_here, "PYTHONPATH": path}
    command = [sys.executable, "-c", FULL, str(tmp_path), str(limit)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    failed = rf"WriteError (the checkpoint )?\S*{what} could not be written: File too large"
    words = failed + r"; the last good checkpoint is \S*/4, and the same command goes on from it"
    assert re.match(words, done.stdout), done.stdout
    run = run_of(tmp_path)
    session = prepare(run)
    assert int(session.state.step) == 4
    train(session)
    assert kill_run.differences(run, finished[0]) == []
