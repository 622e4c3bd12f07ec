"""Strips of a tile's keys: of a partial tile the TPU kernels compute those alone that show anything."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dynmask_jax.array_typing import Array, Bool, Int
from dynmask_jax.backends.tpu_blocks import LANES
from dynmask_jax.block_codes import SKIP
from dynmask_jax.plans import Plan

MOST_STRIPS = 4
"""Strips of a tile: each number of them is a branch of the kernels."""


def strip_size(plan: Plan) -> int | None:
    """Keys in a strip: 128 in blocks of 512; None where the plan's codes do not tell strips apart."""
    if plan.fine is None:
        return None
    size = max(LANES * -(-plan.block_k // (MOST_STRIPS * LANES)), plan.fine.block_k)
    fits = plan.block_k % size == 0 and size % LANES == 0 and size % plan.fine.block_k == 0
    return size if fits and size < plan.block_k else None


def strips_of(plan: Plan) -> Int[Array, "R Tb Sb"] | None:
    """Of each of the plan's blocks: how many of its strips show anything, and which; None as `strip_size`.

    Four bits for the number of strips, then four bits for the place of each in order.
    """
    size = strip_size(plan)
    if size is None or plan.fine is None:
        return None
    by = plan.block_q // plan.fine.block_q, size // plan.fine.block_k
    return _words(_shown(plan.fine.codes, by, plan.codes.shape, plan.block_k // size))


def _shown(codes, by: tuple[int, int], shape: tuple[int, ...], strips: int) -> Bool[Array, "R Tb Sb strips"]:
    """Whether strips of `by` small blocks show anything, of blocks of this shape."""
    rows, tb, sb = shape
    pad = (0, tb * by[0] - codes.shape[1]), (0, sb * strips * by[1] - codes.shape[2])
    codes = jnp.pad(codes, ((0, 0), *pad), constant_values=SKIP)
    return (codes.reshape(rows, tb, by[0], sb, strips, by[1]) != SKIP).any(axis=(2, 5))


def _words(shown: Bool[Array, "*blocks strips"]) -> Int[Array, " *blocks"]:
    rank = jnp.cumsum(shown, axis=-1, dtype=jnp.int32)  # from 1, and so the number keeps the lowest bits
    place = lax.broadcasted_iota(jnp.int32, shown.shape, shown.ndim - 1)
    return rank[..., -1] + jnp.where(shown, place << (4 * rank), 0).sum(axis=-1, dtype=jnp.int32)


@dataclasses.dataclass(frozen=True)
class Strips:
    """The strips of a tile that a branch of a kernel computes, inside the kernel.

    Attributes:
      places: the number of each in its tile; None for the whole tile.
      size: keys in a strip.
    """

    places: tuple[Array, ...] | None
    size: int

    @classmethod
    def of_word(cls, word, count: int, size: int) -> "Strips":
        """The `count` strips of a word of `strips_of`."""
        return cls(tuple((word >> (4 * at)) & 15 for at in range(1, count + 1)), size)

    def take(self, ref: Any, axis: int):
        """What a ref holds of these strips, whose keys lie along the axis."""
        if self.places is None:
            return ref[...]
        return jnp.concatenate([ref[self._index(place, axis)] for place in self.places], axis=axis)

    def add_to(self, ref: Any, sums):
        """Adds `[n, keys]` to the strips of a ref."""
        if self.places is None:
            ref[...] += sums
            return
        for at, place in enumerate(self.places):
            ref[self._index(place, 1)] += sums[:, at * self.size : (at + 1) * self.size]

    def _index(self, place, axis: int):
        return (*[slice(None)] * axis, pl.ds(pl.multiple_of(place * self.size, self.size), self.size))


WHOLE = Strips(None, 0)
