"""The grains of a plan: the sizes of tile in which the XLA backends work its lines through.

A plan with fine codes has two grains. Each line takes the one that costs it less, while the program runs:
whole blocks where much is shown, small ones where little is.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dynmask_jax.array_typing import Array, Bool, Int, pytree, static
from dynmask_jax.backends.blocks import Cut, Heads
from dynmask_jax.backends.score_tiles import ScoreTiles, score_tiles
from dynmask_jax.block_codes import SKIP
from dynmask_jax.indexing import at, row_and_block
from dynmask_jax.plans import Plan
from dynmask_jax.scores import Scores

TILE_PAIRS = 2**18
"""Pairs of queries and keys in a tile, over its heads. A tile goes to and from memory several times: one of
all of 8 heads of 512 by 512 is 8 MiB and took 1.35 times as long, forward, as one head after the other."""


@pytree
class Grain:
    """One size of tile. Made by `grains_of`.

    Attributes:
      codes: of the lines, `[R, lines, columns]`, and SKIP in lines that another grain takes: where a call is
        mapped over plans by `vmap`, both grains run, and the other makes no turns.
      on_tiles: the scores of a call for these tiles.
      lines: how many lines of this grain make one of the plan's.
      blocks_q, blocks_k: blocks of `Cut` in a tile.
      heads: key heads in a tile.
      parts: tiles over all key heads.
    """

    codes: Int[Array, "R lines columns"]
    on_tiles: ScoreTiles
    lines: int = static()
    blocks_q: int = static()
    blocks_k: int = static()
    heads: int = static()
    parts: int = static()

    def over_line(self, function: Callable, carry, number):
        """`function(carry, line, heads)` for every line and part of the heads of the plan's line `number`.

        It gives the carry and arrays `[blocks, size, heads, …]`; these come back joined, over all heads.
        """

        def one(carry, number_here):
            line, part = row_and_block(number_here, self.parts)
            return function(carry, number * self.lines + line, Heads(part, self.heads))

        count = self.lines * self.parts
        if count == 1:
            return function(carry, number, Heads(0, self.heads))
        carry, found = lax.scan(one, carry, jnp.arange(count, dtype=jnp.int32))

        def joined(x):  # [lines · parts, blocks, size, heads, …]
            x = jnp.moveaxis(x.reshape(self.lines, self.parts, *x.shape[1:]), 1, 3)
            return x.reshape(x.shape[0] * x.shape[1], x.shape[2], x.shape[3] * x.shape[4], *x.shape[5:])

        return carry, jax.tree.map(joined, found)


class Grains(NamedTuple):
    """The grains of a plan: that of its blocks, and a fine one with the lines that take it, or None."""

    coarse: Grain
    fine: Grain | None
    takes_fine: Bool[Array, "R lines"] | None

    def over_line(self, function: Callable, carry, row, number):
        """`Grain.over_line` of `function(grain)`, in the grain that line `number` of a row takes."""

        def in_grain(grain):
            return lambda carry: grain.over_line(function(grain), carry, number)

        if self.fine is None or self.takes_fine is None:
            return in_grain(self.coarse)(carry)
        return lax.cond(at(self.takes_fine, row, number), in_grain(self.fine), in_grain(self.coarse), carry)


def grains_of(
    scores: Scores, plan: Plan, heads: tuple[int, int], *, by_keys: bool = False, all_heads: bool = False
) -> Grains:
    """The grains for a call.

    Args:
      scores, plan: of the call.
      heads: N and K.
      by_keys: lines are of keys, columns of queries.
      all_heads: tiles have all heads, whatever their size, and the plan's blocks are the only grain.
    """
    group, key_heads = heads[0] // heads[1], heads[1]
    fine, (cut_q, cut_k) = plan.at_fine(), cuts_of(plan)

    def grain(of_grain: Plan, lines: int, blocks: tuple[int, int]) -> Grain:
        codes = of_grain.codes.swapaxes(1, 2) if by_keys else of_grain.codes
        codes = jnp.pad(codes, ((0, 0), (0, -codes.shape[1] % lines), (0, 0)), constant_values=SKIP)
        pairs = group * of_grain.block_q * of_grain.block_k
        own = key_heads if all_heads else _heads_in_tile(key_heads, pairs)
        return Grain(codes, score_tiles(scores, of_grain, group), lines, *blocks, own, key_heads // own)

    coarse = grain(plan, 1, (cut_q.tile, cut_k.tile))
    if fine is None or all_heads:
        return Grains(coarse, None, None)
    small = grain(fine, (cut_q, cut_k)[by_keys].tile, (1, 1))
    takes_fine = plan.takes_fine(by_keys=by_keys)
    return Grains(
        replace(coarse, codes=jnp.where(takes_fine[:, :, None], SKIP, coarse.codes)),
        replace(
            small, codes=jnp.where(jnp.repeat(takes_fine, small.lines, axis=1)[:, :, None], small.codes, SKIP)
        ),
        takes_fine,
    )


def cuts_of(plan: Plan) -> tuple[Cut, Cut]:
    """How queries and keys are cut, so that tiles of all grains are whole blocks."""
    fine = plan.at_fine()
    if fine is None:
        return Cut(plan.block_q), Cut(plan.block_k)
    sizes = (fine.block_q, plan.block_q), (fine.block_k, plan.block_k)
    query, key = (Cut(size, tile // size) for size, tile in sizes)
    return query, key


def _heads_in_tile(key_heads: int, pairs: int) -> int:
    """How many key heads a tile has, with so many pairs each."""
    most = max(1, TILE_PAIRS // pairs)
    return max(count for count in range(1, min(most, key_heads) + 1) if key_heads % count == 0)
