"""Commands for what training leaves: `python -m train generate`, `summarize`, `export`; and for what
comes before it: `tokenizer`, `compile`.

Each is a frozen record, whose fields are its options, and a function of it. None of them trains.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from train.checkpoint.export import Weights, export_weights
from train.checkpoint.load import load_model
from train.commands.compile import Compile, compile_for, with_preset
from train.config.operation import Generation
from train.data.tasks import task_of
from train.data.tokenizers import Tokenizer, train_bpe
from train.evaluate.generation import Generator
from train.evaluate.summaries import Summarizer
from train.step.program import program_of

PROGRAM = "python -m train"
SHOWN = 400  # letters of a prompt that are shown again, its last


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn. What is left out is as in the run's config, under `generation`."""

    tokens: int | None = None
    """At most so many are generated; the end token ends a text before."""
    temperature: float | None = None
    """0: always the likeliest token; 1: as the model predicts; between: surer of the likely ones."""
    top_k: int | None = None
    """Draw from the k likeliest tokens only."""
    top_p: float | None = None
    """Draw from the likeliest tokens that together have this probability."""
    batch: int | None = None
    """Texts that are generated at once."""
    seed: int = 0
    """Of what is drawn."""

    def over(self, options: Generation) -> Generation:
        """The options with what is given here in place of theirs; at temperature 0 nothing is drawn from."""
        if self.temperature == 0:
            options = replace(options, top_k=None, top_p=None)
        given = {name: value for name, value in vars(self).items() if name != "seed" and value is not None}
        return replace(options, **given)


@dataclass(frozen=True)
class Generate:
    """Goes on with prompts, by a trained model. Each prompt is printed behind `>`, then what follows it."""

    model: tyro.conf.Positional[Path]
    """A run's folder, of which the newest checkpoint is taken, or a file of `export`."""
    prompt: tuple[str, ...] = ()
    """Texts to go on with, one or more."""
    prompt_file: tuple[Path, ...] = ()
    """Files of UTF-8, each a text to go on with."""
    drawing: Annotated[Drawing, tyro.conf.arg(name="")] = field(default_factory=Drawing)
    tokenizer: str | None = None
    """Where the tokenizer is, if not where the run found it."""


@dataclass(frozen=True)
class Summarize:
    """Summarises text files, by a model that was trained with `--task summarize`."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """Files of UTF-8, each one document."""
    run: Path
    """The run's folder, of which the newest checkpoint is taken, or a file of `export`."""
    truncate: bool | None = None
    """Cut documents that are too long at their end. Left out: as in the run's config."""
    drawing: Annotated[Drawing, tyro.conf.arg(name="")] = field(default_factory=Drawing)
    tokenizer: str | None = None
    """Where the tokenizer is, if not where the run found it."""


@dataclass(frozen=True)
class Export:
    """Writes a model's weights to a safetensors file, which `generate` and `summarize` take too."""

    model: tyro.conf.Positional[Path]
    """A run's folder, of which the newest checkpoint is taken."""
    to: Path
    """The file to write."""
    overwrite: bool = False
    """Replace the file if it exists."""
    tokenizer: str | None = None
    """Where the tokenizer is, if not where the run found it."""


@dataclass(frozen=True)
class TrainTokenizer:
    """Makes a byte-level BPE tokenizer for texts of one's own: a tokenizer.json for --data.tokenizer."""

    paths: tyro.conf.Positional[tuple[str, ...]]
    """Text files, JSONL files, folders of them, globs, or saved datasets, as for --data.paths."""
    out: Path = Path("tokenizer.json")
    """The file to write."""
    vocabulary: int = 8192
    """How many tokens there are, the 256 bytes and the end token included."""
    columns: dict[str, str] = field(default_factory=dict)
    """The columns of records, where they have other names than usual: text body, say."""
    skip_malformed: bool = False
    """Leave out lines that cannot be read instead of stopping at the first."""


def generate(command: Generate):
    """Prints what follows each prompt.

    Raises:
      ValueError, OSError: what is asked for cannot be done, and why.
    """
    prompts = [*command.prompt, *map(_read, command.prompt_file)]
    if not prompts:
        raise ValueError("generate needs a text to go on with: --prompt TEXT or --prompt-file FILE")
    weights, tokenizer = load_model(command.model, command.tokenizer)
    task = task_of(weights.run)
    if task.command != "generate":
        usage = task.usage.format(folder=command.model)
        raise ValueError(f"{command.model} was trained {task.purpose}: {PROGRAM} {usage}")
    options, generator = command.drawing.over(weights.run.generation), _generator(weights, tokenizer)
    tokens = tokenizer.encode(prompts)
    with _Timed() as timed:
        texts = generator.generate(tokens, options, jax.random.key(command.drawing.seed))
    for prompt, text in zip(prompts, texts, strict=True):
        print(f"{_quoted(prompt)}\n{tokenizer.decode(text)}\n")
    timed.say(sum(map(len, texts)))


