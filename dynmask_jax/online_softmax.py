"""Softmax in pieces: attention over disjoint sets of keys, and the monoid that joins them.

Reference: Milakov & Gimelshein 2018, arXiv:1805.02867; as attention, Rabe & Staats 2021,
arXiv:2112.05682.
"""

from collections.abc import Callable
from typing import overload

import jax.numpy as jnp

from dynmask_jax.array_typing import Array, Float, pytree


@pytree
class Partial:
    """Attention over some of the keys, not yet normalised.

    Attributes:
      weighted: `[..., H]`, Σ exp(logit − peak) · value over the keys seen so far.
      peak: `[...]`, their greatest logit; −inf where none has been seen.
      total: `[...]`, Σ exp(logit − peak).
    """

    weighted: Float[Array, "... H"]
    peak: Float[Array, "..."]
    total: Float[Array, "..."]

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype) -> "Partial":
        """No keys at all: the neutral element of `merge`. `shape` is that of `weighted`."""
        rows = shape[:-1]
        return cls(jnp.zeros(shape, dtype), jnp.full(rows, -jnp.inf, dtype), jnp.zeros(rows, dtype))

    @classmethod
    def of(cls, out: Float[Array, "... H"], lse: Float[Array, "..."]) -> "Partial":
        """The pair that attention returned, as a partial result again."""
        return cls(out.astype(lse.dtype), lse, jnp.where(jnp.isneginf(lse), 0.0, 1.0).astype(lse.dtype))


Pair = tuple[Float[Array, "... H"], Float[Array, "..."]]


@overload
def merge(a: Partial, b: Partial) -> Partial: ...
@overload
def merge(a: Pair, b: Pair) -> Pair: ...
def merge(a, b):
    """Attention over the keys of `a` and of `b` together, which must be disjoint.

    Args:
      a, b: both `Partial`, or both the pair `(out, lse)` of `attention(…, return_lse=True)` for the
        same queries, without `sinks`: `[B, T, N, H]` and `[B, T, N]`.

    Returns:
      the same kind. Associative, and commutative up to rounding; a side that has seen nothing
      (lse −inf) changes nothing.
    """
    if isinstance(a, tuple):
        out, lse = normalize(merge(Partial.of(*a), Partial.of(*b)))
        return out.astype(a[0].dtype), lse
    peak = jnp.maximum(a.peak, b.peak)
    level = _finite(peak)
    scale_a, scale_b = jnp.exp(a.peak - level), jnp.exp(b.peak - level)
    weighted = a.weighted * scale_a[..., None] + b.weighted * scale_b[..., None]
    return Partial(weighted, peak, a.total * scale_a + b.total * scale_b)


def extend(
    partial: Partial,
    logits: Float[Array, "... S"],
    weigh: Callable[[Float[Array, "... S"]], Float[Array, "... H"]],
) -> Partial:
    """The partial result with more keys: `merge` with those of a tile, which is scaled once.

    Args:
      partial: of other keys.
      logits: of the tile; −inf for a hidden key.
      weigh: the tile's values, summed with weights.
    """
    peak = jnp.maximum(partial.peak, logits.max(axis=-1))
    level = _finite(peak)
    weights, scale = jnp.exp(logits - level[..., None]), jnp.exp(partial.peak - level)
    weighted = partial.weighted * scale[..., None] + weigh(weights)
    return Partial(weighted, peak, partial.total * scale + weights.sum(axis=-1))


def normalize(partial: Partial) -> Pair:
    """The weighted mean and the log-sum-exp of the logits: `(out, lse)`.

    A query that has seen nothing gives zeros and −inf.
    """
    empty = partial.total == 0
    total = jnp.where(empty, 1.0, partial.total)
    out = partial.weighted / total[..., None]
    return out, jnp.where(empty, -jnp.inf, _finite(partial.peak) + jnp.log(total))


def _finite(peak):
    """The peak, or 0 where nothing has been seen and it would be −inf − −inf."""
    return jnp.where(jnp.isneginf(peak), 0.0, peak)
