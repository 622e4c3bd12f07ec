"""The experiment of context extension at a toy size, and that the docs show the results that are there."""

import json
from pathlib import Path

import pytest
from train_cases import write_text

from benchmarks.extension import ARMS, Experiment, main, mean_seconds, measure
from benchmarks.extension_page import section

DOCS = Path(__file__).parents[2] / "docs"
MODEL = "--model.layers 1 --model.width 16 --model.heads 2 --model.kv-heads 1 --model.hidden 16"


def test_the_experiment_at_a_toy_size(tmp_path, capsys):
    text = ("--data.paths", str(write_text(tmp_path)))
    folder, kept = str(tmp_path / "runs"), []
    toy = Experiment(
        folder,
        text,
        tuple(MODEL.split()),
        32,
        128,
        base_steps=2,
        budget=0.0,
        rows=1,
        scalings=("yarn",),
    )
    results = measure(toy, lambda found: kept.append(len(json.dumps(found))))
    assert kept == sorted(kept)
    assert results["step_seconds"]["windows"][0] == 32
    assert results["step_seconds"]["windows"][-1] == 128
    growing, full = (results["arms"][name] for name in ARMS)
    assert growing["before"] == full["before"]  # the same model, before training
    assert growing["steps"] == full["steps"] == 1
    assert growing["learning_rate"] == pytest.approx(5e-4)  # a tenth of the preset demo's
    scalings = results["scalings"]
    assert scalings["yarn"]["loss"] == pytest.approx(growing["before"]["validation_loss"], rel=1e-5)
    saved = tmp_path / "found.json"
    saved.write_text(json.dumps(results))
    main(["--table", "--json", str(saved), "--picture", str(tmp_path / "found.png")])
    assert section(results) in capsys.readouterr().out
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


def test_equal_seconds_are_fewer_steps_of_the_full_mask():
    times = {"places": [0.0, 0.5, 1.0], "seconds": [1.0, 2.0, 4.0], "share": 0.5}
    assert mean_seconds("full", times) == 4.0
    assert mean_seconds("growing", times) == pytest.approx(0.5 * 2.25 + 0.5 * 4.0, rel=1e-3)


def test_the_docs_show_the_results_that_are_there():
    results = json.loads((DOCS / "extension.json").read_text(encoding="utf-8"))
    assert section(results) in (DOCS / "extension.md").read_text(encoding="utf-8")
