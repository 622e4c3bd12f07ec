"""A comparison from its file to its page, on recall text of rows of 32 bytes: stopped, resumed, repeated."""

import io
import itertools
import os
import signal
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import flax.nnx as nnx
import jax.numpy as jnp
import numpy as np
import pytest

from dynmask_jax import Tokens, mask_tensor
from train.checkpoint.load import load_model
from train.commands.table import run_command
from train.compare import worker
from train.compare.experiment import Trial, read_experiment
from train.compare.records import ArmRecord, Evidence
from train.compare.train_trial import train_trial
from train.compare.trials import Plan
from train.data.corpus import read_corpus
from train.data.recall import distances
from train.evaluate.recall import RecallScore, by_distance
from train.loop.training import NotFinite
from train.metrics import log
from train.step.curriculum import growth
from train.step.program import program_of

EXPERIMENT = """
name = "tiny"
arms = ["full", "static"]
steps = 12
contexts = [8]
points = 3
windows = 2
timed_steps = 2
learning_rates = [1e-2]

[recall]
documents = 24
held_out = 3
keys = 3

[options]
block = 8
model = { layers = 1, width = 16, heads = 2, kv_heads = 1, hidden = 16 }
data = { length = 32, batch = 2 }
curriculum = { start = 4, chunk = 8 }
evaluation = { rows = 4 }
watch = { peak_flops = 1e9 }
"""
FULL, STATIC = Trial("full", 1e-2, 12, 0), Trial("static", 1e-2, 12, 0)


def compare(path: Path, *options: str):
    run_command("compare", [str(path), "--evidence", "evidence", *options])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The evidence of an experiment that was stopped in its first run and given again; the
    steps done at each validation; what was printed."""
    folder, validated, printed = tmp_path_factory.mktemp("compare"), [], io.StringIO()
    path = folder / "tiny.toml"
    path.write_text(EXPERIMENT)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.chdir(folder)
        written = log.Log.validation

        def stop_at_the_second(self, done, *args, **options):
            written(self, done, *args, **options)
            validated.append(done)
            if validated == [0, 4]:
                os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(log.Log, "validation", stop_at_the_second)
        ticks = itertools.count()  # each step that is timed takes a second
        patch.setattr("train.compare.timing.perf_counter", lambda: float(next(ticks)))
        compare(path)
        assert not list(Path("evidence").glob("tiny.full*"))
        compare(path)
        compare(path)
    return folder, validated, printed.getvalue().splitlines()


@pytest.fixture
def evidence(finished, monkeypatch) -> Evidence:
    monkeypatch.chdir(finished[0])
    return Evidence(Path("evidence"), read_experiment(Path("tiny.toml")))


def record_of(evidence: Evidence, trial: Trial) -> ArmRecord:
    record = evidence.record(trial)
    assert record is not None
    return record


def test_it_goes_on_where_it_was_stopped(finished, evidence):
    _, validated, printed = finished
    said = [line for line in printed if "full.rate" in line and "have a record" in line]
    assert validated[:5] == [0, 4, 8, 12, 0]  # the first run, from its checkpoint on; and the next one
    assert len(said) == 2  # when it was stopped, and when it went on; the third time nothing is trained
    assert sum("Stopped; all that was trained is saved" in line for line in printed) == 1
    metrics = log.read(Path("runs/compare/tiny") / FULL.name / "metrics.jsonl")
    assert [record.steps_done for record in metrics if not hasattr(record, "positions")] == list(range(1, 13))
    assert record_of(evidence, FULL).curve.steps == [0, 4, 8, 12]


def test_every_arm_has_its_record_at_both_budgets(evidence):
    timing = evidence.timing()
    assert timing is not None
    assert timing.families == {"full": {32: 1.0}, "chunks": {8: 1.0, 32: 1.0}}
    assert "--model.layers 1" in timing.run
    assert "curriculum.chunk" not in timing.run
    # As steps take equally long, those of equal seconds are those of equal steps, and one run serves both.
    trials = Plan(evidence.experiment, timing).trials(evidence.record)
    assert [record_of(evidence, trial).trial for trial in trials] == [FULL, STATIC]
    text = (evidence.folder / "tiny.md").read_text()
    assert "## Equal steps" in text
    assert "## Equal seconds" in text
    assert "![tiny.loss.png](tiny.loss.png)" in text


def test_what_a_record_holds(evidence):
    full, static = record_of(evidence, FULL), record_of(evidence, STATIC)
    assert full.own is None
    assert full.exposure.mean == 1.0
    assert static.exposure.shown == [pytest.approx(static.exposure.mean, abs=1e-3)] * 12
    assert static.own is not None
    assert static.own.bits_per_byte != static.curve.bits_per_byte[-1]
    assert full.curve.bits_per_byte[0] == static.curve.bits_per_byte[0]  # the same weights and rows
    assert full.curve.bits_per_byte[-1] < full.curve.bits_per_byte[0]
    assert full.command.startswith("python -m train run --name full.rate-0.01.steps-12.seed-0 ")
    assert full.contexts["8"].bits_per_byte != full.curve.bits_per_byte[-1]
    assert set(full.positions) == {"0"}
    assert full.machine.versions.keys() >= {"jax", "dynmask_jax"}
    assert full.parameters > 0
    assert full.seconds_as_trained > 0


def test_accuracy_by_distance_is_that_of_the_predictions(evidence):
    """Row by row from the last weights' logits, answer by answer."""
    run = evidence.experiment.run_of(FULL)
    weights, tokenizer = load_model(Path(run.folder) / run.name)
    program, corpus = program_of(run, tokenizer.vocabulary), read_corpus(run, tokenizer)
    score = RecallScore(program, corpus)(weights.params)
    assert score == record_of(evidence, FULL).evaluators["recall"]
    model, answers = nnx.merge(program.graph, weights.params), {}
    for batch in corpus.held_out:
        plans = program.masks.plans(program.masks.full, program.masks.tokens(batch))
        likeliest = np.asarray(model.unembed(model(jnp.asarray(batch.inputs), plans)).argmax(axis=-1))
        found = distances(batch.inputs, batch.segments)
        for row, place in zip(*np.nonzero(found), strict=True):
            bucket = max(start for start in (2, 4, 8, 16) if start <= found[row, place])
            right = likeliest[row, place] == batch.targets[row, place]
            answers.setdefault(bucket, []).append(float(right))
    assert len(answers) > 2
    assert by_distance(score) == {bucket: pytest.approx(np.mean(each)) for bucket, each in answers.items()}
    assert score["accuracy/all"] == pytest.approx(np.mean([x for each in answers.values() for x in each]))


