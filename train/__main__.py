"""`python -m train`: starts the command line, or says in one line what this machine lacks for it."""

import io
import sys
from collections.abc import Sequence
from typing import NoReturn

OURS = ("train", "dynmask_jax")


def main(arguments: Sequence[str] | None = None):
    """Runs `train.cli.main`, which imports all that the trainer needs.

    Raises:
      SystemExit: with status 2, on Windows or where a library is not installed; or as `train.cli.main`.
    """
    if sys.platform == "win32":
        _refuse(
            "the trainer needs file locks and signals that Windows lacks (fcntl, SIGTERM); run it on Linux, "
            "macOS or WSL. The library dynmask_jax works on Windows"
        )
    try:
        from train import cli
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library in OURS or not library:
            raise
        _refuse(
            f"the trainer needs the library {library}, which is not installed: "
            'pip install -e ".[train]" in the checkout installs all that it needs'
        )
    _print_anything()
    cli.main(arguments)


def _print_anything():
    """What the terminal's encoding cannot show is printed as its number: no run ends for want of a letter."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _refuse(reason: str) -> NoReturn:
    print(f"python -m train: {reason}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
