"""Which grain a plan's lines are worked in: whole blocks, or small ones where little is shown.

A line of blocks is worked in its own blocks, or in small ones. The choice is data: made from the codes
while the program runs. Whole blocks cost less for each pair, small ones compute fewer pairs.
"""

import jax.numpy as jnp

from dynmask_jax.array_typing import Array, Bool, Int
from dynmask_jax.block_codes import FULL, SKIP, TEST
from dynmask_jax.platforms import defaults_of

MOST_FINE = 2**22
"""Small blocks of a plan: beyond it they are made larger. Each costs the plan as much as a block does."""
PAIR = 1.6
"""What a pair costs in a small block, where one in a block of 512 by 512 costs 1: see docs/benchmarks.md."""
STEP = 2_000
"""Pairs that cost as much as what a step of the loop costs beside its pairs."""


def fine_blocks(blocks: tuple[int, int], lengths: tuple[int, int]) -> tuple[int, int] | None:
    """Queries and keys in a small block of a plan in `blocks`; None where it has one grain."""
    size = defaults_of().fine
    if size is None or (lengths[0] <= blocks[0] and lengths[1] <= blocks[1]):
        return None
    while lengths[0] * lengths[1] > MOST_FINE * size * size:
        size *= 2
    fine_q, fine_k = (size if block % size == 0 else block for block in blocks)
    return None if (fine_q, fine_k) == blocks else (fine_q, fine_k)


def joined(codes: Int[Array, "R tb sb"], by: tuple[int, int]) -> Int[Array, "R Tb Sb"]:
    """Codes of blocks that are made of `by` small ones each way, the last filled up."""
    pad = ((0, 0), *((0, -size % n) for size, n in zip(codes.shape[1:], by, strict=True)))
    codes = jnp.pad(codes, pad, constant_values=SKIP)
    rows, tb, sb = codes.shape
    parts = codes.reshape(rows, tb // by[0], by[0], sb // by[1], by[1])
    least, most = parts.min(axis=(2, 4)), parts.max(axis=(2, 4))
    return jnp.where(least == FULL, FULL, jnp.where(most == SKIP, SKIP, TEST)).astype(codes.dtype)


def cheaper_fine(
    codes: Int[Array, "R Tb Sb"],
    fine: Int[Array, "R tb sb"],
    blocks: tuple[int, int],
    *,
    by_keys: bool = False,
) -> Bool[Array, "R lines"]:
    """Which lines cost less in small blocks.

    Args:
      codes, fine: of blocks and of small ones.
      blocks: queries and keys in a small one.
      by_keys: lines are of keys.
    """
    if by_keys:
        codes, fine = codes.swapaxes(1, 2), fine.swapaxes(1, 2)
    rows, lines, _ = codes.shape
    by = -(-fine.shape[1] // lines)
    across = -(-fine.shape[2] // codes.shape[2])
    coarse_pairs = blocks[0] * blocks[1] * by * across
    fine_pairs = blocks[0] * blocks[1]
    small = jnp.pad((fine != SKIP).sum(axis=2), ((0, 0), (0, lines * by - fine.shape[1])))
    small = small.reshape(rows, lines, by).sum(axis=2).astype(jnp.float32)
    whole = (codes != SKIP).sum(axis=2).astype(jnp.float32)
    return small * (fine_pairs * PAIR + STEP) < whole * (coarse_pairs + STEP)
