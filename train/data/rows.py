"""Tokens of documents, cut for rows: pieces and pairs that are packed together, or rows of a stream.

Each class is a `grain` source: it has a length, and an item is a dict of

  tokens: int32 `[L, 3]`: the input token, its target (the next token), and its position.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import SupportsIndex

import numpy as np
from jaxtyping import Int

from train.data.batch import Batch
from train.data.pair_layout import PairLayout
from train.data.token_cache import TokenCache

TOKENS, SEGMENTS, CONTEXT = "tokens", "tokens_segment_ids", "tokens_positions"  # as `grain` packs them
Item = dict[str, np.ndarray]
ByteCount = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Input tokens and their targets -> the bytes of text that each target spells: `Tokenizer.target_bytes`."""
REFUSED = 3  # documents that an error message names


@dataclass(frozen=True)
class Spans:
    """Ranges of a stream of tokens, `starts[i]` up to `stops[i]`, each within one document, in any order."""

    starts: Int[np.ndarray, " n"]
    stops: Int[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def tokens(self) -> int:
        """The number of tokens in all ranges."""
        return int((self.stops - self.starts).sum())


class DocumentPieces:
    """Documents cut into consecutive pieces of at most `length` targets.

    Pieces overlap by a token, so that each token but a document's first is a target once. Positions
    count from 0 in each piece.
    """

    loss_from = 0
    """The first position whose target is in the loss."""

    def __init__(self, tokens: np.ndarray, spans: Spans, length: int):
        self._tokens, self._spans, self._length = tokens, spans, length
        targets = spans.stops - spans.starts - 1
        self._stops = np.cumsum(-(-targets // length))  # pieces in the documents up to each, inclusive

    def __len__(self) -> int:
        return int(self._stops[-1]) if len(self._stops) else 0

    def __getitem__(self, index: SupportsIndex) -> Item:
        i = int(index)
        document = int(np.searchsorted(self._stops, i, side="right"))
        before = int(self._stops[document - 1]) if document else 0
        start = int(self._spans.starts[document]) + (i - before) * self._length
        stop = min(start + self._length + 1, int(self._spans.stops[document]))
        return _item(self._tokens[start:stop], first=0)


class Pairs:
    """Documents with their summaries, and around them the tokens of a layout.

    In every example the document ends just before position `length`.

    Args:
      tokens: of all examples, each document, end, summary, end.
      spans: of each example.
      bodies: tokens in each document.
      kept: the tokens that are read of each, from the document's start; see `fitting`.
      length: T; with `kept` every example fits.
      layout: what lies around documents and summaries.

    Attributes:
      loss_from: the position whose target is a summary's first token.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        spans: Spans,
        bodies: Int[np.ndarray, " n"],
        kept: Int[np.ndarray, " n"],
        length: int,
        layout: PairLayout,
    ):
        self._tokens, self._spans, self._length, self._layout = tokens, spans, length, layout
        self._bodies, self._kept, self.loss_from = bodies, kept, layout.loss_from(length)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: SupportsIndex) -> Item:
        i = int(index)
        start, stop, kept = int(self._spans.starts[i]), int(self._spans.stops[i]), int(self._kept[i])
        around, document = self._layout, self._tokens[start : start + kept]
        summary = self._tokens[start + int(self._bodies[i]) + 1 : stop - 1]  # between the ends
        parts = (around.before, document, around.between, summary, around.after)
        return _item(np.concatenate(parts), first=self._length - kept - len(around.before))


class Stream:
    """Documents end to end, cut into rows of `length` targets; an incomplete last row is left out.

    An item is a whole row: its segments are 1, its positions count from 0.
    """

    loss_from = 0
    """The first position whose target is in the loss."""

    def __init__(self, tokens: np.ndarray, spans: Spans, length: int):
        self._tokens, self._spans, self._length = tokens, spans, length
        self._stops = np.cumsum(spans.stops - spans.starts)

    def __len__(self) -> int:
        return max(0, self._spans.tokens - 1) // self._length

    def __getitem__(self, index: SupportsIndex) -> Item:
        start, parts, left = int(index) * self._length, [], self._length + 1
        document = int(np.searchsorted(self._stops, start, side="right"))
        while left:
            first = int(self._spans.stops[document] - self._stops[document]) + start
            part = self._tokens[first : min(first + left, int(self._spans.stops[document]))]
            parts.append(part)
            start, left, document = start + len(part), left - len(part), document + 1
        item = _item(np.concatenate(parts), first=0)
        return item | {
            SEGMENTS: np.ones(self._length, np.int32),
            CONTEXT: np.arange(self._length, dtype=np.int32),
        }


def alone(item: Item, length: int) -> Item:
    """A piece as a row of its own, of segment 1, filled up with padding."""
    count = len(item[TOKENS])
    row = {
        TOKENS: item[TOKENS],
        SEGMENTS: np.ones(count, np.int32),
        CONTEXT: np.arange(count, dtype=np.int32),
    }
    return {
        name: np.pad(each, [(0, length - count), *[(0, 0)] * (each.ndim - 1)]) for name, each in row.items()
    }


def fitting(
    cache: TokenCache, length: int, layout: PairLayout, truncate: bool
) -> Int[np.ndarray, " documents"]:
    """Tokens that are kept of each document of a pair, so that it fits a row with its summary.

    Args:
      cache: of pairs.
      length: T, tokens in a row.
      layout: what lies around documents and summaries.
      truncate: summarize.truncate, cut documents at their end.

    Raises:
      ValueError: an example does not fit and may not be cut, or its summary fills a row.
    """
    bodies = cache.bodies
    summaries = cache.stops - cache.starts - bodies - 2
    room = length - summaries - layout.size
    too_long = np.flatnonzero(room < (1 if truncate else bodies))
    if not len(too_long):
        return np.minimum(bodies, room)
    named = "; ".join(
        f"{cache.origin(i)}: a document of {bodies[i]:,} tokens and a summary of {summaries[i]:,}"
        for i in too_long[:REFUSED]
    )
    more = f"; and {len(too_long) - REFUSED:,} more" if len(too_long) > REFUSED else ""
    needed = int((bodies + summaries).max()) + layout.size
    remedy = (
        "with --summarize.truncate some of the document must fit beside its summary"
        if truncate
        else f"a row of {needed:,} holds all; --summarize.truncate cuts documents"
    )
    raise ValueError(
        f"data.length: {len(too_long):,} of {len(bodies):,} examples do not fit a row of {length:,} tokens "
        f"({named}{more}): {remedy}"
    )


def as_batch(rows: Mapping[str, np.ndarray], loss_from: int, byte_count: ByteCount) -> Batch:
    """The batch of packed rows.

    Args:
      rows: tokens `[B, T, 3]`, segments and context `[B, T]`.
      loss_from: the first position whose target is in the loss.
      byte_count: the bytes of text that each target spells.
    """
    inputs, targets, positions = (np.ascontiguousarray(rows[TOKENS][..., field]) for field in range(3))
    segments = rows[SEGMENTS]
    asked = (segments > 0) & (positions >= loss_from)
    context, weights = rows[CONTEXT], asked.astype(np.float32)
    return Batch(inputs, targets, weights, positions, segments, context, byte_count(inputs, targets))


def _item(ids: np.ndarray, first: int) -> Item:
    """The inputs and targets among some tokens, at positions from `first`."""
    positions = np.arange(first, first + len(ids) - 1)
    return {TOKENS: np.stack([ids[:-1], ids[1:], positions], axis=1).astype(np.int32)}
