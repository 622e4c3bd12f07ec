"""The command `summarize`: summarises text files."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import jax
import tyro

from train.checkpoint.load import load_model
from train.commands.inference import SamplingOptions, Stopwatch, check_task, make_generator, read_text
from train.evaluate.summaries import Summarizer


@dataclass(frozen=True)
class SummarizeFiles:
    """Summarises text files with a model that was trained with `--task summarize`."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """UTF-8 files, each one document."""
    run: Path
    """A run's folder, whose newest checkpoint is used, or a file of `export`."""
    truncate: bool | None = None
    """Cut off the end of documents that are too long. None: as in the run's config."""
    sampling: Annotated[SamplingOptions, tyro.conf.arg(name="")] = field(default_factory=SamplingOptions)
    tokenizer: str | None = None
    """Path of the tokenizer. None: the path in the run's config."""


def summarize(command: SummarizeFiles):
    """Prints a summary of each file.

    Raises:
      ValueError, OSError: with the reason why it cannot.
    """
    if not command.files:
        raise ValueError("summarize needs a file: summarize FILE --run FOLDER")
    documents = list(map(read_text, command.files))
    weights, tokenizer = load_model(command.run, command.tokenizer)
    check_task(weights.run, "summarize", command.run)
    truncate = weights.run.summarize.truncate if command.truncate is None else command.truncate
    summarizer = Summarizer(make_generator(weights, tokenizer), tokenizer, truncate)
    options, key = command.sampling.override(weights.run.generation), jax.random.key(command.sampling.seed)
    with Stopwatch() as stopwatch:
        summaries = summarizer.summaries(documents, options, key, names=list(map(str, command.files)))
    for file, summary in zip(command.files, summaries, strict=True):
        print(f"{file}:\n{summary}\n" if len(summaries) > 1 else summary)
    stopwatch.print_throughput(sum(map(len, tokenizer.encode(summaries))))
