"""A run from its config to its folder, and again from a checkpoint in its middle."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import chex
import pytest
from train_cases import MODEL, small_run

from train.checkpoint import Checkpoints
from train.folder import RunFolder
from train.loop import prepare, train
from train.metrics import read, rewind
from train.step import begin

FILES = ["checkpoint", "config.json", "curriculum.png", "metrics.jsonl"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 8 steps with validations and checkpoints at 4 and 8: its config and its summary."""
    run = small_run(tmp_path_factory.mktemp("finished"), evaluate_every=4, checkpoint_every=4)
    return run, train(prepare(run))


def folder_of(run) -> RunFolder:
    return RunFolder(Path(run.folder) / run.name)


def last_state(run):
    _, like = begin(run)
    with Checkpoints(folder_of(run).checkpoints, keep=2) as checkpoints:
        return checkpoints.restore(like)


def untimed(records):
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in records]


def test_a_run_leaves_all_its_files(finished):
    run, _ = finished
    assert sorted(path.name for path in folder_of(run).path.iterdir()) == FILES
    assert sorted(path.name for path in folder_of(run).checkpoints.iterdir()) == ["4", "8"]
    assert folder_of(run).picture.read_bytes().startswith(b"\x89PNG")


def test_every_step_and_validation_is_recorded(finished):
    run, summary = finished
    records = read(folder_of(run).metrics)
    assert records == summary.records
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == list(range(8))
    assert [r["step"] for r in records if "validation_loss" in r] == [0, 4, 8]
    assert steps[-1]["exposure"] == 1.0
    assert (steps[0]["window"], steps[-1]["window"]) == (4, 32)
    assert all(r["seconds"] > 0 and r["tokens_per_second"] > 0 for r in steps)
    assert steps[0]["bits_per_byte"] == pytest.approx(8.0, abs=1e-4)


def test_the_summary_says_what_the_run_came_to(finished):
    _, summary = finished
    assert summary.compilations == 1
    rows = [line.split() for line in str(summary).splitlines()]
    assert rows[1][:2] == ["validation,", "bits"]
    assert rows[1][-2] == "8.000"
    assert rows[2][-1] == "100.0%"
    assert rows[4][-2:] == ["6", "32"]  # the first step, at 4, compiled
    assert rows[6][-1] == "1"


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(finished, tmp_path):
    run, summary = finished
    resumed = replace(run, folder=str(tmp_path))
    shutil.copytree(folder_of(run).path, folder_of(resumed).path)
    folder_of(resumed).config.write_text(folder_of(run).config.read_text().replace(run.folder, str(tmp_path)))
    # As if it had been killed in step 6: the checkpoint at 8 and the picture never were, but metrics were.
    shutil.rmtree(folder_of(resumed).checkpoints / "8")
    folder_of(resumed).picture.unlink()
    written = folder_of(resumed).metrics.read_text().splitlines(keepends=True)
    folder_of(resumed).metrics.write_text("".join(written[:8]) + written[8][:20])

    session = prepare(resumed, resume=True)
    assert int(session.state.step) == 4
    again = train(session)

    chex.assert_trees_all_equal(last_state(resumed), last_state(run))
    assert untimed(again.records) == untimed(summary.records)
    assert again.compilations == 1
    assert sorted(path.name for path in folder_of(resumed).path.iterdir()) == FILES


def test_resuming_a_finished_run_trains_no_more(finished):
    run, summary = finished
    again = train(prepare(run, resume=True))
    assert again.compilations == 0
    assert again.records == summary.records


def test_a_folder_that_holds_a_run_is_not_begun_anew(finished):
    run, _ = finished
    words = r"already holds a run: continue it with --resume, replace it with --overwrite"
    with pytest.raises(FileExistsError, match=words):
        prepare(run)


def test_overwriting_takes_only_the_run(tmp_path):
    run = small_run(tmp_path)
    prepare(run)
    (folder_of(run).path / "notes.txt").write_text("mine")
    folder_of(run).metrics.write_text("{}\n")
    prepare(run, overwrite=True)
    assert sorted(path.name for path in folder_of(run).path.iterdir()) == ["config.json", "notes.txt"]


def test_a_refused_run_overwrites_nothing(finished):
    run, summary = finished
    gone = replace(run, data=replace(run.data, paths=("nowhere.txt",)))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt does not exist"):
        prepare(gone, overwrite=True)
    assert read(folder_of(run).metrics) == summary.records


def test_resuming_nothing_is_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"small holds no run to resume: .*config\.json does not exist"
    ):
        prepare(small_run(tmp_path), resume=True)


def test_resuming_without_a_checkpoint_is_refused(tmp_path):
    run = small_run(tmp_path)
    prepare(run)
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoint to resume from"):
        prepare(run, resume=True)


def test_resuming_another_config_names_each_field_with_both_values(finished):
    run, _ = finished
    other = replace(run, steps=9, model=replace(MODEL, width=32))
    words = r"another config: model\.width: 16 saved, 32 asked for; steps: 8 saved, 9 asked for"
    with pytest.raises(ValueError, match=words):
        prepare(other, resume=True)


@pytest.mark.parametrize(
    ("content", "words"),
    [('{"name": "sm', r"config\.json is corrupted"), ("[1]", r"corrupted: it holds list, not an object")],
)
def test_a_corrupted_config_is_refused(tmp_path, content, words):
    run = small_run(tmp_path)
    prepare(run)
    folder_of(run).config.write_text(content)
    with pytest.raises(ValueError, match=words):
        prepare(run, resume=True)


def test_rewinding_keeps_what_led_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [{"step": 0, "validation_loss": 5.5}]
    records += [{"step": step, "loss": 1.0} for step in range(4)]
    records[3:3] = [{"step": 2, "validation_loss": 5.0}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    rewind(path, 2)
    assert read(path) == records[:4]
