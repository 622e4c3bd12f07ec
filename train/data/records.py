"""Sources in, records out: each text, or document and summary, with its file and line."""

import codecs
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from train.config.run import TaskName
from train.data.columns import columns_of
from train.data.sources import LINES, Source
from train.data.tasks import TASKS

PART = 1 << 20  # bytes of a text file that are read and tokenized at a time


@dataclass(frozen=True)
class TextRecord:
    """A text, or a document and its summary.

    Attributes:
      texts: one, or document and summary; of a text file larger than `PART`, one part.
      path: the file.
      line: its line, or a dataset's row, from 1; None for a whole file.
      part: the number of this part in its document, from 0.
    """

    texts: tuple[str, ...]
    path: Path
    line: int | None = None
    part: int = 0


@dataclass(frozen=True)
class Malformed:
    """Text that cannot be read, and why. `str` names the file and the line.

    Attributes:
      asked_for: whether the file was named, or holds lines of JSONL. Other files, such as a picture among a
        folder's texts, are left out and counted, and do not stop the run.
    """

    path: Path
    line: int | None
    reason: str
    asked_for: bool = True

    def __str__(self) -> str:
        return f"{place(self.path, self.line)}: {self.reason}"

    def error(self) -> ValueError:
        """The error to raise where malformed text is not to be skipped."""
        return ValueError(f"data.paths: {self} (--data.skip-malformed leaves such text out and counts it)")


def place(path: Path | str, line: int | None) -> str:
    """The origin of a text, in words."""
    return str(path) if line is None else f"{path}, line {line}"


def records(
    found: Iterable[Source], task: TaskName | None, columns: Mapping[str, str]
) -> Iterator[TextRecord | Malformed]:
    """Everything in the sources, one record at a time.

    Args:
      found: the sources.
      task: what records are read for; None for any: pairs where a source has them, else texts.
      columns: data.columns.

    Raises:
      ValueError: the columns to read are ambiguous or absent; the task needs pairs and the source is a text
        file; or a saved dataset needs a library that is not installed.
    """
    for source in found:
        if source.kind == "lines":
            yield from _lines(source.path, task, columns)
        elif source.kind == "dataset":
            yield from _dataset(source.path, task, columns)
        elif task is not None and (needs := TASKS[task].needs):
            raise ValueError(
                f"data.paths: {source.path} is no JSONL: {task} needs {needs}, from "
                f"{', '.join(LINES)} files or folders that Hugging Face datasets saved"
            )
        else:
            yield from _text(source)


def _text(source: Source) -> Iterator[TextRecord | Malformed]:
    """The file as one document, in parts that end with a line where it is large."""
    if (malformed := _not_text(source.path)) is not None:
        if source.named or malformed.line is not None:  # of an empty file nothing is lost
            yield replace(malformed, asked_for=source.named)
        return
    decoder, rest, part = codecs.getincrementaldecoder("utf-8")(), "", 0
    with source.path.open("rb") as file:
        while block := file.read(PART):
            text = rest + decoder.decode(block)
            line_end = text.rfind("\n") + 1 if len(block) == PART else 0
            if cut := line_end or len(text):
                yield TextRecord((text[:cut],), source.path, part=part)
                part += 1
            rest = text[cut:]
    if rest:
        yield TextRecord((rest,), source.path, part=part)


def _not_text(path: Path) -> Malformed | None:
    """Why a file is not text, or None."""
    decoder, line, empty = codecs.getincrementaldecoder("utf-8")(), 1, True
    with path.open("rb") as file:
        while True:
            block = file.read(PART)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                return Malformed(path, line + _newlines(error), f"it is not UTF-8 text ({error.reason})")
            if "\0" in text:
                before = text[: text.index("\0")].count("\n")
                return Malformed(path, line + before, "it is not text: it has a null byte")
            line, empty = line + text.count("\n"), empty and not text.strip()
            if not block:
                return Malformed(path, None, "it is empty") if empty else None


def _newlines(error: UnicodeDecodeError) -> int:
    return bytes(error.object[: error.start]).count(b"\n")


def _lines(path: Path, task: TaskName | None, columns: Mapping[str, str]) -> Iterator[TextRecord | Malformed]:
    """A record for each line of a JSONL file; blank lines are none."""
    names: tuple[str, ...] | None = None
    for number, line in _numbered(path):
        if isinstance(line, Malformed):
            yield line
        elif line.strip():
            fields = _object(line)
            if isinstance(fields, str):
                yield Malformed(path, number, fields)
                continue
            names = names or _columns(place(path, number), list(fields), task, columns)
            yield _record(fields, names, path, number)


def _numbered(path: Path) -> Iterator[tuple[int, bytes | Malformed]]:
    number = 0
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        try:
            for line in file:
                number += 1
                yield number, line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            reason = f"the gzip file is damaged or cut off here, the rest is lost ({error})"
            yield number + 1, Malformed(path, number + 1, reason)


def _object(line: bytes) -> dict[str, Any] | str:
    """A line's fields, or why it has none."""
    try:
        value = json.loads(line.decode("utf-8").strip())
    except UnicodeDecodeError as error:
        return f"it is not UTF-8 text ({error.reason} at byte {error.start + 1})"
    except json.JSONDecodeError as error:
        return f"it is not JSON ({error.msg}, letter {error.colno})"
    except (ValueError, RecursionError) as error:
        return f"it is not JSON ({error})"
    return value if isinstance(value, dict) else f"it is not a JSON object but {type(value).__name__}"


def _columns(
    where: str, there: Sequence[str], task: TaskName | None, named: Mapping[str, str]
) -> tuple[str, ...]:
    try:
        return columns_of(there, task, named)
    except ValueError as error:
        raise ValueError(f"data.columns: {where}: {error}") from error


def _record(
    fields: Mapping[str, Any], names: tuple[str, ...], path: Path, number: int
) -> TextRecord | Malformed:
    for name in names:
        if reason := _fault(fields, name):
            return Malformed(path, number, reason)
    return TextRecord(tuple(fields[name] for name in names), path, number)


def _fault(fields: Mapping[str, Any], name: str) -> str | None:
    """Why a column holds no usable text, or None."""
    if name not in fields:
        return f"it has no column {name!r}, only {', '.join(map(repr, fields)) or 'an empty object'}"
    text = fields[name]
    if not isinstance(text, str):
        return f"its column {name!r} holds {type(text).__name__}, not text"
    if not text.strip():
        return f"its column {name!r} is empty"
    if "\0" in text:
        return f"its column {name!r} has a null character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"its column {name!r} is not Unicode text: it has half a surrogate pair"
    return None


def _dataset(
    path: Path, task: TaskName | None, columns: Mapping[str, str]
) -> Iterator[TextRecord | Malformed]:
    """A record for each row of a dataset that Hugging Face `datasets` saved."""
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise ValueError(
            f"data.paths: {path} was saved by Hugging Face datasets, which is not installed: "
            'pip install -e ".[hub]"'
        ) from error
    rows: Any = load_from_disk(os.fspath(path))
    names = _columns(str(path), list(rows.column_names), task, columns)
    if missing := sorted(set(names) - set(rows.column_names)):
        raise ValueError(
            f"data.columns: {path} has no column {', '.join(missing)}, only {', '.join(rows.column_names)}"
        )
    for number, row in enumerate(rows.select_columns(list(names)), 1):
        yield _record(row, names, path, number)
