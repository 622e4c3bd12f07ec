"""What a mask may know of a query or a key: its position, and the packed document it belongs to."""

import operator
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from dynmask_jax.array_typing import fits_int32, is_concrete, pytree
from dynmask_jax.spans import Span


@pytree
class Tokens:
    """The tokens of one sequence `[T]`, or of a batch of sequences `[B, T]`.

    Attributes:
      position: whole numbers; a mask compares them, so any origin and any order will do.
      segment: the document that a token belongs to, counted from 1; 0 is padding. Left out, every
        token is of segment 1. A padding mask of 0 and 1, as Hugging Face's, is such a segment. Ids that
        count documents from 0, as splash attention's may, need 1 added.

    Both have one shape; they are kept as int32. Inside a plan the fields are `Span`s instead: the
    range that each takes over a block.

    Raises:
      ValueError: position and segment differ in shape, or a segment is negative.
      TypeError: a field is not of integers.

    >>> Tokens.packed([2, 3], length=6)[1:].segment.tolist()
    [1, 2, 2, 2, 0]
    """

    position: Any
    segment: Any = None

    __iter__ = None  # indexing alone would make Python iterate without end

    def __post_init__(self):
        if isinstance(self.position, Span):
            return
        position = _whole("position", self.position)
        segment = jnp.ones_like(position) if self.segment is None else _whole("segment", self.segment)
        if position.shape != segment.shape:
            raise ValueError(
                f"position and segment must have one shape, got {position.shape} and {segment.shape}"
            )
        given = self.segment is not None and is_concrete(segment) and segment.size
        if given and (least := int(segment.min())) < 0:
            raise ValueError(f"segment must count documents from 1, with 0 for padding, got {least}")
        object.__setattr__(self, "position", position)
        object.__setattr__(self, "segment", segment)

    def __getitem__(self, index) -> "Tokens":
        """The tokens at `index`, as indexing an array of them would give: `tokens[:, None]`."""
        return Tokens(self.position[index], self.segment[index])

    @property
    def shape(self) -> tuple[int, ...]:
        """`(T,)` or `(B, T)`."""
        return self.position.shape

    @classmethod
    def sequence(cls, length: int, *, start: int = 0) -> "Tokens":
        """`length` tokens of one document, at positions start, start + 1, …: `[T]`."""
        return cls(jnp.arange(start, start + length, dtype=jnp.int32))

    @classmethod
    def packed(cls, lengths: Sequence[int], *, length: int | None = None) -> "Tokens":
        """Documents laid end to end in one row, `[T]`.

        Args:
          lengths: tokens in each document. They become the segments 1, 2, ….
          length: tokens in the row, T. What the documents leave over at the end is padding: segment
            0. By default just what they need.

        Positions count from 0 within each document, and within the padding.

        Raises:
          TypeError: a length is no whole number: one row is packed at a time.
          ValueError: a length is below 1, or together they exceed `length`.

        >>> tokens = Tokens.packed([2, 3], length=6)
        >>> tokens.position.tolist(), tokens.segment.tolist()
        ([0, 1, 0, 1, 2, 0], [1, 1, 2, 2, 2, 0])
        """
        lengths = [_length(each) for each in lengths]
        if any(n < 1 for n in lengths):
            raise ValueError(f"lengths must each be at least 1, got {list(lengths)}")
        total = sum(lengths)
        length = total if length is None else length
        if total > length:
            raise ValueError(f"lengths sum to {total}, more than the row's length {length}")
        counts = [*lengths, length - total]
        segment = np.repeat([*range(1, len(lengths) + 1), 0], counts)
        position = np.concatenate([np.arange(count) for count in counts])
        return cls(jnp.asarray(position, jnp.int32), jnp.asarray(segment, jnp.int32))


def _length(value) -> int:
    try:
        if not isinstance(value, bool) and np.ndim(value) == 0:
            return operator.index(value)
    except TypeError:
        pass
    batch = "jax.tree.map(lambda *rows: jnp.stack(rows), *map(Tokens.packed, batch))"
    remedy = f"; for a batch of rows of equal length: {batch}" if np.ndim(value) else ""
    raise TypeError(f"lengths must be whole numbers, got {value!r}{remedy}")


def _whole(name: str, values):
    dtype = jnp.result_type(values) if hasattr(values, "dtype") else np.asarray(values).dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        padding = name == "segment" and dtype == np.dtype(bool)
        remedy = ": a mask of padding is .astype(int)" if padding else ""
        raise TypeError(f"{name} must hold integers, got {dtype}{remedy}")
    if is_concrete(values) and np.size(values) and not fits_int32(values):
        raise ValueError(f"{name} must fit int32, got {np.min(values)} … {np.max(values)}")
    return jnp.asarray(values).astype(jnp.int32)


def check_tokens(q_tokens, kv_tokens):
    """Refuses what cannot be the queries and keys of one batch.

    Raises:
      TypeError: one is not `Tokens`.
      ValueError: one is neither `[T]` nor `[B, T]` or has no tokens, or the batches differ.
    """
    for name, tokens in (("q_tokens", q_tokens), ("kv_tokens", kv_tokens)):
        if not isinstance(tokens, Tokens):
            raise TypeError(f"{name} must be Tokens (Tokens.sequence(T), say), got {type(tokens).__name__}")
        if len(tokens.shape) not in (1, 2) or 0 in tokens.shape:
            raise ValueError(f"{name} must have shape [T] or [B, T], none of them 0, got {tokens.shape}")
    batches = {tokens.shape[0] for tokens in (q_tokens, kv_tokens) if len(tokens.shape) == 2}
    if len(batches) > 1:
        raise ValueError(
            f"q_tokens and kv_tokens must have one batch size, got {q_tokens.shape} and {kv_tokens.shape}"
        )
