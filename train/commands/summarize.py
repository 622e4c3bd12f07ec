"""The command `summarize`: summarises text files."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import jax
import tyro

from train.commands.inference import SamplingOptions, Source, Stopwatch, read_text
from train.config.checks import at_least
from train.data.pair_layout import PairLayout
from train.evaluate.summaries import Summarizer


@dataclass(frozen=True)
class SummarizeFiles:
    """Summarises text files with a model of `--task summarize`, or of a Hugging Face folder."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """UTF-8 files, each one document."""
    run: Path
    """A run's folder, whose newest checkpoint is used, a file of `export`, or a Hugging Face folder."""
    template: str | None = None
    """What lies around document and summary, as summarize.template. None: as in the run, and for a folder
    that was not trained here a separator, Summary:."""
    length: int | None = None
    """Most tokens of a document and what lies around it. None: as in the run; 4,096 of a Hugging Face
    folder."""
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
    at_least("", command, length=2)
    loaded = Source(command.run, command.tokenizer).load("summarize", length=command.length)
    given = {name: getattr(command, name) for name in ("template", "truncate")}
    asked = replace(
        loaded.run.summarize, **{name: value for name, value in given.items() if value is not None}
    )
    layout = PairLayout.of(asked, loaded.tokenizer, loaded.conventions)
    summarizer = Summarizer.of(loaded.program, loaded.params, loaded.tokenizer, layout, asked.truncate)
    options = command.sampling.override(loaded.run.generation)
    key = jax.random.key(command.sampling.seed)
    with Stopwatch() as stopwatch:
        summaries = summarizer.summaries(documents, options, key, names=list(map(str, command.files)))
    for file, summary in zip(command.files, summaries, strict=True):
        print(f"{file}:\n{summary}\n" if len(summaries) > 1 else summary)
    stopwatch.print_throughput(sum(map(len, loaded.tokenizer.encode(summaries))))