def summarize(command: Summarize):
    """Prints a summary of each file.

    Raises:
      ValueError, OSError: what is asked for cannot be done, and why.
    """
    if not command.files:
        raise ValueError("summarize needs a file: summarize FILE --run FOLDER")
    documents = list(map(_read, command.files))
    weights, tokenizer = load_model(command.run, command.tokenizer)
    if task_of(weights.run).command != "summarize":
        raise ValueError(f"{command.run} was trained for the task {weights.run.task}, not summarize")
    truncate = weights.run.summarize.truncate if command.truncate is None else command.truncate
    summarizer = Summarizer(_generator(weights, tokenizer), tokenizer, truncate)
    options, key = command.drawing.over(weights.run.generation), jax.random.key(command.drawing.seed)
    with _Timed() as timed:
        summaries = summarizer.summaries(documents, options, key, names=list(map(str, command.files)))
    for file, summary in zip(command.files, summaries, strict=True):
        print(f"{file}:\n{summary}\n" if len(summaries) > 1 else summary)
    timed.say(sum(map(len, tokenizer.encode(summaries))))


def export(command: Export):
    """Writes the file, and says what is in it.

    Raises:
      ValueError, OSError: what is asked for cannot be done, and why.
    """
    weights, _ = load_model(command.model, command.tokenizer)
    export_weights(weights, command.to, overwrite=command.overwrite)
    count = sum(leaf.size for leaf in jax.tree.leaves(weights.params))
    print(
        f"{command.to}: {count:,} weights, the config, and the name of the tokenizer "
        f"({weights.run.data.tokenizer})"
    )


def train_tokenizer(command: TrainTokenizer):
    """Writes the tokenizer, and says how large it is.

    Raises:
      ValueError, OSError: what is asked for cannot be done, and why.
    """
    if not command.paths:
        raise ValueError("tokenizer needs texts: tokenizer FILE_OR_FOLDER …")
    tokenizer = train_bpe(
        command.paths, command.vocabulary, command.columns, command.out, skip_malformed=command.skip_malformed
    )
    print(f"{command.out}: {tokenizer.vocabulary:,} tokens; train with --data.tokenizer {command.out}")


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "generate": (Generate, generate),
    "summarize": (Summarize, summarize),
    "export": (Export, export),
    "tokenizer": (TrainTokenizer, train_tokenizer),
    "compile": (Compile, compile_for),
}
"""name -> its options, and what it does."""


def run_command(name: str, arguments: Sequence[str]):
    """Runs one of `COMMANDS` with the words that follow its name.

    Raises:
      ValueError, OSError, ImportError: what is asked for cannot be done, and why.
      SystemExit: what is typed does not fit, which `tyro` explains, or --help.
    """
    options, function = COMMANDS[name]
    words, default = list(arguments), None
    if options is Compile:  # the one whose options are those of a run
        default, words = with_preset(words)
    function(tyro.cli(options, prog=f"{PROGRAM} {name}", args=words, default=default))


def _generator(weights: Weights, tokenizer: Tokenizer) -> Generator:
    return Generator.of(program_of(weights.run, weights.vocabulary), weights.params, tokenizer.end)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no UTF-8 text: byte {error.start:,} is {error.object[error.start]:#x}"
        ) from error


def _quoted(prompt: str) -> str:
    """The prompt's last letters, each line behind `>`."""
    shown = prompt if len(prompt) <= SHOWN else "… " + prompt[-SHOWN:]
    return "\n".join(f"> {line}" for line in shown.splitlines())


class _Timed:
    """Says on stderr how fast tokens came."""

    def __enter__(self) -> "_Timed":
        self._begun = time.perf_counter()
        return self

    def __exit__(self, *error):
        self._seconds = time.perf_counter() - self._begun

    def say(self, tokens: int):
        print(
            f"{tokens:,} tokens in {self._seconds:.1f} s, {tokens / self._seconds:.1f} tokens/s "
            "(with compilation and the reading of the prompts)",
            file=sys.stderr,
        )
