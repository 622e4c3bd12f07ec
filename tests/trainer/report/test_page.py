"""The report and the summary of runs of every kind, and the command line that they name."""

import math
import re
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import tyro
from train_cases import MODEL, records_of, small_run, steps_of

from train.config.command_line import command
from train.config.operation import Evaluation, Watch
from train.config.run import Run
from train.config.sections import Curriculum, Data, Model, Summarize
from train.data.batch import Batch
from train.metrics.mfu import Peak
from train.metrics.record import SummariesRecord
from train.report.outcome import Outcome
from train.report.page import Facts, write
from train.step.curriculum import growth
from train.step.trainable import WeightCounts


def held_out() -> list[Batch]:
    """Two batches of two rows, the last row of which is padding."""
    leaf = np.zeros((2, 4), np.int32)
    full = Batch(leaf, leaf, leaf.astype(np.float32), leaf, leaf + 1, leaf, leaf)
    return [full, replace(full, segments=np.array([[1, 1, 0, 0], [0, 0, 0, 0]]))]


@dataclass(frozen=True)
class Corpus:
    """The fields of `train.data.corpus.Corpus` that a report reads."""

    documents: int = 1_234
    size: int = 56_789
    tokens: int = 23_456
    malformed: int = 3
    truncated: int = 7
    unknown: float = 0.0
    bytes_per_token: float = 2.5
    held_out: list[Batch] = field(default_factory=held_out)


def reported(folder: Path, run: Run, records) -> str:
    """The report as it is in the folder."""
    facts = Facts(run, Corpus(), growth(run), WeightCounts(119_104, 1_234, 9_900), Peak(2e12, "a test"))
    write(folder, facts, Outcome(records, compilations=1))
    text = (folder / "report.md").read_text()
    for picture in re.findall(r"!\[.*\]\((.*)\)", text):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    return text


def rows(text: str, title: str) -> list[list[str]]:
    """The table of a section, without its line of dashes."""
    part = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


def test_a_report_says_what_a_run_was_and_came_to(tmp_path):
    run = small_run(tmp_path, steps=20, curriculum=Curriculum(start=4, share=0.5))
    text = reported(tmp_path, run, records_of(run, every=5, bytes_per_token=2.5))
    assert text.startswith(
        "# small\n\nA language model, of 119,104 weights in 1 layer of width 16, trained for "
    )
    # 20 steps of 64 tokens, a quarter of them padding.
    assert "trained for 20 steps on rows of 32 tokens, about 960 tokens in all." in text
    assert "Chunks grew from 4 to 32 tokens (exponential), over the first 50% of the steps." in text
    assert "1,234 of 119,104 weights (1.04%) train; the optimizer's state takes 9.9 kB." in text
    assert "skipped" not in text
    last, nats = 2 + 6 * math.exp(-4), 2.5 * math.log(2)  # nats a token for each bit per byte
    assert rows(text, "Result")[1:] == [
        ["first", "0", "8.000", f"{8 * math.log(2) * 2.5:.4f}"],
        ["last", "20", f"{last:.3f}", f"{last * math.log(2) * 2.5:.4f}"],
    ]
    assert rows(text, "Use of context")[1:] == [
        [start, f"{8 * share * nats:.3f}", f"{last * share * nats:.3f}"]
        for start, share in (("0", 1.25), ("64", 1.0), ("128", 0.75))
    ]
    assert rows(text, "Time")[:3] == [
        ["medians", "at the start", "at the end"],
        ["window, tokens", "4", "32"],
        ["seconds a step", "0.6250", "1.5000"],  # the first, of 9 seconds, compiled
    ]
    assert "42% of the time of one at the end" in text
    assert "against 2e+12 operations a second (a test)" in text
    data = dict(rows(text, "Data")[1:])
    assert (data["documents"], data["tokens"], data["padding in batches"]) == ("1,234", "23,456", "25.00%")
    assert (data["rows held out for validation"], data["files and records left out"]) == ("3", "3")
    assert ["`model.width`", "`16`", "`256`"] in rows(text, "Config")
    assert not any(name == "`model.rope_theta`" for name, *_ in rows(text, "Config"))
    assert f"python -m train generate {tmp_path} --prompt" in text
    assert "documents cut to fit their row" not in data
    for name in ("Needles", "Summaries"):
        assert f"## {name}" not in text


