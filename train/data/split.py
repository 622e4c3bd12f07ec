"""Which documents are trained on and which are held out."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int

from train.data.rows import Spans
from train.data.token_cache import TokenCache


@dataclass(frozen=True)
class Split:
    """Documents of a cache, in the order of training.

    Attributes:
      spans: their tokens.
      documents: their numbers in the cache.
    """

    spans: Spans
    documents: Int[np.ndarray, " n"]


def everything(cache: TokenCache, seed: int) -> Split:
    """All documents, shuffled by the seed."""
    order = np.random.default_rng(seed).permutation(len(cache.documents))
    return Split(Spans(cache.starts[order], cache.stops[order]), order)


def hold_out(whole: Split, share: float, counted_by: Literal["tokens", "documents"]) -> tuple[Split, Split]:
    """The documents to train on, and the last share of the tokens or of the documents, to hold out.

    Raises:
      ValueError: the share is of documents, and there are fewer than two.
    """
    return {"tokens": by_tokens, "documents": by_documents}[counted_by](whole, share)


def by_tokens(whole: Split, held_out: float) -> tuple[Split, Split]:
    """The first documents to train on, and those with the last share of the tokens to hold out.

    A document across the cut is divided, unless a side would keep a single token of it.
    """
    spans = whole.spans
    lengths = spans.stops - spans.starts
    stops = np.cumsum(lengths)
    cut = int(stops[-1]) - round(int(stops[-1]) * held_out)
    over = int(np.searchsorted(stops, cut, side="right"))  # the document across the cut
    if over == len(whole.documents):
        return whole, _part(whole, slice(0, 0))
    inside = cut - int(stops[over] - lengths[over])
    if inside < 2 or lengths[over] - inside < 2:
        first = over + int(inside >= 2)
        return _part(whole, slice(0, first)), _part(whole, slice(first, None))
    train, rest = _part(whole, slice(0, over + 1)), _part(whole, slice(over, None))
    middle = spans.starts[over] + inside
    train_spans = Spans(train.spans.starts, np.append(train.spans.stops[:-1], middle))
    rest_spans = Spans(np.insert(rest.spans.starts[1:], 0, middle), rest.spans.stops)
    return Split(train_spans, train.documents), Split(rest_spans, rest.documents)


def by_documents(whole: Split, held_out: float) -> tuple[Split, Split]:
    """The first documents to train on, and the last share of them, at least one, to hold out.

    Raises:
      ValueError: there are fewer than two.
    """
    count = len(whole.documents)
    if count < 2:
        raise ValueError(
            f"data.paths has too few examples: {count}, and one is needed to train on and one to hold out"
        )
    first = count - min(count - 1, max(1, round(count * held_out)))
    return _part(whole, slice(0, first)), _part(whole, slice(first, None))


def _part(split: Split, part: slice) -> Split:
    spans = Spans(split.spans.starts[part], split.spans.stops[part])
    return Split(spans, split.documents[part])
