"""The command line, from the words that are typed to the folder that is left."""

from pathlib import Path

import pytest
from train_cases import write_text

from train.__main__ import main, parse
from train.presets import demo

TINY = [
    "--steps=3",
    "--block=8",
    "--evaluate-rows=1",
    "--model.layers=1",
    "--model.width=16",
    "--model.hidden=16",
    "--data.length=32",
    "--curriculum.start=4",
]


def test_a_preset_and_a_difference():
    command = parse(["demo", "--model.layers", "5", "--curriculum.kind", "window", "--resume"])
    assert (command.run.model.layers, command.run.curriculum.kind) == (5, "window")
    assert command.run.steps == demo().steps
    assert (command.resume, command.overwrite) == (True, True)


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
    for option in ("--model.kv-heads", "--data.paths", "--curriculum.kind", "--resume", "--overwrite"):
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
    assert "unknown preset 'demmo'; the presets are run, demo" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--model.layers", "0"], "model.layers must be at least 1, got 0"),
        (["--curriculum.kind", "windows"], "windows"),
        (["--data.paths", "nowhere.txt"], "data.paths: nowhere.txt does not exist"),
        (["--steps", "many"], "many"),
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
def test_help_names_the_presets(typed, capsys):
    main(typed)
    said = capsys.readouterr().out
    assert "python -m train demo" in said
    assert "python -m train run" in said


def test_help_of_a_preset_explains_the_options(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(["demo", "--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "--curriculum.share" in said
    assert "Share of the steps over which it grows" in said


def test_from_the_command_line_to_a_finished_folder(tmp_path, capsys):
    text = write_text(tmp_path)
    command = ["run", *TINY, "--folder", str(tmp_path), "--name", "first", "--data.paths", str(text)]
    main(command)
    assert sorted(path.name for path in Path(tmp_path, "first").iterdir()) == [
        "checkpoint",
        "config.json",
        "curriculum.png",
        "metrics.jsonl",
    ]
    said = capsys.readouterr()
    assert "4,000 bytes of text" in said.out
    assert "compilations of the train step" in said.out
    assert "100%" in said.err  # the progress bar

    with pytest.raises(SystemExit):
        main(command)
    assert "already holds a run" in capsys.readouterr().err
    main([*command, "--resume"])
