"""What the commands that use a model share: loading it, sampling options, prompts, the throughput line."""

import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from train.checkpoint.export import origin_of
from train.checkpoint.folder import pretrained_files
from train.checkpoint.load import load_model
from train.config.command_line import PROGRAM
from train.config.operation import Evaluation, Generation, Mesh
from train.config.run import Run
from train.config.sections import Curriculum
from train.data.pair_layout import Conventions
from train.data.tasks import CommandName, task_of
from train.data.tokenizers import Tokenizer
from train.pretrained.folder import PretrainedFolder
from train.step.program import Program, program_of


@dataclass(frozen=True)
class Loaded:
    """A model that a command uses.

    Attributes:
      run: its config.
      params: its weights.
      tokenizer: its tokenizer.
      conventions: of the Hugging Face folder that it is or was.
    """

    run: Run
    params: Any
    tokenizer: Tokenizer
    conventions: Conventions

    @property
    def program(self) -> Program:
        """The program of its run."""
        return program_of(self.run, self.tokenizer.vocabulary)

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        return tuple(dict.fromkeys((self.tokenizer.end, *self.conventions.ends)))


@dataclass(frozen=True)
class Source:
    """Where a command finds its model."""

    model: tyro.conf.Positional[Path]
    """A run's folder, whose newest checkpoint is used, a file of `export`, or a Hugging Face folder."""
    tokenizer: str | None = None
    """Path of the tokenizer. None: the path in the run's config."""

    def load(self, command: CommandName | None, *, length: int | None = None) -> Loaded:
        """The model, for a command that a model of its task is used by.

        A Hugging Face folder was trained for no task of ours: any command takes it.

        Args:
          command: its name; None: one that takes models of any task.
          length: data.length to use in place of the config's.

        Raises:
          OSError, ValueError: as `load_model`; or the model was trained for the task of another command.
        """
        weights, tokenizer = load_model(self.model, self.tokenizer)
        files, run = pretrained_files(origin_of(self.model)), weights.run
        if PretrainedFolder.at(self.model) is not None:
            run = replace(run, task="summarize" if command == "summarize" else "lm")
        if length is not None:
            data = replace(run.data, length=length)
            # What speaks of the rows of training would not fit.
            own = {"evaluation": Evaluation(), "curriculum": Curriculum(kind="full", start=1), "mesh": Mesh()}
            run = replace(run, data=data, **own)
        if command is not None:
            check_task(run, command, self.model)
        return Loaded(run, weights.params, tokenizer, files.conventions() if files else Conventions())


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are sampled. An option left out is as in the run's config, under `generation`."""

    tokens: int | None = None
    """Most tokens to generate; a text ends before at the end token."""
    temperature: float | None = None
    """0: always the most likely token; 1: as the model predicts; between: likely tokens more often."""
    top_k: int | None = None
    """Sample from the k most likely tokens only."""
    top_p: float | None = None
    """Sample from the fewest most likely tokens that together have this probability."""
    batch: int | None = None
    """Texts generated at once."""
    seed: int = 0
    """Seed of the sampling."""

    def override(self, options: Generation) -> Generation:
        """The options with those given here in their place; temperature 0 removes `top_k` and `top_p`."""
        if self.temperature == 0:
            options = replace(options, top_k=None, top_p=None)
        given = {name: value for name, value in vars(self).items() if name != "seed" and value is not None}
        return replace(options, **given)


class Stopwatch:
    """A context manager that measures its time, to print the throughput."""

    def __enter__(self) -> "Stopwatch":
        self._begun = time.perf_counter()
        return self

    def __exit__(self, *error):
        self._seconds = time.perf_counter() - self._begun

    def print_throughput(self, tokens: int):
        """Prints tokens and tokens per second on stderr."""
        print(
            f"{tokens:,} tokens in {self._seconds:.1f} s, {tokens / self._seconds:.1f} tokens/s "
            "(with compilation and the reading of the prompts)",
            file=sys.stderr,
        )


def check_task(run: Run, command: CommandName, source: Path):
    """Refuses a model that was trained for a task of another command, and names that."""
    task = task_of(run)
    if task.command != command:
        usage = task.usage.format(folder=source)
        raise ValueError(f"{source} was trained {task.purpose}: {PROGRAM} {usage}")


def unescaped(argument: str) -> str:
    """A text of the command line, whose bytes Python keeps apart where the locale's encoding is not UTF-8."""
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError:
        return argument


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is not UTF-8; with the first wrong byte.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no UTF-8 text: byte {error.start:,} is {error.object[error.start]:#x}"
        ) from error