def test_recall_needs_its_text(evidence, tmp_path):
    run = evidence.experiment.run_of(FULL)
    (tmp_path / "words.txt").write_text("no keys here " * 40)
    other = replace(run, data=replace(run.data, paths=(str(tmp_path / "words.txt"),), held_out_paths=()))
    with pytest.raises(ValueError, match=r"evaluation\.recall: the held-out rows are no text of train"):
        RecallScore(program_of(other, 256), read_corpus(other))
    with pytest.raises(ValueError, match=r"evaluation\.recall needs the task lm and data\.tokenizer bytes"):
        replace(run, data=replace(run.data, tokenizer="x.json"))


def test_a_process_on_a_core_leaves_the_same_record(evidence, monkeypatch, capsys):
    """It finds the finished run in its folder, and measures it again."""
    before = record_of(evidence, STATIC)
    evidence.path(STATIC).unlink()
    command = worker.words(Path("tiny.toml"), evidence.folder, 1, STATIC)
    assert command[1:3] == ["-m", "train.compare.worker"]
    worker.main(command[3:])
    assert record_of(evidence, STATIC) == replace(before, core=1)
    capsys.readouterr()


def test_a_loss_that_is_not_finite_is_a_record(evidence, monkeypatch):
    def fail(session):
        raise NotFinite("steps 3 to 12 were not finite; the last good checkpoint is 0")

    monkeypatch.setattr("train.compare.train_trial.train", fail)
    record = train_trial(evidence.experiment, STATIC)
    assert record is not None
    assert record.failure == "steps 3 to 12 were not finite"
    assert np.isinf(record.loss)


def test_a_growth_can_show_any_window():
    run = read_experiment(Path(__file__).parent / "toy.toml").base
    by_step = growth(run, window=lambda clock: clock)
    assert [int(by_step.window(step)) for step in (3, 64)] == [3, 64]
    for window in (3, 7):
        tokens = Tokens(jnp.arange(8), jnp.ones(8, jnp.int32))
        shown = np.asarray(mask_tensor(by_step.mask(jnp.int32(window)), tokens))
        q, k = np.indices((8, 8))
        np.testing.assert_array_equal(shown, (k <= q) & (q // window == k // window))
