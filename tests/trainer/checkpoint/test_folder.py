"""A run's folder: who may begin in it, who may go on, and what a kill can leave."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
from train_cases import MODEL, small_run

from train.checkpoint.folder import RunFolder
from train.config.operation import Checkpoints, Watch
from train.config.run import to_json
from train.disk import WriteError, check_space, check_writable, reason, write_atomically, writing


@pytest.fixture
def run(tmp_path):
    return small_run(tmp_path)


@pytest.fixture
def folder(run):
    return RunFolder(Path(run.folder) / run.name)


def names(path: Path) -> list[str]:
    return sorted(each.name for each in path.iterdir())


def test_a_folder_that_is_not_there_holds_no_run(folder, run):
    assert not folder.holds(run)
    assert not folder.path.exists()


def test_a_begun_run_may_go_on(folder, run):
    folder.begin(run)
    assert folder.holds(run)
    assert folder.config.read_text() == to_json(run)
    assert names(folder.path) == ["config.json"]


def test_another_config_is_refused_with_each_field_and_both_values(folder, run):
    folder.begin(run)
    other = replace(run, steps=7, model=replace(MODEL, width=32))
    words = re.escape(
        "small holds a run of another config: model.width: 16 saved, 32 asked for; steps: 8 saved, "
        "7 asked for. Begin anew with --overwrite, or choose another --name"
    )
    with pytest.raises(ValueError, match=words):
        folder.holds(other)


def test_where_it_lies_and_what_is_kept_and_shown_may_change(folder, run):
    folder.begin(run)
    other = replace(run, folder="elsewhere", checkpoints=Checkpoints(keep=5), watch=Watch(log_every=3))
    assert folder.holds(replace(other, optimizer=replace(run.optimizer, give_up=99)))
    folder.write_config(other)
    assert json.loads(folder.config.read_text())["checkpoints"]["keep"] == 5


@pytest.mark.parametrize("name", ["checkpoint", "report.md", "profile"])
def test_what_a_run_would_leave_is_nobodys_without_a_config(folder, run, name):
    (folder.path / name).mkdir(parents=True)
    (folder.path / "notes.txt").touch()
    with pytest.raises(
        FileExistsError, match=rf"small holds {name}, but no config\.json that says what of; .*--overwrite"
    ):
        folder.holds(run)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"name": "sm', r"config\.json is corrupted: "),
        ("", r"config\.json is corrupted: "),
        ("[1]", r"config\.json is corrupted: it holds list, not an object"),
    ],
)
def test_a_config_that_someone_else_has_written_is_refused(folder, run, content, words):
    folder.begin(run)
    folder.config.write_text(content)
    with pytest.raises(ValueError, match=words):
        folder.holds(run)


def test_beginning_anew_takes_the_runs_files_and_nothing_else(folder, run):
    folder.begin(run)
    ours = ["metrics.jsonl", "report.md", "curriculum.png", "positions.png", "summaries.jsonl", "wandb.id"]
    for name in [*ours, "notes.txt"]:
        (folder.path / name).write_text("x")
    for name in (
        "checkpoint/4",
        "checkpoint-discarded/2",
        "checkpoint-damaged/2",
        "tensorboard",
        "profile",
        "own",
    ):
        (folder.path / name).mkdir(parents=True)
    folder.begin(run)
    assert names(folder.path) == ["checkpoint-damaged", "config.json", "notes.txt", "own"]


CHANGES = ((Path, "rename"), (Path, "replace"), (Path, "unlink"), (shutil, "rmtree"))


class Killed(BaseException):
    """In place of the end of a process."""


def test_killed_while_beginning_anew_it_leaves_the_old_run_or_the_new_one(folder, run, monkeypatch):
    """Stopped before each of the calls that change something, in turn."""
    new, calls = replace(run, seed=1), 0

    def counted(function, at):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == at:
                raise Killed
            return function(*arguments, **options)

        return call

    for at in range(1, 30):
        shutil.rmtree(folder.path, ignore_errors=True)
        folder.begin(run)
        (folder.checkpoints / "4").mkdir(parents=True)
        folder.metrics.write_text("{}\n")
        calls = 0
        try:
            with monkeypatch.context() as patch:
                for owner, name in CHANGES:
                    patch.setattr(owner, name, counted(getattr(owner, name), at))
                folder.begin(new)
        except Killed:
            old = json.loads(folder.config.read_text())["seed"] == 0
            assert folder.holds(run if old else new)
            assert old or not folder.checkpoints.exists()
            folder.begin(new)
            assert names(folder.path) == ["config.json"]
        else:
            break
    assert at > 6


CLAIM = """
import sys
from pathlib import Path
from train.checkpoint.folder import RunFolder
with RunFolder(Path(sys.argv[1])).lock():
    print("claimed", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time_and_a_killed_one_counts_no_more(folder, run):
    folder.begin(run)
    command = [sys.executable, "-c", CLAIM, str(folder.path)]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command, env=paths, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "claimed\n"
        with pytest.raises(FileExistsError, match="small is in use: another process trains in it"):
            folder.lock().__enter__()
        other.kill()
    with folder.lock():
        pass
    with folder.lock():
        pass


@pytest.fixture
def apart(run, tmp_path):
    """The folder of a run whose checkpoints lie elsewhere, and that run."""
    run = replace(run, checkpoints=Checkpoints(folder=str(tmp_path / "bucket")))
    return RunFolder.of(run), run


def test_checkpoints_may_lie_elsewhere_under_the_runs_name(apart, tmp_path):
    folder, run = apart
    assert folder.path == Path(run.folder) / "small"
    assert folder.checkpoints == tmp_path / "bucket" / "small"
    assert RunFolder.of(run, tmp_path / "moved").checkpoints == folder.checkpoints
    assert RunFolder.of(replace(run, checkpoints=Checkpoints())).checkpoints == folder.path / "checkpoint"


def test_they_are_enough_to_go_on_though_the_folder_is_lost(apart):
    folder, run = apart
    assert not folder.holds(run)
    (folder.checkpoints / "4").mkdir(parents=True)
    assert folder.holds(run)
    folder.path.mkdir(parents=True)
    folder.metrics.touch()  # something else is there
    with pytest.raises(FileExistsError, match=r"small holds metrics\.jsonl, but no config\.json"):
        folder.holds(run)


@pytest.mark.parametrize("was", ["here", "there", "under another name"])
def test_checkpoints_are_not_forgotten_when_their_place_changes(apart, was):
    folder, run = apart
    here = replace(run, checkpoints=Checkpoints())
    before, now = {
        "here": (here, run),
        "there": (run, here),
        "under another name": (replace(run, name="old"), run),
    }[was]
    folder.path.mkdir(parents=True)
    folder.write_config(before)
    assert RunFolder.of(now).holds(now), "there are none yet"
    saved = RunFolder.of(before, folder.path).checkpoints
    (saved / "4").mkdir(parents=True)
    with pytest.raises(
        ValueError, match=f"^checkpoints.folder: the run in .*small has its .* in {saved} and none in "
    ):
        RunFolder.of(now).holds(now)
    moved = RunFolder.of(now).checkpoints
    moved.parent.mkdir(exist_ok=True)
    saved.rename(moved)
    assert RunFolder.of(now).holds(now)


def test_beginning_anew_removes_them_there(apart):
    folder, run = apart
    (folder.checkpoints / "4").mkdir(parents=True)
    (folder.checkpoints.parent / "another" / "8").mkdir(parents=True)
    folder.begin(run)
    assert names(folder.checkpoints.parent) == ["another"]


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="the library is installed")
def test_a_bucket_without_its_library_is_refused(run):
    with pytest.raises(ImportError, match=r"^checkpoints\.folder: gs://b/runs cannot be read: .*gcsfs"):
        RunFolder.of(replace(run, checkpoints=Checkpoints(folder="gs://b/runs")))


