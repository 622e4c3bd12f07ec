"""The grains of a plan: the sizes of tile in which the XLA backends work its lines through.

A plan with fine codes has two grains. Each line takes the one that costs it less, while the program runs:
whole blocks where much is shown, small ones where little is.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dynmask_jax.array_typing import Array, Bool, Int, pytree, static
from dynmask_jax.backends.blocks import Cut, Heads
from dynmask_jax.backends.score_tiles import ScoreTiles, score_tiles
from dynmask_jax.block_codes import SKIP
from dynmask_jax.find_codes import find_codes
from dynmask_jax.grain_choice import active_in_lines
from dynmask_jax.indexing import at, row_and_block
from dynmask_jax.mask_algebra import head_count
from dynmask_jax.plans import Plan
from dynmask_jax.scores import Scores

TILE_PAIRS = 2**18
"""Pairs of queries and keys in a tile, over its heads. A tile goes to and from memory several times: one of
all of 8 heads of 512 by 512 is 8 MiB and took 1.35 times as long, forward, as one head after the other."""


@pytree
class Grain:
    """One size of tile. Made by `grains_of`.

    Attributes:
      codes: of the lines, `[R, 1, lines, columns]`; or, of a mask with per-head leaves, one for each part of
        the heads: it skips what other heads show.
      on_tiles: the scores of a call for these tiles.
      lines: how many lines of this grain make one of the plan's.
      blocks_q, blocks_k: blocks of `Cut` in a tile.
      heads: key heads in a tile.
      parts: tiles over all key heads.
    """

    codes: Int[Array, "R *parts lines columns"]
    on_tiles: ScoreTiles
    lines: int = static()
    blocks_q: int = static()
    blocks_k: int = static()
    heads: int = static()
    parts: int = static()

    def codes_of(self, row, line, heads: Heads) -> Int[Array, " columns"]:
        """The codes of a line, for some of the heads."""
        return at(self.codes, row, heads.part if self.codes.shape[1] > 1 else 0, line)

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
    group, by_head = heads[0] // heads[1], head_count(plan.mask) is not None and not all_heads

    def grain(of_grain: Plan, codes, own: int, lines: int, blocks: tuple[int, int]) -> Grain:
        codes = codes.swapaxes(2, 3) if by_keys else codes
        codes = jnp.pad(codes, ((0, 0), (0, 0), (0, -codes.shape[2] % lines), (0, 0)))
        return Grain(codes, score_tiles(scores, of_grain, group), lines, *blocks, own, heads[1] // own)

    def in_tile(of_grain: Plan) -> int:
        pairs = group * of_grain.block_q * of_grain.block_k
        return heads[1] if all_heads else _heads_in_tile(heads[1], pairs)

    fine, cuts = plan.at_fine(), cuts_of(plan)
    codes = _codes_by_head(plan, heads[1]) if by_head else plan.codes[:, None]
    blocks = cuts[0].tile, cuts[1].tile
    coarse = grain(plan, codes, 1 if by_head else in_tile(plan), 1, blocks)
    if fine is None or plan.fine is None or all_heads:
        return Grains(coarse, None, None)
    # Small blocks are of many heads, which see about the same few of them.
    small = grain(fine, fine.codes[:, None], in_tile(fine), cuts[by_keys].tile, (1, 1))
    whole = active_in_lines(codes, by_keys=by_keys).mean(axis=1)
    return Grains(coarse, small, plan.fine.cheaper(whole, plan.block_q * plan.block_k, by_keys=by_keys))


def _codes_by_head(plan: Plan, key_heads: int) -> Int[Array, "R K Tb Sb"]:
    """The plan's codes for each key head: of what its query heads show."""
    queries, keys = plan.q_tokens, plan.kv_tokens

    def of_head(part):
        mask = Heads(part, 1).of(plan.mask, (head_count(plan.mask) or key_heads) // key_heads)
        found = find_codes(mask, queries, keys, (plan.block_q, plan.block_k))
        return jnp.where(plan.codes == SKIP, plan.codes, found)

    return jax.vmap(of_head, out_axes=1)(jnp.arange(key_heads, dtype=jnp.int32))


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
