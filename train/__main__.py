"""The command line: `python -m train PRESET --option value …`."""

import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from train.config import Run, option_names
from train.loop import prepare, train
from train.presets import PRESETS

PROGRAM = "python -m train"


@dataclass(frozen=True)
class Command:
    """Trains a byte-level language model on text, under a mask that grows with the training step.

    Writes a folder: config.json, metrics.jsonl, checkpoint/ and curriculum.png.
    """

    run: Annotated[Run, tyro.conf.arg(name="")]
    resume: bool = False
    """Continue the run in the folder from its latest checkpoint. Give the same options again."""
    overwrite: bool = False
    """Replace the run in the folder, unless --resume. The demo does."""


def main(arguments: Sequence[str] | None = None):
    """Runs the command line; by default with the process's own arguments.

    Raises:
      SystemExit: with status 2, once the reason is on stderr: an option or a preset that does not
        exist, a value that is refused, text that is missing, a folder or a checkpoint that does not fit.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return
    try:
        command = parse(arguments)
        session = prepare(command.run, resume=command.resume, overwrite=command.overwrite)
    except (ValueError, OSError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(f"{session.corpus.size:,} bytes of text; the run's folder is {session.folder.path}")
    summary = train(session)
    print(f"\n{summary}\n\nPicture, metrics and checkpoint: {session.folder.path}")


def parse(arguments: Sequence[str]) -> Command:
    """The command that the arguments ask for: a preset's name (`run` where left out) and options.

    Raises:
      ValueError: an unknown preset or option; the message lists the valid ones. Or a config that
        contradicts itself.
      SystemExit: a value of the wrong type, which `tyro` explains, or --help.
    """
    preset, *options = arguments if not arguments[0].startswith("-") else ["run", *arguments]
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; the presets are {', '.join(PRESETS)}")
    default = Command(PRESETS[preset](), overwrite=preset == "demo")
    command, unknown = tyro.cli(
        Command, prog=f"{PROGRAM} {preset}", default=default, args=options, return_unknown_args=True
    )
    if unknown:
        raise ValueError(_unknown(unknown))
    return command


def overview() -> str:
    """What there is to run, for someone who does not know yet."""
    lines = [f"  {PROGRAM} {name:<6} {preset.__doc__}" for name, preset in PRESETS.items()]
    return "\n".join(
        [
            "Trains a language model on long text under a mask that grows with the training step.",
            "",
            *lines,
            "",
            f"Options: {PROGRAM} run --help. Without a preset's name, options are those of run.",
        ]
    )


def _unknown(arguments: Sequence[str]) -> str:
    valid = [
        f"--{name.replace('_', '-')}" for name in (*option_names(PRESETS["run"]()), "resume", "overwrite")
    ]
    named = [argument.split("=")[0] for argument in arguments if argument.startswith("-")] or [arguments[0]]
    close = difflib.get_close_matches(named[0], valid, n=1)
    meant = f" (did you mean {close[0]}?)" if close else ""
    return f"unknown option {named[0]}{meant}; the options are {', '.join(valid)}"


if __name__ == "__main__":
    main()
