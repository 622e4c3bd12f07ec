"""Records in, the files of a token cache out."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from train.data.pair_layout import PairLayout
from train.data.records import Malformed, TextRecord, place
from train.data.sources import Source
from train.data.tokenizers import Ids, Tokenizer
from train.data.words import word_count

DOCUMENT = np.dtype(
    [
        ("stop", "<i8"),  # the token after the document's last
        ("body", "<i8"),  # tokens before its first end
        ("text_stop", "<i8"),  # the byte after its last, of all documents' text
        ("summary_bytes", "<i8"),
        ("summary_words", "<i8"),
        ("file", "<i4"),
        ("line", "<i8"),  # 0 for a whole file
    ]
)
TOKENS, DOCUMENTS, TEXTS, FACTS = "tokens.bin", "documents.bin", "texts.bin", "facts.json"
REPORTS = 12  # files that are described of which something is left out
NAMED = 5  # files that a message names
FIRST = 100  # characters of the first document that are kept to show
BATCH = 1 << 22  # characters that are tokenized at a time
BATCH_RECORDS = 4096


def encode_records(
    items: Iterable[TextRecord | Malformed], tokenizer: Tokenizer, layout: PairLayout | None = None
) -> Iterator[tuple[TextRecord, list[Ids]] | Malformed]:
    """Each record with the tokens of its texts: one after the begin token, or a pair as the layout says."""
    for batch in _batches(items):
        encoded = _encoded([item.texts for item in batch if isinstance(item, TextRecord)], tokenizer, layout)
        for item in batch:
            if isinstance(item, Malformed):
                yield item
                continue
            parts = next(encoded)
            if any((part == tokenizer.end).any() for part in parts):
                raise ValueError(
                    f"data.end_token: the text of {place(item.path, item.line)} holds the end token "
                    f"(id {tokenizer.end}): name a token that no text can hold"
                )
            if item.line is not None and not all(map(len, parts)):
                yield Malformed(item.path, item.line, "the tokenizer makes no token of it")
            else:
                yield item, parts if len(parts) > 1 else [tokenizer.begun(parts[0])]


def _encoded(
    texts: list[tuple[str, ...]], tokenizer: Tokenizer, layout: PairLayout | None
) -> Iterator[list[Ids]]:
    """The tokens of each record's texts."""
    if layout is None:
        ids = iter(tokenizer.encode(list(chain.from_iterable(texts))) if texts else [])
        return ([next(ids) for _ in each] for each in texts)
    columns = (layout.encode(tokenizer, column, part) for part, column in enumerate(zip(*texts, strict=True)))
    return map(list, zip(*columns, strict=True))


def _batches(items: Iterable[TextRecord | Malformed]) -> Iterator[list[TextRecord | Malformed]]:
    batch, letters = [], 0
    for item in items:
        batch.append(item)
        letters += sum(map(len, item.texts)) if isinstance(item, TextRecord) else 0
        if letters >= BATCH or len(batch) == BATCH_RECORDS:
            yield batch
            batch, letters = [], 0
    if batch:
        yield batch


