"""Experiments: what their files say, what all arms share, and what is refused, by name."""

import dataclasses
import json
from pathlib import Path

import pytest

from train.compare.arms import ARMS
from train.compare.experiment import Trial, experiment_of, read_experiment
from train.config.run import option_values
from train.step.curriculum import growth

HERE = Path(__file__).parent
EVIDENCE = Path(__file__).parents[3] / "docs" / "evidence"
SMALL = {"name": "small", "arms": ["full", "static"], "steps": 10}
OPTIONS = {"data": {"length": 64}, "curriculum": {"start": 4, "chunk": 8, "share": 0.5}}


def experiment(**entries):
    return experiment_of({**SMALL, "options": OPTIONS, "contexts": [16], **entries})


def windows(run) -> list[int]:
    """What a run shows at each step."""
    return [int(growth(run).window(step)) for step in range(run.steps)]


def test_arms_differ_in_the_curriculum_alone():
    asked = experiment(arms=list(ARMS), seeds=[3])
    runs = {name: asked.run_of(Trial(name, 1e-3, 10, 3)) for name in ARMS}
    values = {name: option_values(run) for name, run in runs.items()}
    differ = {
        option for option, value in values["full"].items() if any(v[option] != value for v in values.values())
    }
    assert {option.split(".")[0] for option in differ} == {"curriculum", "name"}
    assert len({json.dumps(dataclasses.asdict(run.curriculum)) for run in runs.values()}) == len(ARMS)
    assert values["full"]["optimizer.learning_rate"] == 1e-3
    assert values["full"]["seed"] == 3


def test_what_the_arms_show():
    asked = experiment(arms=["full", "static", "static-then-full", "window-linear", "chunks-staircase"])
    shown = {arm.name: windows(asked.run_of(Trial(arm.name, 1e-3, 10, 0))) for arm in asked.arms}
    assert shown["full"] == [64] * 10
    assert shown["static"] == [8] * 10
    assert shown["static-then-full"] == [8] * 5 + [64] * 5
    assert shown["window-linear"] == [4, 16, 28, 40, 52] + [64] * 5
    assert shown["chunks-staircase"] == [4, 11, 26, 34, 49] + [64] * 5
    assert asked.run_of(Trial("window-linear", 1e-3, 10, 0)).curriculum.kind == "window"


def test_an_arm_of_its_own():
    late = {"name": "late", "like": "static-then-full", "curriculum": {"share": 0.8, "chunk": 16}}
    asked = experiment(arms=["full", late])
    assert windows(asked.run_of(Trial("late", 1e-3, 10, 0))) == [16] * 8 + [64] * 2


def test_all_seeds_share_what_is_held_out():
    asked = experiment(seeds=[1, 2])
    runs = [asked.run_of(Trial("full", 1e-3, 10, seed)) for seed in (1, 2)]
    assert [(run.seed, run.held_out_seed) for run in runs] == [(1, 0), (2, 0)]


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"arms": ["full"]}, "arms must be two or more, to be compared, got full"),
        ({"arms": ["full", "grow"]}, "there is no arm 'grow'; the arms are full, static, "),
        ({"arms": ["full", "full"]}, "arms must differ from each other"),
        ({"arms": ["full", 3]}, "an arm is a name or a table with a name, got 3"),
        ({"arms": ["full", {"name": "A b", "like": "full"}]}, "small letters, digits and hyphens"),
        ({"arms": ["full", {"name": "x", "like": "full", "steps": 5}]}, "x may not change steps"),
        ({"arms": ["full", {"name": "x", "like": "full", "data": {}}]}, "x may not change data"),
        ({"arms": ["full", {"name": "x", "like": "full", "lora": {"rank": 2}}]}, "x may not change lora"),
        (
            {"arms": ["full", {"name": "x", "like": "full", "model": {"layers": 1}}]},
            "x may not change model.layers, but of model only rope_theta",
        ),
        (
            {"arms": ["full", {"name": "x", "like": "full", "optimizer": {"accumulate": 2}}]},
            "x may not change optimizer.accumulate, but of optimizer only warmup",
        ),
        (
            {"arms": ["full", {"name": "x", "like": "full", "optimizer": {"learning_rate": 1.0}}]},
            "x may not change optimizer.learning_rate",
        ),
        (
            {"arms": ["full", {"name": "x", "like": "static", "curriculum": {"chunks": 2}}]},
            "x: Curriculum has no option 'chunks'",
        ),
        (
            {"arms": ["full", {"name": "x", "like": "chunks-linear", "curriculum": {"start": 99}}]},
            "x: curriculum.start and end must not exceed data.length",
        ),
        ({"reference": "static-then-full"}, "reference must be one of the arms full, static"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"budgets": ["tokens"]}, "budgets must be of 'steps' and 'seconds', got 'tokens'"),
        ({"seeds": []}, "seeds, learning_rates and budgets must not be empty"),
        ({"contexts": [64]}, "contexts must lie in 1…63"),
        ({"preset": "lm-9k"}, "preset must be one of run, demo"),
        ({"preset": "extend"}, "preset must not be extend"),
        ({"options": {"task": "summarize"}}, "options.task must be lm"),
        ({"options": {"data": {"len": 3}}}, "Data has no option 'len'"),
        ({"recall": {"keys": 99}}, "recall.keys must be at most 63, got 99"),
        ({"name": "a.b"}, "name must be a file's name without dots"),
        ({"epochs": 3}, "unknown entry 'epochs'; the entries are arms, budgets"),
    ],
)
def test_what_is_refused(entries, words):
    with pytest.raises(ValueError, match=words.replace("…", ".").replace("(", r"\(")):
        experiment(**entries)


def test_the_file_is_named_in_the_refusal(tmp_path):
    for name, text, words in (
        ("a.toml", "name = 3 4", "a.toml: "),
        ("b.json", '{"name": "b", "arms": []}', "b.json: it has no steps"),
        ("c.json", "[]", "c.json: an experiment is a table, got list"),
        ("d.toml", 'name = "d"\narms = ["full", "static"]\nsteps = "9"', "d.toml: an entry has a value"),
        ("e.toml", 'name = "e"\narms = ["full", "static"]\nsteps = 9\nseeds = 0', "e.toml: an entry has a"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=words):
            read_experiment(tmp_path / name)


@pytest.mark.parametrize("path", sorted(EVIDENCE.glob("*.toml")), ids=lambda path: path.stem)
def test_the_experiments_of_the_docs_are_valid(path):
    asked = read_experiment(path)
    assert asked.name == path.stem
    assert len(asked.seeds) >= 1
    for arm in asked.arms:
        asked.run_of(Trial(arm.name, asked.learning_rates[0], asked.steps, asked.seeds[0]))
