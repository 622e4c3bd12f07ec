"""The command line, from the words that are typed to the folder that is left."""

import subprocess
import sys
from pathlib import Path

import pytest
from train_cases import write_text

from train.cli import is_command, main, parse
from train.commands.table import COMMANDS
from train.config.presets import PRESETS, demo, lm_8k
from train.config.run import Run, from_json
from train.loop import training

TINY = [
    "--steps=3",
    "--block=8",
    "--evaluation.rows=1",
    "--model.layers=1",
    "--model.width=16",
    "--model.hidden=16",
    "--data.length=32",
    "--curriculum.start=4",
]


def test_a_preset_and_a_difference():
    command = parse(["demo", "--model.layers", "5", "--curriculum.kind", "window", "--overwrite"])
    assert (command.run.model.layers, command.run.curriculum.kind) == (5, "window")
    assert command.run.steps == demo().steps
    assert command.overwrite


def test_options_of_every_kind():
    words = (
        "--data.columns document article summary highlights --model.pattern local global --watch.profile 3"
    )
    command = parse(["lm-8k", *words.split(), "--data.no-skip-malformed", "--optimizer.ema", "None"])
    assert command.run.data.columns == {"document": "article", "summary": "highlights"}
    assert command.run.model.pattern == ("local", "global")
    assert (command.run.watch.profile, command.run.optimizer.ema) == (3, None)
    assert command.run.steps == lm_8k().steps


def test_options_alone_are_those_of_run():
    command = parse(["--data.paths", "a.txt", "b", "--model.kv-heads", "1"])
    assert command.run.data.paths == ("a.txt", "b")
    assert (command.run.name, command.run.model.kv_heads, command.overwrite) == ("run", 1, False)


@pytest.mark.parametrize(
    "typed", [["--model.layer", "3"], ["--model.layer=3"], ["--steps", "3", "--model.layer"]]
)
def test_an_unknown_option_lists_the_valid_ones(typed, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["run", "--data.paths", "nowhere.txt", *typed])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "unknown option --model.layer (did you mean --model.layers?); the options are --name, " in said
    for option in ("--model.kv-heads", "--data.paths", "--curriculum.kind", "--overwrite", "--print-config"):
        assert option in said


def test_a_stray_word_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["run", "--data.paths", "nowhere.txt", "--steps", "3", "fast"])
    assert stopped.value.code == 2
    assert "unknown option fast" in capsys.readouterr().err


