"""The last minute of a run and the day after: parts that fail, more steps, another run's weights."""

import json
from dataclasses import replace
from pathlib import Path

import chex
import pytest
from slow import mostly
from train_cases import MODEL, small_run, steps_of, validations_of

from train.checkpoint.folder import RunFolder
from train.config.operation import Checkpoints, Evaluation, Generation
from train.config.sections import Data
from train.evaluate import summaries
from train.loop import finalize
from train.loop.prepare import prepare
from train.loop.training import train
from train.metrics.log import read
from train.report import page
from train.report.outcome import Outcome
from train.step.optimizer import learning_rate


def run_of(folder: Path, **options):
    return small_run(folder, **({"steps": 4, "checkpoints": Checkpoints(every=2)} | options))


def folder_of(run) -> RunFolder:
    return RunFolder(Path(run.folder) / run.name)


def pairs(folder: Path) -> Data:
    lines = [{"document": "a b c d e " * 2, "summary": "a b"}] * 12
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Data(paths=(str(folder / "pairs.jsonl"),), length=32, batch=2)


def broken(*arguments, **options):
    raise RuntimeError("out of luck")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = run_of(tmp_path_factory.mktemp("finished"))
    return run, train(prepare(run))


WHAT_FAILS = [
    ((page, "draw"), "the picture curriculum.png", ["positions.png", "report.md", "summaries.jsonl"]),
    ((page, "report"), "the report", ["curriculum.png", "positions.png", "summaries.jsonl"]),
    ((finalize, "evaluate_summaries"), "summaries and their ROUGE", ["curriculum.png", "report.md"]),
    ((summaries, "rouge"), "summaries and their ROUGE", ["curriculum.png", "report.md"]),
]


@pytest.mark.parametrize(("place", "part", "left"), mostly(WHAT_FAILS, WHAT_FAILS[1:3]))
def test_what_fails_after_the_last_step_costs_itself_alone(tmp_path, monkeypatch, place, part, left):
    run = run_of(
        tmp_path,
        steps=1,
        task="summarize",
        data=pairs(tmp_path),
        evaluation=Evaluation(rows=2, summaries=1),
        generation=Generation(tokens=2),
    )
    session = prepare(run)
    with monkeypatch.context() as patch:
        patch.setattr(*place, broken)
        outcome = train(session)
    assert isinstance(outcome, Outcome)
    assert [line.split(" could")[0] for line in outcome.failures] == [part]
    assert "(RuntimeError: out of luck)" in outcome.failures[0]
    folder = folder_of(run).path
    assert all((folder / name).exists() for name in left)
    again = train(prepare(run))
    assert isinstance(again, Outcome)
    assert not again.failures
    if part != "the picture curriculum.png":  # drawn without report.md, as the line says
        assert (folder / "report.md").exists()
        assert again.rouge


def test_a_finished_run_is_extended_under_the_schedules_of_the_new_number(finished):
    run, before = finished
    longer = replace(run, steps=7)
    session = prepare(longer)
    assert not folder_of(run).report.exists(), "a report of fewer steps would be taken for that of all"
    assert session.opening.startswith(f"The run in {folder_of(run).path} goes on after step 4 of 7.")
    train(session)
    records = read(folder_of(run).metrics)
    assert [record.step for record in steps_of(records)] == list(range(7))
    assert [record.step for record in validations_of(records)] == [0, 4, 7]
    assert records[: len(before.records)] == before.records
    rate = learning_rate(longer.optimizer, 7)
    found = [record.learning_rate for record in steps_of(records)][4:]
    assert found == pytest.approx([float(rate(step)) for step in (4, 5, 6)], rel=1e-6)
    assert "trained for 7 steps" in folder_of(run).report.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="steps: 7 saved, 5 asked for"):
        prepare(replace(run, steps=5))


def test_a_run_begins_from_another_runs_weights(finished, tmp_path):
    run, _ = finished
    source = str(folder_of(run).path)
    begun = replace(run, name="tuned", init_from=source, seed=9)
    session = prepare(begun)
    assert session.opening.startswith(
        f"A run of 4 steps begins in {folder_of(begun).path}, with the weights of {source}."
    )
    weights = prepare(replace(run, steps=7)).state.params
    chex.assert_trees_all_equal(session.state.params, weights)
    assert int(session.state.step) == 0
    chex.assert_trees_all_equal(session.state.optimizer, prepare(replace(run, name="fresh")).state.optimizer)
    train(session)
    assert prepare(begun).opening.startswith(f"The run in {folder_of(begun).path} is finished")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"model": replace(MODEL, width=32)},
            r"another model than this run's, .* there, .* here",
        ),
        ({"model": replace(MODEL, norm_eps=1e-3)}, "model.norm_eps is 1e-06 there, 0.001 asked for"),
        ({"init_from": "nowhere"}, "nowhere holds no run"),
    ],
)
def test_weights_that_do_not_fit_are_refused(finished, change, words):
    run, _ = finished
    begun = replace(run, name="other", **({"init_from": str(folder_of(run).path)} | change))
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        prepare(begun)


def test_a_config_of_an_older_version_lacks_options_and_still_resumes(finished):
    run, _ = finished
    config = folder_of(run).config
    saved = json.loads(config.read_text(encoding="utf-8"))
    del saved["init_from"], saved["data"]["unknown"]
    config.write_text(json.dumps(saved), encoding="utf-8")
    steps = json.loads(config.read_text(encoding="utf-8"))["steps"]
    # Finished, or prepared for seven steps by a test above: it is that run, not another.
    assert prepare(replace(run, steps=steps)).opening.startswith(f"The run in {folder_of(run).path} ")
