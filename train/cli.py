"""The command line: `python -m train PRESET --option value …`, and commands for what was trained."""

import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import cleandoc
from typing import Annotated, NoReturn

import tyro

from train.commands.table import COMMANDS, run_command
from train.config.command_line import PROGRAM
from train.config.presets import PRESETS
from train.config.run import Run, option_values, to_json
from train.loop.prepare import prepare
from train.loop.source import preset_run
from train.loop.training import NotFinite, train
from train.parallel.initialize import join
from train.parallel.processes import Processes
from train.pretrained.run import check_agreement
from train.report.outcome import Outcome

PRINT_ONLY = {"-h", "--help", "--print-config", "--print_config"}
"""Options that train nothing, and need no other process."""


@dataclass(frozen=True)
class Training:
    """A run to train."""

    run: Annotated[Run, tyro.conf.arg(name="")]
    overwrite: bool = False
    """Start the run again where the folder has one. Without it, the same command resumes that run."""
    print_config: bool = False
    """Print the whole config as JSON, without training."""


def main(arguments: Sequence[str] | None = None):
    """Runs the command line, by default with the arguments of the process.

    Raises:
      SystemExit: after printing the reason on stderr. Status 2: nothing was done, because an option or preset
        does not exist, a value is refused, texts are missing, or a folder or checkpoint does not fit. Status
        1: the run stopped, because the disk is full, too many steps were not finite, or another process
        trains in the folder.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return
    try:
        if is_command(arguments):
            run_command(arguments[0], arguments[1:])
            return
        # Before the options are parsed, so that a process that refuses them ends the others too.
        processes = Processes() if PRINT_ONLY & set(arguments) else join()
    except (ValueError, OSError, ImportError) as error:
        _stop(error, status=2)
    with processes.end_together():
        _train(arguments, processes)


def is_command(arguments: Sequence[str]) -> bool:
    """Whether the first word is a command. `summarize` is one if a file's name follows, else a preset."""
    name, *rest = arguments
    before_a_name = bool(rest) and not rest[0].startswith("-")
    return name in COMMANDS and (name not in PRESETS or before_a_name)


def parse(arguments: Sequence[str]) -> Training:
    """The run of a preset's name (`run` where left out) and options.

    Raises:
      ValueError: a preset or option does not exist, and the message lists those that do; or the config
        contradicts itself, or what it begins from.
      OSError: the folder or file that it begins from cannot be read.
      SystemExit: after `--help`, or after tyro printed which value has the wrong type.
    """
    preset, *words = arguments if not arguments[0].startswith("-") else ["run", *arguments]
    if preset not in PRESETS:
        raise ValueError(
            f"unknown preset or command {preset!r}; the presets are {', '.join(PRESETS)}; the commands are "
            f"{', '.join(COMMANDS)}"
        )
    run, source = preset_run(preset, words)
    command, unknown = tyro.cli(
        Training,
        prog=f"{PROGRAM} {preset}",
        description=cleandoc(PRESETS[preset].__doc__ or ""),
        default=Training(run),
        args=words,
        return_unknown_args=True,
    )
    if unknown:
        raise ValueError(_unknown(unknown))
    if source is not None:
        check_agreement(command.run.model, source.run.model, source.name)
    elif preset == "extend":
        raise ValueError(
            "init_from must name a Hugging Face folder, a run's folder or a file of export, whose context "
            f"the preset extend makes longer, got {command.run.init_from!r}"
        )
    return command


def overview() -> str:
    """The text of `python -m train --help`: presets and commands, with a line each."""

    def lines(table: dict[str, str | None]) -> list[str]:
        return [
            f"  {PROGRAM} {name:<9}  {cleandoc(doc or '').splitlines()[0]}" for name, doc in table.items()
        ]

    return "\n".join(
        [
            "Trains language models on long text under a mask that grows with the training step.",
            "",
            "Presets, which options change:",
            *lines({name: preset.__doc__ for name, preset in PRESETS.items()}),
            "",
            "Commands:",
            *lines({name: command.options.__doc__ for name, command in COMMANDS.items()}),
            "",
            f"{PROGRAM} PRESET --help says what a preset needs and what to expect, and lists the options.",
            f"Without a preset's name, options are those of run. {PROGRAM} summarize followed by a file's",
            "name is the command, by options or nothing the preset.",
        ]
    )


def _train(arguments: Sequence[str], processes: Processes):
    try:
        command = parse(arguments)
        if command.print_config:
            print(to_json(command.run), end="")
            return
        session = prepare(command.run, overwrite=command.overwrite, processes=processes)
    except (ValueError, OSError, ImportError) as error:
        _stop(error, status=2)
    if processes.first:
        print(f"{session.corpus.description}\n{session.opening}\n{session.counts}")
    try:
        result = train(session)
    except (OSError, NotFinite) as error:
        _stop(error, status=1)
    if processes.first:
        print(f"\n{result}\n\nAll files of the run are in {session.folder.path}")
        for line in result.failures if isinstance(result, Outcome) else ():
            print(f"{PROGRAM}: {line}", file=sys.stderr)


def _stop(error: Exception, *, status: int) -> NoReturn:
    print(f"{PROGRAM}: {error}", file=sys.stderr)
    raise SystemExit(status) from error


def _unknown(arguments: Sequence[str]) -> str:
    names = (*option_values(PRESETS["run"]()), "overwrite", "print_config")
    valid = [f"--{name.replace('_', '-')}" for name in names]
    named = [argument.split("=")[0] for argument in arguments if argument.startswith("-")] or [arguments[0]]
    close = difflib.get_close_matches(named[0], valid, n=1)
    meant = f" (did you mean {close[0]}?)" if close else ""
    return f"unknown option {named[0]}{meant}; the options are {', '.join(valid)}"