def test_an_unknown_preset_lists_the_valid_ones(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["demmo"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "unknown preset or command 'demmo'; the presets are run, demo, lm-8k, lm-32k, lm-128k" in said
    assert "the commands are generate, summarize, evaluate, export, tokenizer, compare, compile" in said


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--model.layers", "0"], "model.layers must be at least 1, got 0"),
        (["--curriculum.kind", "windows"], "windows"),
        (["--data.paths", "nowhere.txt"], "data.paths: nowhere.txt does not exist"),
        (["--steps", "many"], "many"),
        (["--task", "summarize"], "data.paths: summarize needs pairs of document and summary"),
        (
            ["--task", "summarize", "--data.rows", "chunked"],
            "data.rows must be packed for the task summarize",
        ),
        (["--evaluation.summaries", "3"], "evaluation.summaries needs the task summarize, got 'lm'"),
        (["--data.tokenizer", "nowhere.json"], "nowhere.json"),
        (["--watch.wandb", "p", "--steps", "3"], "watch.wandb names the project 'p', but Weights & Biases"),
    ],
)
def test_a_value_that_is_refused_stops_with_status_2(typed, words, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main(["run", "--folder", str(tmp_path), *typed])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert words in captured.err + captured.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("typed", [[], ["--help"], ["-h"]])
def test_help_names_presets_and_commands(typed, capsys):
    main(typed)
    said = capsys.readouterr().out
    for name in (*PRESETS, *COMMANDS):
        assert f"python -m train {name} " in said


@pytest.mark.parametrize("name", PRESETS)
def test_help_of_a_preset_says_what_it_needs_and_explains_the_options(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse([name, "--help"])
    assert stopped.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for words in ("Needs: ", "Expect: ", "--curriculum.share", "Share of the steps over which it grows"):
        assert words in said


def test_summarize_is_a_command_before_a_files_name_and_else_a_preset():
    assert is_command(["summarize", "report.txt", "--run", "runs/x"])
    assert not is_command(["summarize", "--data.paths", "pairs.jsonl"])
    assert not is_command(["summarize"])
    assert is_command(["generate"])
    assert not is_command(["demo", "x"])
    assert parse(["summarize", "--data.paths", "pairs.jsonl"]).run.task == "summarize"


def test_print_config_prints_what_would_be_trained_and_trains_nothing(tmp_path, capsys):
    main(["lm-32k", "--folder", str(tmp_path), "--steps", "7", "--print-config"])
    run = from_json(capsys.readouterr().out)
    assert isinstance(run, Run)
    assert (run.name, run.steps, run.data.length) == ("lm-32k", 7, 32_768)
    assert not list(tmp_path.iterdir())


def test_from_the_command_line_to_a_finished_folder_and_its_weights(tmp_path, capsys):
    text = write_text(tmp_path)
    command = ["run", *TINY, "--folder", str(tmp_path), "--name", "first", "--data.paths", str(text)]
    main(command)
    folder = Path(tmp_path, "first")
    files = ["checkpoint", "config.json", "curriculum.png", "metrics.jsonl", "positions.png", "report.md"]
    assert sorted(path.name for path in folder.iterdir()) == [*files, "tensorboard"]
    said = capsys.readouterr()
    assert "A run of 3 steps begins in" in said.out
    assert "compilations of the train step" in said.out
    assert f"All files of the run are in {folder}" in said.out

    main(command)
    assert (
        "is finished, all its 3 steps; more --steps extend it, --overwrite begins it anew"
        in capsys.readouterr().out
    )
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--steps", "2"])
    assert stopped.value.code == 2
    assert "another config: steps: 3 saved, 2 asked for" in capsys.readouterr().err

    main(["export", str(folder), "--to", str(tmp_path / "w.safetensors")])
    for model in (folder, tmp_path / "w.safetensors"):
        main(["generate", str(model), "--prompt", "mask key", "--tokens", "4"])
    first, second = capsys.readouterr().out.split("> mask key\n")[1:]
    assert first == second


def test_lines_that_were_left_out_are_named(tmp_path, capsys):
    text = write_text(tmp_path).read_text()
    (tmp_path / "a.jsonl").write_text(f'{{"text": "{text[:2000]}"}}\nnot json\n')
    command = ["run", *TINY, "--folder", str(tmp_path), "--data.paths", str(tmp_path / "a.jsonl")]
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 2
    assert "a.jsonl, line 2" in capsys.readouterr().err
    main([*command, "--data.skip-malformed"])
    assert "Left out: 1\n" in (said := capsys.readouterr().out)
    assert "a.jsonl, line 2: it is not JSON" in said


def test_of_two_that_begin_a_run_at_once_the_slower_says_why_it_stops(tmp_path, capsys, monkeypatch):
    command = ["run", *TINY, "--folder", str(tmp_path), "--data.paths", str(write_text(tmp_path))]

    def train(session):
        with session.folder.lock():  # by the quicker one
            training.train(session)

    monkeypatch.setattr("train.cli.train", train)
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 1
    assert "is in use: another process trains in it" in capsys.readouterr().err


def test_a_run_that_stops_for_good_says_why_with_status_1(tmp_path, capsys):
    command = ["run", *TINY, "--folder", str(tmp_path), "--data.paths", str(write_text(tmp_path))]
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--steps=9", "--optimizer.learning-rate=1e38", "--optimizer.give-up=2"])
    assert stopped.value.code == 1
    assert "was not finite" in capsys.readouterr().err


def started(lacking: str, *arguments: str, platform: str = sys.platform) -> tuple[int, str]:
    """Status and stderr of `python -m train` on a machine that lacks a module."""
    code = (
        f"import runpy, sys; sys.modules[{lacking!r}] = None; sys.platform = {platform!r}; "
        f"sys.argv = {['train', *arguments]!r}; runpy.run_module('train', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == ""
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("lacking", "typed"), [("tyro", ["--help"]), ("jax", []), ("optax", ["demo", "--steps", "1"])]
)
def test_without_the_trainers_libraries_one_line_says_what_to_install(lacking, typed):
    assert started(lacking, *typed) == (
        2,
        f"python -m train: the trainer needs the library {lacking}, which is not installed: "
        'pip install -e ".[train]" in the checkout installs all that it needs\n',
    )


@pytest.mark.parametrize("typed", [["--help"], ["demo"]])
def test_on_windows_one_line_says_what_the_trainer_lacks(typed):
    status, said = started("fcntl", *typed, platform="win32")
    assert status == 2
    assert said.startswith(
        "python -m train: the trainer needs file locks and signals that Windows lacks (fcntl"
    )
    assert said.count("\n") == 1
