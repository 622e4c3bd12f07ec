"""One tile inside a TPU kernel: its line's tokens lie in all lanes, its columns' in strips of 128."""

import dataclasses
import functools
import operator
from collections.abc import Iterable

import jax.numpy as jnp
from jax.experimental import pallas as pl

from dynmask_jax.array_typing import Array
from dynmask_jax.backends.kernel_tile import LOG2E, Tile
from dynmask_jax.backends.tpu_blocks import LANES
from dynmask_jax.backends.tpu_strips import WHOLE, Strips, strip_size
from dynmask_jax.block_codes import FULL, TEST
from dynmask_jax.plans import Plan
from dynmask_jax.scores import Scores
from dynmask_jax.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class TpuTile(Tile):
    """What is fixed for all tiles of a TPU kernel.

    Attributes:
      filled: whether keys may be filling, which must be hidden: their logits of 0 can be far above all
        others. Filling among queries has a level of inf, and so no weights.
      strips: keys in a strip, and up to how many of a tile are computed without the others; None where
        tiles are computed whole.
    """

    filled: bool = False
    strips: tuple[int, int] | None = None

    @classmethod
    def of(cls, scores: Scores, plan: Plan, *, keys_first: bool = False) -> "TpuTile":
        """For the plan's mask and blocks."""
        filled = bool(plan.lengths[1] % plan.block_k or plan.block_k % LANES)
        tile = Tile.of(scores, plan, keys_first=keys_first)
        size, strips = strip_size(plan), None
        if size is not None:
            # A forward kernel's chain from product to product takes as long for three strips as for four.
            count = plan.block_k // size
            strips = size, count - 1 if keys_first else count // 2
        return cls(tile.scale, tile.soft_cap, tile.types, keys_first, filled, strips)

    def hide(self, logits, numbers, head, tokens):
        """The logits `[line, column]`, −inf where the mask hides the pair.

        `numbers` holds refs to scalar memory; `tokens` are the line's, each in all lanes `[n, line, 128]`,
        and the column's `[fields, column]`.
        """
        mask, line = self.mask_of(numbers, head), _line(tokens)

        def hidden(logits, column):
            seen = self.visible(mask, line, _column(column), logits.shape)
            if self.filled:
                real = tokens[0][2] if self.keys_first else jnp.broadcast_to(column[2:3], logits.shape)
                seen &= real != 0
            return jnp.where(seen, logits, -jnp.inf)

        return by_strip(hidden, logits, tokens[1])

    def biased(self, capped, numbers, head, tokens):
        """The logits · log2 e with the bias; arguments as of `hide`."""
        if self.types.bias is None:
            return capped
        bias, line = self.bias_of(numbers, head), _line(tokens)

        def added(capped, column):
            return capped + LOG2E * self.score(bias, line, _column(column), capped.shape)

        return by_strip(added, capped, tokens[1])

    def bias_gradients(self, d_logits, numbers, head, tokens):
        """Of each learnable leaf of the bias, from gradients of logits `[line, column]`: `[leaves, 128]`.

        Lines are of queries. The sum over lanes is left for later.
        """
        bias, line = self.bias_of(numbers, head), _line(tokens)

        def of_strip(d_logits, column):
            slopes = self.score_slopes(bias, line, _column(column), d_logits.shape)
            return jnp.concatenate([(x * d_logits).sum(axis=0, keepdims=True) for x in slopes], axis=0)

        strips = range(0, d_logits.shape[1], LANES)
        return functools.reduce(
            operator.add,
            (of_strip(d_logits[:, at : at + LANES], tokens[1][:, at : at + LANES]) for at in strips),
        )

    def kept_by_strip(self, pairs, numbers, words):
        """The pairs `[line, column]`, 0 where the weight is dropped.

        `words` are the line's, in all lanes `[n, line, 128]`, and the column's `[n, column]`: of the side of
        the queries two, of that of the keys one.
        """
        of_line = range(1 if self.keys_first else 2)
        of_column = range(2 if self.keys_first else 1)
        line = tuple(words[0][at] for at in of_line)

        def kept(pairs, column):
            columns = tuple(column[at : at + 1] for at in of_column)
            return self.kept(pairs, numbers.threshold[0, 0], line, columns)

        return by_strip(kept, pairs, words[1])


def _line(tokens) -> Tokens:
    return Tokens(tokens[0][0], tokens[0][1])


def _column(strip) -> Tokens:
    return Tokens(strip[0:1], strip[1:2])


def by_strip(function, pairs, columns):
    """`function(pairs, columns)` over strips of 128 lanes, of `[line, column]` and `[n, column]`."""
    strips = [slice(start, start + LANES) for start in range(0, pairs.shape[1], LANES)]
    return jnp.concatenate([function(pairs[:, strip], columns[:, strip]) for strip in strips], axis=1)


def by_code(active, step, tile: TpuTile, add):
    """Runs `add(hide, strips)` on a block: of one to test on the strips that show anything, or on all of it.

    `hide` is `tile.hide`, or None on a full block, where nothing is hidden.
    """
    code = active.at(step)[0]
    pl.when(code == FULL)(lambda: add(None, WHOLE))

    @pl.when(code == TEST)
    def _():
        if tile.strips is None:
            add(tile.hide, WHOLE)
            return
        size, most = tile.strips
        word = active.strips[step]
        for some in range(1, most + 1):
            pl.when(word & 15 == some)(functools.partial(add, tile.hide, Strips.of_word(word, some, size)))
        pl.when(word & 15 > most)(lambda: add(tile.hide, WHOLE))


def hidden(logits, hide, of_tile):
    """The logits, −inf where `hide` hides a pair; None hides nothing."""
    return logits if hide is None else hide(logits, *of_tile)


def keep_rows(kept, rows, places: Iterable[int] = (0, 1)):
    """At a line's first block: rows of it, such as position and segment, upright, for as long as it lasts."""
    for at, row in enumerate(places):
        kept[at] = in_lanes(rows[row : row + 1])


def in_lanes(row: Array) -> Array:
    """A row `[1, n]` turned upright, the same in every lane: `[n, 128]`."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def widened(column: Array, width: int) -> Array:
    """`[n, 128]`, alike in all lanes, as `[n, width]`."""
    return jnp.tile(column, (1, -(-width // LANES)))[:, :width]


def lane_sums(tile: Array) -> Array:
    """`[n, m]` summed over registers only, `[n, 128]`: the rest of the sum is left for the line's end."""
    strips = [tile[:, start : start + LANES] for start in range(0, tile.shape[1], LANES)]
    return functools.reduce(operator.add, strips)
