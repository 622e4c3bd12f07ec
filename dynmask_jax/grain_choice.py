"""The grain of a line of blocks: the plan's own blocks, or small ones where little is shown.

Whole blocks cost less for each pair, small ones compute fewer pairs. Which of the two is less is data: a
line's count of either, made from the codes while the program runs.
"""

import jax.numpy as jnp
import numpy as np

from dynmask_jax.array_typing import Array, Bool, Float, Int, pytree, static
from dynmask_jax.block_codes import FULL, SKIP, TEST

MOST_FINE = 2**22
"""Readings of a mask over small blocks: beyond it they are made larger."""
FINE_COST = 1.65
"""What a pair costs in a small block, where one in a block of 512 by 512 costs 1. With the `OVERHEAD` of a
block of 64 by 64 it is 2.05: the median over twelve masks and packed rows at three lengths, all in blocks of
64 beside all in blocks of 512 (1.7 to 2.5, on two quiet cores with AVX2; docs/benchmarks.md). Small products
run on one core: where the others are busy it is less, down to 1.0."""
OVERHEAD = 1_000
"""How many pairs cost as much as what a tile costs beside its pairs, its slices and the loop's turn: an
estimate, which weighs in tiles of 64 by 64 and less alone."""


@pytree
class Fine:
    """Codes of blocks that are smaller than a plan's.

    Attributes:
      codes: `[R, tb, sb]` int8, as the plan's.
      block_q, block_k: tokens in such a block; they divide the plan's.
      cost: what a pair costs here, where one in the plan's blocks costs 1.
    """

    codes: Int[Array, "R tb sb"]
    block_q: int = static()
    block_k: int = static()
    cost: float = static(FINE_COST)

    @property
    def blocks(self) -> tuple[int, int]:
        """Tokens in a block of queries and of keys."""
        return self.block_q, self.block_k

    @property
    def pairs(self) -> int:
        """Of queries and keys in a block."""
        return self.block_q * self.block_k

    def active(self, blocks: tuple[int, int], *, by_keys: bool = False) -> Float[Array, "R lines"]:
        """How many small blocks are not skipped in each line of the plan's `blocks`."""
        counts = active_in_lines(self.codes, by_keys=by_keys)
        by = blocks[by_keys] // self.blocks[by_keys]
        counts = jnp.pad(counts, ((0, 0), (0, -counts.shape[1] % by)))
        return counts.reshape(counts.shape[0], -1, by).sum(axis=2)

    def cheaper(
        self, whole: Float[Array, "R lines"], blocks: tuple[int, int], *, by_keys: bool = False
    ) -> Bool[Array, "R lines"]:
        """Which lines cost less in small blocks.

        Args:
          whole: how many of the plan's blocks are computed in each line.
          blocks: queries and keys in one of those.
          by_keys: lines are of keys, not of queries.
        """
        in_small = self.active(blocks, by_keys=by_keys) * (self.cost * (self.pairs + OVERHEAD))
        return in_small < whole * (blocks[0] * blocks[1] + OVERHEAD)


def active_in_lines(codes: Int[Array, "*R Tb Sb"], *, by_keys: bool = False) -> Float[Array, "*R lines"]:
    """How many blocks of each line are not skipped."""
    return (codes != SKIP).sum(axis=-2 if by_keys else -1).astype(jnp.float32)


def check_fine_cost(cost: float | None, *, fixed: bool) -> float:
    """What a pair in a small block costs; refuses what is none, and any where block sizes are `fixed`."""
    if cost is None:
        return FINE_COST
    if isinstance(cost, bool) or not isinstance(cost, int | float | np.number):
        raise TypeError(f"fine_cost must be a Python number, got {cost!r}")
    if not cost >= 0:
        raise ValueError(f"fine_cost must be at least 0, got {cost}")
    if fixed:
        raise ValueError("fine_cost is for a plan that chooses its grain: block_q and block_k fix it")
    return float(cost)


def fine_blocks(
    sizes: tuple[int, int], blocks: tuple[int, int], lengths: tuple[int, int], readings: int = 1
) -> tuple[int, int] | None:
    """Queries and keys in a small block of a plan in `blocks`, for `lengths`; None where it has one grain.

    As `sizes` say, or doubled until a mask, read over each `readings` times (for rows and heads), is read at
    most `MOST_FINE` times. A side whose blocks are not made of whole small ones has one grain, as has a plan
    of a single block, and one whose small blocks would hold fewer pairs than a tile's overhead: of one query,
    say.
    """
    if lengths[0] <= blocks[0] and lengths[1] <= blocks[1]:
        return None
    fine_q, fine_k = sizes
    while readings * lengths[0] * lengths[1] > MOST_FINE * fine_q * fine_k:
        fine_q, fine_k = 2 * fine_q, 2 * fine_k
    fine = _dividing(fine_q, blocks[0]), _dividing(fine_k, blocks[1])
    return None if fine == blocks or fine[0] * fine[1] < OVERHEAD else fine


def _dividing(size: int, block: int) -> int:
    return size if block % size == 0 else block


def joined(codes: Int[Array, "R tb sb"], by: tuple[int, int]) -> Int[Array, "R Tb Sb"]:
    """Codes of blocks that are made of `by` small ones each way, the last filled up."""
    pad = ((0, 0), *((0, -size % n) for size, n in zip(codes.shape[1:], by, strict=True)))
    codes = jnp.pad(codes, pad, constant_values=SKIP)
    rows, tb, sb = codes.shape
    # One axis at a time: JAX splits no two of a global array whose mesh has explicit axes.
    by_lines = codes.reshape(rows, tb // by[0], by[0], sb)
    by_blocks = (rows, tb // by[0], sb // by[1], by[1])
    least = by_lines.min(axis=2).reshape(by_blocks).min(axis=3)
    most = by_lines.max(axis=2).reshape(by_blocks).max(axis=3)
    return jnp.where(least == FULL, FULL, jnp.where(most == SKIP, SKIP, TEST)).astype(codes.dtype)
