"""A config as a command line."""

import shlex
from typing import Any

from train.config.run import Run, option_values

PROGRAM = "python -m train"


def command(run: Run) -> str:
    """The command that trains a run, with the options that differ from their defaults.

    >>> from train.config.sections import Data
    >>> command(Run(steps=10, data=Data(paths=("a.txt", "b c.txt"), columns={"text": "body"})))
    "python -m train run --steps 10 --data.paths a.txt 'b c.txt' --data.columns text body"
    """
    defaults = option_values(Run())
    words = [*PROGRAM.split(), "run"]
    for name, value in option_values(run).items():
        if value != defaults[name]:
            words += _words(name.replace("_", "-"), value)
    return shlex.join(words)


def _words(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):  # a flag
        section, dot, field = name.rpartition(".")
        return [f"--{name}" if value else f"--{section}{dot}no-{field}"]
    if isinstance(value, dict):
        value = [word for pair in value.items() for word in pair]
    elif not isinstance(value, tuple):
        value = [value]
    return [f"--{name}", *map(str, value)]
