"""From records to tables: the toy records beside this file, whose results are worked out by hand."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from train.commands.compare import write_page
from train.commands.table import run_command
from train.compare.experiment import Trial, experiment_of, read_experiment
from train.compare.machine import Machine
from train.compare.outcome import Results
from train.compare.records import ArmRecord, Curve, Evidence, Restricted
from train.compare.tables import page
from train.compare.timing import Timing, check_run, family, lacking, read_timing
from train.compare.trials import Plan, learning_rate

HERE = Path(__file__).parent
TOY = Evidence(HERE / "toy", read_experiment(HERE / "toy.toml"))
MACHINE = Machine("a processor", "cpu (cpu)", "a system", {"jax": "1.0"})


@pytest.fixture(scope="module")
def toy() -> Results:
    timing = TOY.timing()
    assert timing is not None
    return Results(Plan(TOY.experiment, timing), TOY.record)


def row(text: str, arm: str, section: str) -> list[str]:
    """The cells of an arm's first row in a section of the page."""
    part = text.partition(f"\n## {section}")[2]
    line = next(line for line in part.splitlines() if line.startswith(f"| `{arm}`"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_seconds_are_the_sum_of_steps(toy):
    """A step takes 1 s in chunks of 8 and 2 s at the full mask of 64."""
    run, timing = toy.plan.run("static-then-full", 10), toy.plan.timing
    assert timing.seconds(run, (0, 5, 7.5, 10)).tolist() == [0, 5, 10, 15]
    growing = replace(run, curriculum=replace(run.curriculum, kind="chunks", schedule="linear", start=8))
    # Windows 8, 19, 30, 41, 52 and five times 64: between 8 and 64 tokens a step's time is on the line.
    assert timing.seconds(growing)[0] == pytest.approx(
        sum(1 + (w - 8) / 56 for w in (8, 19, 30, 41, 52)) + 10
    )


def test_steps_are_fitted_to_the_seconds_of_the_reference(toy):
    assert toy.plan.steps("static-then-full", "steps") == 10
    assert toy.plan.steps("static-then-full", "seconds") == 13  # 6 + 7 · 2 = 20 s, and 14 steps take 21
    assert toy.plan.steps("full", "seconds") == 10


def test_every_run_is_there_once_and_in_order(toy):
    names = [(trial.arm, trial.steps, trial.seed) for trial in toy.plan.trials(TOY.record)]
    arms = [("full", 10), ("static-then-full", 10), ("static-then-full", 13)]
    assert names == [(*arm, seed) for seed in (0, 1) for arm in arms]


def test_times_of_another_run_are_refused(toy):
    check_run(TOY.experiment, toy.plan.timing)  # of a file that does not say
    timing = replace(toy.plan.timing, run="python -m train run --model.layers 1")
    with pytest.raises(ValueError, match=r"remove toy\.timing\.json\. They were of .* --model\.layers 1; it"):
        check_run(TOY.experiment, timing)


def test_the_tables(toy):
    text = page(toy, "toy.toml", ["toy.loss.png"])
    assert "6 of the 6 runs" in text
    assert "python -m train compare toy.toml" in text
    assert "![toy.loss.png](toy.loss.png)" in text
    assert row(text, "full", "Equal steps")[1:5] == ["10", "20.0", "2", "2.500 (2.000…3.000)"]
    equal = row(text, "static-then-full", "Equal seconds")
    assert equal[1:5] == ["13", "20.0", "2, 1 failed", "1.250"]
    # Seed 0: the losses 6, 4, 3 and 2 of full, at 5, 10, 15 and 20 s, come at 2, 4, 5 and 11.67 s. Seed 1: 6
    # and 4 at 5 and 15 s, 3.5 and 3 never.
    speeds = row(text, "static-then-full", "Seconds to")
    assert speeds == [
        "steps",
        "0.70 (0.40…1.00)",
        "0.95 (0.40…1.50)",
        "0.33, 1 of 2 seeds",
        "0.58, 1 of 2 seeds",
    ]
    assert row(text, "full", "Retrieval") == ["steps", "100% (100%…100%)", "38% (25%…50%)"]
    assert row(text, "full", "What distant") == ["steps", "+0.2500 (+0.2500…+0.2500)"]
    # Half of a step goes with the smallest window, and 40% is hidden: 20%; 15 of 20 s; 24 and 27 of 30.
    cost = ["20.0% (20.0%…20.0%)", "25.0%", "15.0% (10.0%…20.0%)"]
    assert row(text, "static-then-full", "Cost") == cost
    assert "one process a core, on core 1" in text
    assert "Load average when they were measured: 1.0, with this process." in text


def test_page_and_pictures_by_the_command(tmp_path, capsys):
    shutil.copytree(HERE / "toy", tmp_path / "toy")
    options = ["--evidence", str(tmp_path / "toy"), "--report"]
    run_command("compare", [str(HERE / "toy.toml"), *options])
    assert "The page is" in capsys.readouterr().out
    text = (tmp_path / "toy" / "toy.md").read_text()
    for kind in ("loss", "context", "retrieval", "exposure"):
        picture = (tmp_path / "toy" / f"toy.{kind}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert f"![toy.{kind}.png]" in text


def test_part_of_the_records_is_a_page_too(tmp_path):
    evidence = Evidence(tmp_path, TOY.experiment)
    shutil.copy(TOY.timing_path, tmp_path)
    timing = read_timing(evidence.timing_path)
    plan = Plan(TOY.experiment, timing)
    assert "0 of the 6 runs" in write_page(HERE / "toy.toml", evidence, plan).read_text()
    trial = Trial("static-then-full", 0.002, 10, 0)
    shutil.copy(TOY.path(trial), tmp_path)
    text = write_page(HERE / "toy.toml", evidence, plan).read_text()
    assert "1 of the 6 runs" in text
    assert "Seconds to the reference" not in text


def test_a_record_of_another_run_is_refused(tmp_path):
    shutil.copytree(TOY.folder, tmp_path / "toy")
    trial = Trial("full", 0.002, 10, 0)
    other = replace(TOY.experiment, options={**TOY.experiment.options, "model": {"layers": 2}})
    with pytest.raises(ValueError, match=r"seed-0.json is of another run .*--model\.layers 2"):
        Evidence(tmp_path / "toy", other).record(trial)
    path = Evidence(tmp_path / "toy", TOY.experiment).path(trial)
    path.write_text(json.dumps({"trial": {}}))
    with pytest.raises(ValueError, match=r"seed-0.json: it is no record of an arm"):
        Evidence(tmp_path / "toy", TOY.experiment).record(trial)


def test_times_that_are_missing_are_named():
    runs = experiment_of({"name": "x", "arms": ["full", "reveal-oldest", "window-linear"], "steps": 9})
    full = Timing({"full": {4096: 2.0}, "window": {64: 1.0, 4096: 2.0}}, MACHINE)
    assert lacking(runs, None) == ["full", "reveal-oldest-256", "window"]
    assert lacking(runs, full) == ["reveal-oldest-256", "window"]  # the windows grow from 32
    assert family(runs.arm("reveal-oldest").apply(runs.base).curriculum) == "reveal-oldest-256"


def test_each_arm_has_the_best_learning_rate_of_the_grid():
    """By the loss at the full mask, but of a static arm by that under its own."""
    asked = experiment_of(
        {"name": "x", "arms": ["full", "static"], "steps": 9, "learning_rates": [0.1, 0.2, 0.3]}
    )
    full, own = {0.1: 3.0, 0.2: 2.0, 0.3: None}, {0.1: 1.0, 0.2: 1.5, 0.3: 1.25}
    made = {}

    def end(arm: str, rate: float):
        trial = Trial(arm, rate, 9, 0)
        curve = Curve([0, 9], [8.0, full[rate]], [5.0, 5.0])
        static = Restricted(own[rate], {}) if arm == "static" else None
        made[trial] = ArmRecord("x", trial, "", MACHINE, None, curve=curve, own=static)

    times = {"full": {4096: 2.0}, "chunks": {256: 1.0, 4096: 2.0}}
    plan = Plan(asked, Timing(times, MACHINE))
    assert [trial.learning_rate for trial in plan.trials(made.get)] == [0.1, 0.2, 0.3] * 2
    for rate in full:
        end("full", rate)
    assert learning_rate(asked, "full", made.get) == 0.2
    assert learning_rate(asked, "static", made.get) is None
    for rate in own:
        end("static", rate)
    assert learning_rate(asked, "static", made.get) == 0.1
    # The run that chose the rate is the main run at equal steps; static has 18 steps of half the time.
    last = list(plan.trials(made.get))[6:]
    assert last == [Trial("static", 0.1, 18, 0)]
    full.update(dict.fromkeys(full))
    for rate in full:
        end("full", rate)
    with pytest.raises(ValueError, match="none of the grid gives the arm full a finite loss"):
        learning_rate(asked, "full", made.get)
    assert np.isinf(made[Trial("full", 0.1, 9, 0)].loss)
