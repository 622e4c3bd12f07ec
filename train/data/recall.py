"""Synthetic text for recall: keys whose values are told once and asked for again, from near and from far.

A document is a line of slots. A slot is a key, one byte, and its value, some capital letters; or it is empty,
as many dots. Each document draws its own values, so a value can only be known from an earlier occurrence of
its key. How far back the last one is, is log-uniform: each doubling of the distance is as frequent. With
values of one letter this is multi-query associative recall (Arora et al. 2023, "Zoology", arXiv:2312.04927);
with more letters the rest of a value is copied.
"""

import heapq
import json
import math
import random
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dynmask_jax.array_typing import Int
from train.config.checks import at_least
from train.disk import write_atomically

KEYS = string.digits + string.ascii_lowercase + "!#$%&()*+,-/:;<=>?@[]^_{|}~"
VALUES = string.ascii_uppercase
EMPTY = "."


@dataclass(frozen=True)
class Recall:
    """Documents of one byte a token, all of one length.

    Attributes:
      documents: to train on.
      held_out: documents for validation, of other values.
      keys: different keys in a document, at most `len(KEYS)`.
      letters: of a value.
      seed: of all that is drawn.
    """

    documents: int = 1_000
    held_out: int = 64
    keys: int = 16
    letters: int = 1
    seed: int = 0

    def __post_init__(self):
        at_least("recall.", self, documents=1, held_out=1, keys=1, letters=1, seed=0)
        if self.keys > len(KEYS):
            raise ValueError(f"recall.keys must be at most {len(KEYS)}, got {self.keys}")


def document(options: Recall, length: int, draw: random.Random) -> str:
    """A document of `length` bytes; the last slot may be cut.

    Raises:
      ValueError: the length does not hold two slots.

    >>> document(Recall(keys=2, letters=1), 24, random.Random(1))
    '8W..!T8W......!T!T!T8W..'
    """
    slot = 1 + options.letters
    if length < 2 * slot:
        raise ValueError(
            f"data.length must hold two slots of 1 + recall.letters = {slot} bytes, got {length}"
        )
    slots = -(-length // slot)
    keys = draw.sample(KEYS, options.keys)
    values = {key: "".join(draw.choices(VALUES, k=options.letters)) for key in keys}
    due = [(_gap(slots, draw) - 1, key) for key in keys]
    heapq.heapify(due)
    parts = []
    for number in range(slots):
        if due[0][0] > number:
            parts.append(EMPTY * slot)
            continue
        _, key = heapq.heappop(due)
        parts.append(key + values[key])
        heapq.heappush(due, (number + _gap(slots, draw), key))
    return "".join(parts)[:length]


def write_recall(folder: Path, options: Recall, length: int) -> tuple[Path, Path]:
    """Writes the documents to train on and those for validation, as JSON lines; what exists is replaced.

    Returns:
      the two files, for `data.paths` and `data.held_out_paths`: with `data.length` equal to `length`, or the
      double, quadruple …, each document fills its row or its part of it.
    """
    draw = random.Random(options.seed)
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "recall.jsonl", folder / "recall-held-out.jsonl"
    for path, count in zip(files, (options.documents, options.held_out), strict=True):
        lines = (json.dumps({"text": document(options, length, draw)}) for _ in range(count))
        write_atomically(path, "".join(f"{line}\n" for line in lines))
    return files


def distances(inputs: Int[np.ndarray, "B T"], segments: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
    """How far back the key's last occurrence is, in tokens, where the target is a letter of its value.

    Elsewhere, and where a key is new in its document, it is 0.

    Args:
      inputs: bytes of documents as `document` makes them; each token's target is the next one.
      segments: which document each is of.

    >>> tokens = np.frombuffer(b"aXbY..aX", np.uint8)[None].astype(np.int32)
    >>> distances(tokens, np.ones_like(tokens)).tolist()
    [[0, 0, 0, 0, 0, 0, 6, 0]]
    """
    found = np.zeros(inputs.shape, np.int32)
    for row, (tokens, parts) in enumerate(zip(inputs.tolist(), segments.tolist(), strict=True)):
        for place, distance in _answers(tokens, parts):
            found[row, place] = distance
    return found


def _answers(tokens: list[int], parts: list[int]) -> Iterator[tuple[int, int]]:
    """The places of a row whose targets are known from before, and how far back from."""
    keys, values = set(KEYS.encode()), set(VALUES.encode())
    last: dict[tuple[int, int], int] = {}
    distance = 0  # of the key at hand
    for place, (token, part) in enumerate(zip(tokens, parts, strict=True)):
        if token in keys:
            before = last.get((part, token))
            distance = 0 if before is None else place - before
            last[part, token] = place
        elif token not in values:
            distance = 0
        following = place + 1 < len(tokens) and parts[place + 1] == part and tokens[place + 1] in values
        if distance and following:
            yield place, distance


def _gap(slots: int, draw: random.Random) -> int:
    """Slots up to the next occurrence: 1 … `slots`, log-uniform."""
    return min(slots, math.floor(math.exp(draw.uniform(0.0, math.log(slots + 1)))))
