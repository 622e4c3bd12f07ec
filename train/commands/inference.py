"""What the commands that generate text share: sampling options, prompts from files, the throughput line."""

import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from train.checkpoint.export import Weights
from train.config.command_line import PROGRAM
from train.config.operation import Generation
from train.config.run import Run
from train.data.tasks import task_of
from train.data.tokenizers import Tokenizer
from train.evaluate.generation import Generator
from train.step.program import program_of


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


def check_task(run: Run, command: str, source: Path):
    """Refuses a model that was trained for a task of another command, and names that."""
    task = task_of(run)
    if task.command != command:
        usage = task.usage.format(folder=source)
        raise ValueError(f"{source} was trained {task.purpose}: {PROGRAM} {usage}")


def make_generator(weights: Weights, tokenizer: Tokenizer) -> Generator:
    """A generator of texts that end with the tokenizer's end token."""
    return Generator.of(program_of(weights.run, weights.vocabulary), weights.params, tokenizer.end)


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