def test_a_report_has_the_probe_and_the_summaries_where_they_are(tmp_path):
    options = Summarize(truncate=True)
    run = small_run(tmp_path, task="summarize", data=Data(length=32, batch=2), summarize=options)
    scores = {"model": {"rouge1": 31.25, "rougeL": 20.0}, "lead": {"rouge1": 28.5, "rougeL": 18.0}}
    records = [*records_of(run, needles=True), SummariesRecord(8, scores)]
    needle = {**records[-2].evaluators["needle"], "gain/0.0": None}  # was not finite
    records[-2] = replace(records[-2], evaluators={"needle": needle, "recall": {"share": 0.5}})
    text = reported(tmp_path, run, records)
    assert rows(text, "Needles")[1:] == [["0%", "25%", "25%", "–"], ["100%", "75%", "75%", "+1.000"]]
    assert rows(text, "Other evaluators")[1:] == [["recall share", "–", "0.5"]]
    assert ["documents cut to fit their row", "7"] in rows(text, "Data")
    assert rows(text, "Summaries")[1:] == [["model", "31.25", "20.00"], ["lead", "28.50", "18.00"]]
    assert f"python -m train summarize FILE --run {tmp_path}" in text
    assert "A model that summarises, of" in text


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 1},
        {"curriculum": Curriculum(kind="full")},
        {"curriculum": Curriculum(kind="static", chunk=8)},
        {"curriculum": Curriculum(kind="reveal", chunk=8, start=4)},
        {"curriculum": Curriculum(kind="window", pace="loss", start=4, stages=2, patience=1)}
        | {"evaluation": Evaluation(every=4)},
        {"model": Model(layers=2, pattern=("local", "global"), local_window=8)},
    ],
)
def test_every_kind_of_run_has_a_report(tmp_path, options):
    run = small_run(tmp_path, **options)
    text = reported(tmp_path, run, records_of(run))
    assert {"nan", "inf", "None"} & set(re.findall(r"\w+", text.split("## Config")[0])) == set()
    assert str(Outcome(records_of(run), 1))


def test_a_run_that_always_shows_the_same_has_one_speed(tmp_path):
    run = small_run(tmp_path, curriculum=Curriculum(kind="full"))
    text = reported(tmp_path, run, records_of(run))
    assert rows(text, "Time")[1] == ["window, tokens", "32"]
    assert "A step at the start" not in text


def test_records_of_some_steps_stand_for_the_others(tmp_path):
    run = small_run(tmp_path, steps=21)
    all_steps, some = records_of(run), records_of(run, log_every=10)
    all_steps, some = ([replace(r, seconds=60.0) for r in steps_of(records)] for records in (all_steps, some))
    text = reported(tmp_path, run, some)
    assert "The steps took 0:21:00 in all" in text
    assert "about 1,008 tokens in all" in text  # 21 · 64 · 3/4
    assert "The steps took 0:21:00 in all" in reported(tmp_path, run, all_steps)


def test_skipped_steps_and_losses_that_are_not_finite_are_told(tmp_path):
    run = small_run(tmp_path)
    records = records_of(run, every=4)
    records[-2] = replace(records[-2], loss=None, bits_per_byte=None, gradient_norm=None, skipped=5)
    records[-1] = replace(records[-1], loss=None, bits_per_byte=None)
    text = reported(tmp_path, run, records)
    assert "**5 steps were skipped**" in text
    assert [row[0] for row in rows(text, "Result")[1:]] == ["first", "best", "last"]
    assert rows(text, "Result")[-1][2:] == ["not finite", "not finite"]


def test_without_validations_or_steps_there_is_still_a_report(tmp_path):
    run = small_run(tmp_path)
    steps = steps_of(records_of(run))
    text = reported(tmp_path, run, steps)
    assert "## Use of context" not in text
    assert "curriculum.png" in text
    assert "positions.png" not in text
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    assert "# small" in reported(nothing, run, [])
    assert [path.name for path in nothing.iterdir()] == ["report.md"]
    assert str(Outcome([], 0))


def test_the_summary_is_a_table(tmp_path):
    run = small_run(tmp_path, steps=20, curriculum=Curriculum(start=4, share=0.5))
    lines = [line.split() for line in str(Outcome(records_of(run), 1)).splitlines()]
    assert lines[1][-2:] == ["8.000", "2.110"]
    assert lines[2][-1] == "100.0%"
    assert lines[4][-2:] == ["4", "32"]
    assert lines[5][-2:] == ["0.625", "1.500"]
    assert lines[6][-1] == "1"
    assert lines[8][-2:] == ["12.5%", "12.5%"]


def test_a_step_after_a_resumption_is_not_timed(tmp_path):
    run = small_run(tmp_path, curriculum=Curriculum(kind="full"))
    records = records_of(run)
    records[5] = replace(records[5], seconds=99.0, tokens_per_second=None, mfu=None)
    first, full = Outcome(records, 1).speeds()
    assert first.seconds == full.seconds == 1.5
    assert full.mfu == 0.125


@pytest.mark.parametrize(
    "run",
    [
        Run(),
        Run(name="a name", steps=3, model=MODEL),
        Run(
            data=Data(paths=("a.txt", "with space"), columns={"text": "body"}, skip_malformed=True, cache="c")
        ),
        Run(model=Model(layers=2, pattern=("local", "global"), dtype="bfloat16", backend="xla")),
        Run(task="summarize", summarize=Summarize(truncate=True, lead=30), watch=Watch(peak_flops=1e12)),
        Run(curriculum=Curriculum(kind="reveal", end=512, pace="loss"), evaluation=Evaluation(every=2)),
    ],
)
def test_the_command_is_that_of_the_run(run):
    program, *rest = shlex.split(command(run))
    assert (program, rest[:3]) == ("python", ["-m", "train", "run"])
    assert tyro.cli(Run, default=Run(), args=rest[3:]) == run
