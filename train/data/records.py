"""Sources in, records out: each text, or document and summary, with its file and line."""

import codecs
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from train.config.run import TaskName
from train.data.columns import columns_of
from train.data.file_kinds import LINES
from train.data.row_files import DAMAGED, Fields, damaged, lines, opened, table_rows
from train.data.sources import Source
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
      asked_for: whether it stops the run: the file was named, or holds lines of JSONL. Other files, such as a
        picture among a folder's texts, and empty rows are left out and counted.
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
        if source.kind == "none":
            yield Malformed(source.path, None, source.reason or "", asked_for=source.named)
        elif source.kind == "lines":
            yield from _records(source, lines(source.path), task, columns)
        elif source.kind == "table":
            yield from _records(source, table_rows(source.path), task, columns)
        elif source.kind == "dataset":
            yield from _dataset(source.path, task, columns)
        elif task is not None and (needs := TASKS[task].needs):
            if source.named:
                raise ValueError(
                    f"data.paths: {source.path} is no JSONL: {task} needs {needs}, from JSON lines, CSV, or "
                    "folders that Hugging Face datasets saved"
                )
            yield Malformed(source.path, None, f"it is text, and {task} needs {needs}", asked_for=False)
        else:
            yield from _text(source)


def _text(source: Source) -> Iterator[TextRecord | Malformed]:
    """The file as one document, in parts that end with a line where it is large."""
    if (malformed := _not_text(source.path)) is not None:
        yield replace(malformed, asked_for=source.named)
        return
    decoder, rest, part = codecs.getincrementaldecoder("utf-8-sig")(), "", 0
    with opened(source.path) as file:
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
    decoder, line, empty = codecs.getincrementaldecoder("utf-8-sig")(), 1, True
    with opened(path) as file:
        while True:
            try:
                block = file.read(PART)
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                return Malformed(path, line + _newlines(error), f"it is not UTF-8 text ({error.reason})")
            except DAMAGED as error:
                return Malformed(path, None, damaged(error))
            if "\0" in text:
                before = text[: text.index("\0")].count("\n")
                return Malformed(path, line + before, "it is not text: it has a null byte")
            line, empty = line + text.count("\n"), empty and not text.strip()
            if not block:
                return Malformed(path, None, "it is empty") if empty else None


def _newlines(error: UnicodeDecodeError) -> int:
    return bytes(error.object[: error.start]).count(b"\n")


def _records(
    source: Source,
    rows: Iterator[tuple[int, Fields | str]],
    task: TaskName | None,
    columns: Mapping[str, str],
) -> Iterator[TextRecord | Malformed]:
    """A record for each row that holds one, of its own columns: not all rows of a file have the same."""
    names: tuple[str, ...] | None = None
    number = None
    for number, fields in rows:
        if isinstance(fields, str):
            yield Malformed(source.path, number, fields)
            continue
        if names is None or not set(names) <= set(fields):
            try:
                names = columns_of(list(fields), task, columns)
            except ValueError as error:
                if names is None or not _promised(source):
                    yield Malformed(source.path, number, str(error), asked_for=_promised(source))
                    continue
        yield _record(fields, names, source.path, number)
    if number is None:
        yield Malformed(source.path, None, "it is empty", asked_for=False)


def _promised(source: Source) -> bool:
    """Whether the file is asked to hold texts: by its name, or by that of its kind."""
    return source.named or source.path.name.lower().endswith(LINES)


def _record(
    fields: Mapping[str, Any], names: tuple[str, ...], path: Path, number: int
) -> TextRecord | Malformed:
    for name in names:
        if reason := _fault(fields, name):
            return Malformed(path, number, reason, asked_for=reason != _empty(name))
    return TextRecord(tuple(fields[name] for name in names), path, number)


def _fault(fields: Mapping[str, Any], name: str) -> str | None:
    """Why a column holds no usable text, or None."""
    if name not in fields:
        return f"it has no column {name!r}, only {', '.join(map(repr, fields)) or 'an empty object'}"
    text = fields[name]
    if text is None:  # as pandas and Hugging Face datasets write a text that is not there
        return _empty(name)
    if not isinstance(text, str):
        return f"its column {name!r} holds {type(text).__name__}, not text"
    if not text.strip():
        return _empty(name)
    if "\0" in text:
        return f"its column {name!r} has a null character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"its column {name!r} is not Unicode text: it has half a surrogate pair"
    return None


def _empty(name: str) -> str:
    """Why a row is left out that holds nothing: it is counted, and stops no run."""
    return f"its column {name!r} is empty"


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
    try:
        names = columns_of(list(rows.column_names), task, columns)
    except ValueError as error:
        raise ValueError(f"data.columns: {path}: {error}") from error
    if missing := sorted(set(names) - set(rows.column_names)):
        raise ValueError(
            f"data.columns: {path} has no column {', '.join(missing)}, only {', '.join(rows.column_names)}"
        )
    for number, row in enumerate(rows.select_columns(list(names)), 1):
        yield _record(row, names, path, number)
