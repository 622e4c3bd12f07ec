"""The text: files in, rows of tokens out. A token is a byte."""

import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grain
import numpy as np

from train import config

VOCABULARY = 256
SEPARATOR = b"\0"  # between documents; text has none of its own


class Rows:
    """Rows of `length + 1` tokens, cut every `length`, so that each token but the first is a target once.

    A `grain` source: it has a length and gives row i as int32 `[length + 1]`.
    """

    def __init__(self, text: np.ndarray, length: int):
        self._text, self._length = text, length

    def __len__(self) -> int:
        return (len(self._text) - 1) // self._length

    def __getitem__(self, index) -> np.ndarray:
        start = int(index) * self._length
        return self._text[start : start + self._length + 1].astype(np.int32)


@dataclass(frozen=True)
class Corpus:
    """Rows to train on and rows held out.

    Attributes:
      train: the batch of global step i at index i, `[batch, length + 1]` int32: reshuffled in each
        epoch, without end, a function of the seed and i alone. So a resumed run reads on exactly
        where it stopped.
      held_out: the rows of the last `held_out` share of the bytes.
      size: bytes in both together.
    """

    train: grain.MapDataset
    held_out: Rows
    size: int


def corpus(data: config.Data, seed: int) -> Corpus:
    """Reads the paths, or the default text, and cuts it into rows.

    Args:
      data: paths, and the rows' shape.
      seed: of the order of documents, and of rows.

    Raises:
      FileNotFoundError: a path does not exist.
      ValueError: a named file is not text, or there is too little text for a row to train on and a
        row to hold out.
    """
    found = texts(data.paths) if data.paths else (file.read_bytes() for file in standard_library())
    documents = [text for text in found if text]
    if not documents:
        raise ValueError(
            f"data.paths has no text: {', '.join(data.paths) or 'the standard library is empty'}"
        )
    order = np.random.default_rng(seed).permutation(len(documents))
    text = np.frombuffer(SEPARATOR.join(documents[i] for i in order), np.uint8)
    cut = len(text) - round(len(text) * data.held_out)
    train, held_out = Rows(text[:cut], data.length), Rows(text[cut:], data.length)
    for purpose, rows, size in (("train on", train, cut), ("hold out", held_out, len(text) - cut)):
        if not len(rows):
            raise ValueError(
                f"data.paths has too little text to {purpose}: {size} bytes of {len(text)}, and a row needs "
                f"data.length + 1 = {data.length + 1}"
            )
    batches = grain.MapDataset.source(train).seed(seed).shuffle().repeat().batch(data.batch)
    return Corpus(batches, held_out, len(text))


def texts(paths: Iterable[str]) -> Iterator[bytes]:
    """The text of each file, and of the files in each folder and below it, sorted.

    In a folder, hidden files and those that are not text are left out.

    Raises:
      FileNotFoundError: a path does not exist.
      ValueError: a file named itself is not text: UTF-8 without null bytes.
    """
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"data.paths: {path} does not exist")
        if path.is_dir():
            contents = (file.read_bytes() for file in files_below(path))
            yield from (content for content in contents if _fault(content) is None)
        else:
            content = path.read_bytes()
            if fault := _fault(content):
                raise ValueError(f"data.paths: {path} is not text: {fault}")
            yield content


def files_below(folder: Path) -> list[Path]:
    """The files in a folder and below it, sorted, without the hidden ones."""

    def hidden(path: Path) -> bool:
        return any(part.startswith(".") for part in path.relative_to(folder).parts)

    return sorted(path for path in folder.rglob("*") if path.is_file() and not hidden(path))


def standard_library() -> list[Path]:
    """The source files of Python's standard library, without its tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests"}
    return sorted(p for p in root.rglob("*.py") if not left_out & set(p.relative_to(root).parts))


def held_out_rows(rows: Rows, most: int) -> list[np.ndarray]:
    """At most so many of the rows, evenly spaced, each a batch of its own: `[1, length + 1]`."""
    count = min(most, len(rows))
    return [rows[i * len(rows) // count][None] for i in range(count)]


def _fault(content: bytes) -> str | None:
    """Why some bytes are not text, or None where they are."""
    if SEPARATOR in content:
        return "it has null bytes"
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"it is not UTF-8 ({error})"
    return None