def test_a_path_below_a_file_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"folder: .*file/runs/a cannot be written to: .*file is no folder"):
        check_writable(tmp_path / "file" / "runs" / "a")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc, which nobody may write to")
def test_a_folder_that_takes_no_files_is_refused():
    with pytest.raises(OSError, match=r"folder: /proc/self/runs cannot be written to: "):
        check_writable(Path("/proc/self/runs"))


def test_asking_whether_it_can_be_written_to_leaves_nothing(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


def test_too_little_space_is_refused_with_both_numbers(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 2_500_000))
    check_space(tmp_path, 2_500_000, "3 checkpoints")
    words = r"has too little space: 2\.5 MB are free, and 3 checkpoints take 7\.5 GB$"
    with pytest.raises(OSError, match=words):
        check_space(tmp_path, 7_500_000_000, "3 checkpoints")


def test_a_file_is_replaced_as_a_whole_or_left_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "file"
    write_atomically(file, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(WriteError, match=r"/file could not be written: No space left on device$"):
        write_atomically(file, "new")
    assert file.read_text() == "old"


def test_the_first_name_for_a_failed_write_stays(tmp_path):
    refused = pytest.raises(WriteError, match=r"^inner could not be written: File too large$")
    with refused, writing(Path("outer")), writing(Path("inner")):
        raise OSError(27, "File too large")


def test_the_reason_is_found_in_what_the_storage_layers_say():
    assert reason(ValueError("Failed writing x: [os_error_code='28'] [more]")) == "No space left on device"
    assert reason(ValueError("a" * 9 + " b" * 200)).endswith("[...]")
    assert reason(KeyError()) == "KeyError"


def test_a_config_that_is_corrupted_is_begun_anew(folder, run):
    folder.begin(run)
    folder.config.write_text("{")
    folder.begin(run)
    assert folder.holds(run)


def test_a_report_of_fewer_steps_goes_when_the_run_goes_on_for_more(folder, run):
    folder.begin(run)
    folder.report.write_text("trained for 8 steps")
    folder.resume(run)
    assert folder.report.exists()
    folder.resume(replace(run, steps=9))
    assert not folder.report.exists()