def write(
    documents: Iterable[tuple[TextRecord, list[Ids]] | Malformed],
    found: Sequence[Source],
    tokenizer: Tokenizer,
    folder: Path,
    skip_malformed: bool,
):
    """Writes the files of a cache.

    Raises:
      ValueError: a text is malformed and not to be skipped, or there is no text.
      OSError: the folder cannot be written to.
    """
    left_out = _LeftOut()
    with _Writer(folder, found, tokenizer) as writer:
        for item in documents:
            if not isinstance(item, Malformed):
                writer.add(*item)
                continue
            if item.asked_for and not skip_malformed:
                raise item.error()
            left_out.add(item)
        facts = writer.finish()
    if not facts["documents"]:
        others = (
            f"; {left_out.count} files or lines are left out: {left_out.reports()[0]}"
            if left_out.count
            else ""
        )
        named = ", ".join(str(source.path) for source in found[:NAMED])
        raise ValueError(f"data.paths has no text: {named or 'the folders are empty'}{others}")
    facts |= {"malformed": left_out.count, "reports": left_out.reports()}
    with writing(folder), (folder / FACTS).open("w", encoding="utf-8") as file:
        file.write(json.dumps(facts))
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Names the option data.cache in the error of a cache that cannot be written."""
    try:
        yield
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> OSError:
    return OSError(f"data.cache: tokens cannot be written to {folder}: {error}")


class _LeftOut:
    """What is left out, by file: a file of many bad lines is one line of the report."""

    def __init__(self):
        self.count = 0
        self._by_file: dict[Path, tuple[Malformed, int]] = {}

    def add(self, item: Malformed):
        """One more file or line."""
        first, count = self._by_file.get(item.path, (item, 0))
        self.count += 1
        self._by_file[item.path] = first, count + 1

    def reports(self) -> list[str]:
        """In words, whole files first; of many files the number of the rest."""
        files = sorted(self._by_file.values(), key=lambda each: each[0].line is not None)
        lines = [f"{first}; and {n - 1:,} more in this file" if n > 1 else str(first) for first, n in files]
        more = [f"and in {len(lines) - REPORTS:,} more files"] if len(lines) > REPORTS else []
        return [*lines[:REPORTS], *more]


class _Writer:
    """Appends documents to the files of a cache."""

    def __init__(self, folder: Path, found: Sequence[Source], tokenizer: Tokenizer):
        self._folder, self._sources, self._tokenizer = folder, found, tokenizer
        self._numbers = {str(source.path): number for number, source in enumerate(found)}
        self._read: set[int] = set()
        self._first = ""
        self._letters = self._spelled = 0
        self._dtype = np.min_scalar_type(tokenizer.vocabulary - 1)
        self._end = np.array([tokenizer.end], self._dtype).tobytes()
        self._hash = hashlib.sha256()
        self._document = np.zeros((), DOCUMENT)
        self._tokens = self._size = self._count = 0
        self._pairs = self._open = False

    def __enter__(self) -> "_Writer":
        with writing(self._folder):
            self._files = {name: (self._folder / name).open("wb") for name in (TOKENS, DOCUMENTS, TEXTS)}
        return self

    def __exit__(self, *_):
        for file in self._files.values():
            with writing(self._folder):
                file.close()

    def add(self, record: TextRecord, ids: list[Ids]):
        """Appends a record, which may be the next part of the current document."""
        texts = [text.encode() for text in record.texts]
        if record.part == 0:
            self._close_document()
            self._open, self._pairs = True, len(texts) == 2
            self._document["body"] = 0
            self._document["file"] = self._numbers[str(record.path)]
            self._document["line"] = record.line or 0
            self._read.add(int(self._document["file"]))
            self._first = self._first or " ".join(record.texts[0][: 8 * FIRST].split())[:FIRST]
        self._document["body"] += len(ids[0])
        self._put_tokens(ids[0].astype(self._dtype).tobytes())
        if self._pairs:
            self._document["summary_bytes"] = len(texts[1])
            self._document["summary_words"] = word_count(record.texts[1])
            self._put_tokens(self._end + ids[1].astype(self._dtype).tobytes())
            self._put(TEXTS, b"".join(texts))
        self._size += sum(map(len, texts))
        for text, part in zip(texts, ids, strict=True):
            letters = len(b"".join(text.split()))
            self._letters += letters
            self._spelled += min(letters, int(self._tokenizer.token_letters[part].sum()))

    def finish(self) -> dict[str, Any]:
        """Closes the last document; returns the facts about all of them."""
        self._close_document()
        with writing(self._folder):
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
        return {
            "tokens": self._tokens,
            "dtype": self._dtype.name,
            "documents": self._count,
            "texts": self._size if self._pairs else 0,
            "files": [str(source.path) for source in self._sources],
            "kinds": Counter(self._sources[number].kind for number in self._read),
            "first": self._first,
            "unknown": 1 - self._spelled / self._letters if self._letters else 0.0,
            "fingerprint": self._hash.hexdigest(),
        }

    def _close_document(self):
        if not self._open:
            return
        self._put_tokens(self._end)
        self._document["stop"], self._document["text_stop"] = self._tokens, self._size
        self._put(DOCUMENTS, self._document.tobytes())
        self._hash.update(np.array([self._tokens, self._document["body"]]).tobytes())
        self._count += 1
        self._open = False

    def _put_tokens(self, data: bytes):
        self._put(TOKENS, data)
        self._hash.update(data)
        self._tokens += len(data) // self._dtype.itemsize

    def _put(self, name: str, data: bytes):
        try:  # not `with writing`: a context manager would take a quarter of a short text's time
            self._files[name].write(data)
        except OSError as error:
            raise _unwritable(self._folder, error) from error
