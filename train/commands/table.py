"""The commands of `python -m train`, one row each; each is a file of this folder.

Of these `compare` alone trains: runs whose configs an experiment makes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tyro

from train.commands.compare import Compare, compare
from train.commands.compile import Compile, compile_for, with_preset
from train.commands.evaluate import Evaluate, evaluate
from train.commands.export import Export, export
from train.commands.generate import Generate, generate
from train.commands.summarize import SummarizeFiles, summarize
from train.commands.tokenizer import TrainTokenizer, train_tokenizer
from train.config.command_line import PROGRAM


def no_default(arguments: Sequence[str]) -> tuple[None, list[str]]:
    """The options start from the defaults of their record."""
    return None, list(arguments)


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
      options: a frozen record, whose fields are the options and whose docstring is the help.
      run: called with the options.
      default: called with the words that follow the command's name. Returns the options to start from (None:
        the record's defaults) and the words that are left to parse.
    """

    options: type
    run: Callable[[Any], None]
    default: Callable[[Sequence[str]], tuple[Any, list[str]]] = no_default


COMMANDS: dict[str, Command] = {
    "generate": Command(Generate, generate),
    "summarize": Command(SummarizeFiles, summarize),
    "evaluate": Command(Evaluate, evaluate),
    "export": Command(Export, export),
    "tokenizer": Command(TrainTokenizer, train_tokenizer),
    "compare": Command(Compare, compare),
    "compile": Command(Compile, compile_for, with_preset),
}
"""By name."""


def run_command(name: str, arguments: Sequence[str]):
    """Runs one of `COMMANDS` with the words that follow its name.

    Raises:
      ValueError, OSError, ImportError: with the reason why it cannot.
      SystemExit: after `--help`, or after tyro printed which option is wrong.
    """
    command = COMMANDS[name]
    default, words = command.default(arguments)
    command.run(tyro.cli(command.options, prog=f"{PROGRAM} {name}", args=words, default=default))
