"""All documents as tokens, in one memory-mapped array that is written once and reused by later runs."""

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from jaxtyping import Int

from train.config.run import Run, TaskName
from train.data.columns import check_columns
from train.data.pair_layout import PairLayout
from train.data.records import place, records
from train.data.sources import Source, files, sources, standard_library
from train.data.tasks import task_of
from train.data.token_writer import DOCUMENT, DOCUMENTS, FACTS, TEXTS, TOKENS, encode_records, write, writing
from train.data.tokenizers import Tokenizer

VERSION = 4  # of the files; a cache of another version is not read
UNFINISHED = ".unfinished-"
CLAIM = ".claim-"
ABANDONED = 24 * 3600  # seconds without a write after which an unfinished folder is deleted


@dataclass(frozen=True)
class TokenCache:
    """The tokens of documents: text, end; or document, end, summary, end.

    Attributes:
      tokens: of all documents, one after the other, memory-mapped.
      documents: a `DOCUMENT` for each, memory-mapped.
      texts: UTF-8 of the documents and summaries, memory-mapped; None for texts without summaries.
      files: that were read; the field `file` of a `DOCUMENT` is an index into it.
      malformed: texts left out because they cannot be read.
      reports: the first few of these in words.
      fingerprint: hash of the tokens and of the documents' bounds.
      kinds: how many files of each kind of `Source` gave documents.
      first: how the first document begins.
      unknown: share of the text's bytes, without white space, that the tokenizer does not spell.
    """

    tokens: Int[np.ndarray, " tokens"]
    documents: np.ndarray
    texts: np.ndarray | None
    files: tuple[str, ...]
    malformed: int
    reports: tuple[str, ...]
    fingerprint: str
    kinds: Mapping[str, int]
    first: str
    unknown: float

    @property
    def starts(self) -> Int[np.ndarray, " documents"]:
        """The first token of each document."""
        return np.concatenate([[0], self.documents["stop"][:-1]])

    @property
    def stops(self) -> Int[np.ndarray, " documents"]:
        """The token after each document's last, which is its end token."""
        return np.array(self.documents["stop"])

    @property
    def bodies(self) -> Int[np.ndarray, " documents"]:
        """The tokens of each document before its first end token."""
        return np.array(self.documents["body"])

    @property
    def summary_words(self) -> Int[np.ndarray, " documents"]:
        """The words of each summary."""
        return np.array(self.documents["summary_words"])

    @property
    def pairs(self) -> bool:
        """Whether documents have summaries."""
        return self.texts is not None

    @property
    def size(self) -> int:
        """Bytes of text."""
        return int(self.documents["text_stop"][-1])

    def origin(self, index: int) -> str:
        """The file, and the line where it has several, that a document was read from."""
        document = self.documents[index]
        return place(self.files[document["file"]], int(document["line"]) or None)

    def pair(self, index: int) -> tuple[str, str]:
        """A document and its summary, as text."""
        assert self.texts is not None
        start = int(self.documents["text_stop"][index - 1]) if index else 0
        stop = int(self.documents["text_stop"][index])
        middle = stop - int(self.documents["summary_bytes"][index])
        return self.texts[start:middle].tobytes().decode(), self.texts[middle:stop].tobytes().decode()


def token_caches(run: Run, tokenizer: Tokenizer, layout: PairLayout | None) -> list[TokenCache]:
    """The tokens of data.paths; and, where there are data.held_out_paths, a second cache of theirs.

    Args:
      run: the config.
      tokenizer: of the tokens.
      layout: how pairs are encoded; None for a task without them.

    Raises:
      FileNotFoundError: a path does not exist.
      OSError, ValueError: see `token_cache`; data.columns names a column that the task does not read; a file
        is in both paths; or the task needs paths and there are none.
    """
    data, needs = run.data, task_of(run).needs
    check_columns(run.task, data.columns)
    if needs and not data.paths:
        raise ValueError(f"data.paths: {run.task} needs {needs}, and has no text of its own")
    found = [sources(data.paths) if data.paths else standard_library()]
    if data.held_out_paths:
        found.append(sources(data.held_out_paths, "data.held_out_paths"))
        _check_disjoint(*found)
    folder = Path(data.cache or Path(run.folder) / "cache")
    options = {"layout": layout, "skip_malformed": data.skip_malformed}
    caches = [token_cache(each, run.task, data.columns, tokenizer, folder, **options) for each in found]
    for cache, option in zip(caches, ("data.paths", "data.held_out_paths"), strict=False):
        if cache.unknown > data.unknown:
            raise ValueError(
                f"data.tokenizer: {data.tokenizer} cannot spell {cache.unknown:.1%} of the text of {option}, "
                f"and data.unknown allows {data.unknown:.1%}: take another, such as one that `python -m "
                "train tokenizer` trains on these texts, or bytes; or raise --data.unknown"
            )
    return caches


