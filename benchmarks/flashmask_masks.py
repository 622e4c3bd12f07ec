"""The twelve masks of FlashMask's kernel benchmark, each an expression over our tokens.

What a pattern needs to know of a token is in its two fields: `position`, and `segment`, which is a
document's number where there are documents, and whatever number else a pattern compares. At 8,192 tokens
sizes are FlashMask's, and elsewhere in proportion. Random eviction is not: FlashMask draws bounds of its own,
and here a cache of half the tokens is drawn from.

Reference: Wang et al. 2024, "FlashMask", arXiv:2410.01359, figure 1 and its kernel benchmark.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dynmask_jax import Causal, Everything, Mask, Predicate, Prefix, SameSegment, Sinks, Tokens, Window

GLOBALS = 16
DOCUMENTS = (2_538 / 8_192, 1_742 / 8_192, 3_912 / 8_192)
"""Shares of the sequence: FlashMask's 2,538, 1,742 and 3,213 tokens; the last takes its padding of 699."""
PREFIXES = (1_024 / 2_538, 1.0, 512 / 3_912)
"""Shares of each document: FlashMask's prefixes of 1,024, 1,742 and 512 tokens."""
GAPS = ((1_024 / 8_192, 538 / 8_192), (2_358 / 8_192, 1_700 / 8_192))
"""Start and length, as shares of the sequence."""
PARTS = 4
"""Segments that a shared question and its answers take: number, and room for three answers."""


@dataclass(frozen=True)
class Pattern:
    """A mask, and the tokens it is meant for."""

    mask: Mask
    tokens: Tokens


def full(tokens: int) -> Pattern:
    """Every pair."""
    return Pattern(Everything(), Tokens.sequence(tokens))


def causal(tokens: int) -> Pattern:
    """k ≤ q."""
    return Pattern(Causal(), Tokens.sequence(tokens))


def sliding_window(tokens: int) -> Pattern:
    """0 ≤ q − k < T/8."""
    return Pattern(Causal() & Window(tokens // 8), Tokens.sequence(tokens))


def causal_document(tokens: int) -> Pattern:
    """k ≤ q, in one document."""
    return Pattern(Causal() & SameSegment(), Tokens.packed(lengths(tokens)))


def document(tokens: int) -> Pattern:
    """Both ways, in one document."""
    return Pattern(SameSegment(), Tokens.packed(lengths(tokens)))


def share_question(tokens: int) -> Pattern:
    """k ≤ q, in one document of a question and answers: an answer sees the question and itself.

    Two documents, each the first part of `lengths` a question and the others its answers. Segment
    PARTS·d is the question of document d = 1, 2, …; PARTS·d + a is its a-th answer.
    """
    half = tokens // 2
    parts = [*lengths(half), *lengths(tokens - half)]
    numbers = [PARTS * d + part for d in (1, 2) for part in range(3)]
    segment = np.repeat(numbers, parts)
    shared = Predicate(_in_question_or_own_answer, PARTS)
    return Pattern(Causal() & shared, Tokens(np.arange(tokens), segment))


def _in_question_or_own_answer(q, k, parts):
    same_document = q.segment // parts == k.segment // parts
    in_question = k.segment % parts == 0
    return same_document & (in_question | (q.segment == k.segment))


def global_sliding_window(tokens: int) -> Pattern:
    """|q − k| ≤ T/16; and the first 16 tokens see all and are seen by all. BigBird's and Longformer's."""
    near = Window(tokens // 16 + 1, ahead=tokens // 16)
    return Pattern(near | Sinks(GLOBALS) | Predicate(_from_first, GLOBALS), Tokens.sequence(tokens))


def _from_first(q, k, count):
    return q.position < count


def causal_blockwise(tokens: int) -> Pattern:
    """k ≤ q, in one demonstration; the last one, the question, sees all. In-context learning."""
    parts = lengths(tokens)
    segment = np.repeat(np.arange(1, len(parts) + 1), parts)
    asks = Predicate(_from_segment, len(parts))
    return Pattern(Causal() & (SameSegment() | asks), Tokens(np.arange(tokens), segment))


def _from_segment(q, k, last):
    return q.segment == last


def prefix_lm_document(tokens: int) -> Pattern:
    """In one document: all of its prefix, and k ≤ q. A prefix has negative positions."""
    parts = lengths(tokens)
    prefixes = [round(share * part) for share, part in zip(PREFIXES, parts, strict=True)]
    position = [np.arange(part) - prefix for part, prefix in zip(parts, prefixes, strict=True)]
    segment = np.repeat(np.arange(1, len(parts) + 1), parts)
    return Pattern(SameSegment() & (Causal() | Prefix(0)), Tokens(np.concatenate(position), segment))


def prefix_lm_causal(tokens: int) -> Pattern:
    """k < T/8, or k ≤ q."""
    return Pattern(Causal() | Prefix(tokens // 8), Tokens.sequence(tokens))


def qk_sparse(tokens: int) -> Pattern:
    """k ≤ q, save between two tokens of one gap: what a gap's queries see ends where the gap begins.

    The gaps are segments 1 and 2, all else segment 0, which is of no segment.
    """
    position = np.arange(tokens)
    segment = np.zeros(tokens, np.int32)
    for number, (start, length) in enumerate(GAPS, start=1):
        first, last = round(start * tokens), round((start + length) * tokens)
        segment[first:last] = number
    return Pattern(Causal() & ~SameSegment(), Tokens(position, segment))


def random_eviction(tokens: int) -> Pattern:
    """k ≤ q, until k is evicted: a cache of T/2 keys, from which each later query drops one at random.

    `segment` is the first query that a key is hidden from: the pattern is random, and needs a number
    for each key, as FlashMask's own column bounds do.
    """
    evicted = Predicate(_before_eviction)
    return Pattern(Causal() & evicted, Tokens(np.arange(tokens), eviction(tokens, tokens // 2)))


def _before_eviction(q, k):
    return q.position < k.segment


def eviction(tokens: int, budget: int, seed: int = 0) -> np.ndarray:
    """The query `[T]` from which each key is gone: T for those kept. From `budget` on, one each query.

    A key is dropped before its query looks, and never its own, so that each query from `budget` on
    sees `budget` keys.
    """
    draw = np.random.default_rng(seed)
    gone, held = np.full(tokens, tokens), list(range(budget))
    for query in range(budget, tokens):
        dropped = int(draw.integers(len(held)))
        gone[held[dropped]] = query
        held[dropped] = query
    return gone


def lengths(tokens: int, shares: Sequence[float] = DOCUMENTS) -> list[int]:
    """The sequence cut into documents of these shares; the last takes what rounding leaves."""
    ends = [round(float(end) * tokens) for end in np.cumsum(shares)]
    return np.diff([0, *ends[:-1], tokens]).tolist()


PATTERNS: dict[str, Callable[[int], Pattern]] = {
    "full": full,
    "causal": causal,
    "sliding window": sliding_window,
    "causal document": causal_document,
    "document": document,
    "share question": share_question,
    "global sliding window": global_sliding_window,
    "causal blockwise": causal_blockwise,
    "prefix-LM document": prefix_lm_document,
    "prefix-LM causal": prefix_lm_causal,
    "QK-sparse": qk_sparse,
    "random eviction": random_eviction,
}
