"""The command `evaluate`: the loss of a model on texts, by how much context a token has."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from train.commands.inference import Source
from train.config.checks import at_least
from train.data.records import Malformed, records
from train.data.sources import sources
from train.data.tokenizers import Ids, Tokenizer
from train.disk import check_writable, write_atomically
from train.evaluate.texts import Shown, TextLoss, text_loss


@dataclass(frozen=True)
class Texts:
    """What is read."""

    texts: tyro.conf.Positional[tuple[str, ...]]
    """What data.paths takes: text files, JSON lines, CSV, folders of them, globs, saved datasets."""
    columns: dict[str, str] = field(default_factory=dict)
    """The columns of records, as data.columns."""
    limit_bytes: int | None = None
    """Read so many bytes of UTF-8 of each text, and no part of a character."""
    limit_tokens: int | None = None
    """Read so many tokens of each text, the begin token among them, where the tokenizer has one."""

    def tokens(self, tokenizer: Tokenizer, texts: list[str]) -> list[Ids]:
        """The tokens of each text after the begin token, up to the limit."""
        return [tokenizer.begun(ids)[: self.limit_tokens] for ids in tokenizer.encode(texts)]

    def read(self) -> list[str]:
        """Every text, those of large files whole again, up to the limit."""
        texts: list[str] = []
        for record in records(sources(self.texts, "texts"), "lm", self.columns):
            if isinstance(record, Malformed):
                if record.asked_for:
                    raise ValueError(f"texts: {record}")
            elif record.part:
                texts[-1] += record.texts[0]
            else:
                texts.append(record.texts[0])
        return [_cut(text, self.limit_bytes) for text in texts]


@dataclass(frozen=True)
class Evaluate:
    """Measures a model on texts: nats a token, bits per byte, and the loss by how much context there is."""

    source: Annotated[Source, tyro.conf.arg(name="")]
    texts: Annotated[Texts, tyro.conf.arg(name="")]
    length: int | None = None
    """Tokens of context in a row; longer texts are cut into rows that share none. None: as in the run, and
    4,096 of a Hugging Face folder."""
    window: int | None = None
    """Let a token see so many tokens at most, itself among them: what distant context is worth."""
    chunk: int | None = None
    """Let a token see those of its own chunk of so many tokens alone."""
    batch: int = 1
    """Rows at once."""
    json: Path | None = None
    """File to write the results to, as JSON."""
    overwrite: bool = False
    """Replace that file if it exists."""


def evaluate(command: Evaluate):
    """Prints the results, and writes them where asked.

    Raises:
      ValueError, OSError: with the reason why it cannot.
    """
    if not command.texts.texts:
        raise ValueError("evaluate needs a text: evaluate FOLDER TEXT")
    at_least("", command, length=2, window=1, chunk=1, batch=1)
    at_least("", command.texts, limit_bytes=1, limit_tokens=2)
    _check_target(command)
    texts = command.texts.read()
    loaded = command.source.load(None, length=command.length)
    rows, shown = command.texts.tokens(loaded.tokenizer, texts), Shown(command.window, command.chunk)
    length, batch = loaded.run.data.length, command.batch
    found = text_loss(loaded.run, loaded.params, loaded.tokenizer, rows, length, batch=batch, shown=shown)
    print(describe(found))
    if command.json:
        write_atomically(command.json, to_json(found))


def to_json(found: TextLoss) -> str:
    """The results as a JSON object, in which what is not finite is null."""
    values = asdict(found)
    values["by_position"] = {start: _finite(nats) for start, nats in found.by_position.items()}
    values = {name: _finite(value) for name, value in values.items()}
    return json.dumps(values, indent=2, allow_nan=False) + "\n"


def describe(found: TextLoss) -> str:
    """The results as text."""
    of_bytes = f"{found.bits_per_byte:.4f} bits per byte of {found.bytes:,}"
    lines = [f"{found.tokens:,} tokens: {found.nats_per_token:.4f} nats a token, {of_bytes}", ""]
    lines += [f"{'tokens before':>13}  nats a token"]
    lines += [f"{start:>13}  {nats:12.4f}" for start, nats in found.by_position.items()]
    return "\n".join(lines)


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_target(command: Evaluate):
    """Refuses a file that could not be written, before anything is computed."""
    if command.json is None:
        return
    if command.json.is_dir() or not command.json.parent.is_dir():
        raise FileNotFoundError(f"json: {command.json} is no file in a folder that exists")
    if command.json.exists() and not command.overwrite:
        raise FileExistsError(f"{command.json} is there already: --overwrite replaces it")
    check_writable(command.json.parent, "json")


def _cut(text: str, limit: int | None) -> str:
    return text if limit is None else text.encode()[:limit].decode(errors="ignore")