def _check_disjoint(train: list[Source], held_out: list[Source]):
    """Refuses a file that is both trained on and held out."""
    paths = [{each.path.resolve() for each in found if each.kind != "none"} for found in (train, held_out)]
    if both := paths[0] & paths[1]:
        raise ValueError(f"data.held_out_paths: {min(both)} is in data.paths too")


def token_cache(
    found: Sequence[Source],
    task: TaskName,
    columns: Mapping[str, str],
    tokenizer: Tokenizer,
    folder: Path,
    *,
    layout: PairLayout | None = None,
    skip_malformed: bool = False,
) -> TokenCache:
    """The sources' documents as tokens: from the cache, or read, encoded and written to it.

    A cache is keyed by the files' paths, sizes and times of change and by all other arguments. A finished
    cache is moved to its name in `folder` in one step, so an interrupted one is never read. Of several
    processes that need the same cache, the first makes it and the others wait. On a file system without locks
    each process makes one, and the first to finish is used. The texts and the tokens are never all in memory
    at the same time.

    Raises:
      ValueError: a text is malformed (see `records`) and not to be skipped; there is no text; a text holds
        the tokenizer's end token; or the cache is damaged.
      OSError: a file cannot be read, or changed meanwhile; or `folder` cannot be written to.
    """
    asked = [VERSION, task, sorted(columns.items()), tokenizer.fingerprint, tokenizer.end, skip_malformed]
    asked += layout.key if layout is not None else []
    key = _key(asked, found)
    finished = folder / key
    if not finished.exists():
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _delete_abandoned(folder)
        with _claimed(folder / f"{CLAIM}{key}"), _unfinished(folder) as unfinished:
            if not finished.exists():  # another process may have been first
                documents = encode_records(records(found, task, columns), tokenizer, layout)
                write(documents, found, tokenizer, unfinished, skip_malformed)
                if _key(asked, found) != key:
                    raise OSError("data.paths: files changed while they were read")
                _move(unfinished, finished)
    return _open(finished)


@contextmanager
def _claimed(path: Path) -> Iterator[None]:
    """Locks the claim file; waits while another live process has it locked."""
    with writing(path.parent):
        claim = path.open("wb")
    with claim:
        with suppress(OSError):  # the file system has no locks
            fcntl.flock(claim, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # waiting processes have the file open


@contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """A folder to make a cache in; it is deleted afterwards, unless it was moved to its name."""
    unfinished = folder / f"{UNFINISHED}{uuid4().hex}"
    with writing(folder):
        unfinished.mkdir()
    try:
        yield unfinished
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _key(asked: list[Any], found: Sequence[Source]) -> str:
    """The name of a cache's folder: what is asked of these sources, as they are now."""
    seen = []
    for source in found:
        if source.kind == "none":  # nothing is read of it
            seen.append([str(source.path), source.reason, source.named])
            continue
        for path in files(source):
            stat = path.stat()
            seen.append([str(path.resolve()), stat.st_size, stat.st_mtime_ns, source.kind, source.named])
    return hashlib.sha256(json.dumps([*asked, seen]).encode()).hexdigest()[:32]


def _move(unfinished: Path, finished: Path):
    """Moves a finished cache to its name, unless another process was first."""
    try:
        unfinished.rename(finished)
    except OSError as error:
        if not finished.exists():
            raise OSError(f"data.cache: {finished} cannot be made: {error}") from error


def _delete_abandoned(folder: Path):
    """Deletes the unfinished folders of killed processes."""
    for left in folder.glob(UNFINISHED + "*"):
        try:
            last = max(path.stat().st_mtime for path in [left, *left.iterdir()])
        except FileNotFoundError:  # its process has just finished it
            continue
        if time.time() - last > ABANDONED:
            shutil.rmtree(left, ignore_errors=True)


def _open(folder: Path) -> TokenCache:
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in (TOKENS, DOCUMENTS, TEXTS)}
    except (FileNotFoundError, ValueError) as error:
        raise _damaged(folder, f"it has no whole {FACTS}, or a file is missing") from error
    shapes = {
        TOKENS: (np.dtype(facts["dtype"]), facts["tokens"]),
        DOCUMENTS: (DOCUMENT, facts["documents"]),
        TEXTS: (np.dtype(np.uint8), facts["texts"]),
    }
    arrays = {}
    for name, (dtype, count) in shapes.items():
        if sizes[name] != dtype.itemsize * count:
            raise _damaged(folder, f"{name} has {sizes[name]:,} bytes, not {dtype.itemsize * count:,}")
        arrays[name] = np.memmap(folder / name, dtype, "r", shape=(count,)) if count else None
    return TokenCache(
        arrays[TOKENS],
        arrays[DOCUMENTS],
        arrays[TEXTS],
        tuple(facts["files"]),
        facts["malformed"],
        tuple(facts["reports"]),
        facts["fingerprint"],
        facts["kinds"],
        facts["first"],
        facts["unknown"],
    )


def _damaged(folder: Path, fault: str) -> ValueError:
    return ValueError(f"data.cache: {folder} is damaged, {fault}: delete it, and it is made again")
