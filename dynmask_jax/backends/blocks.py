"""Arrays of tokens and heads cut into blocks, as the loops of the XLA backends take them."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from dynmask_jax.array_typing import Array, Bool, Float, pytree, static
from dynmask_jax.block_codes import ACTIVE, TEST, over_blocks
from dynmask_jax.finite import bad_rows, emptied
from dynmask_jax.indexing import at
from dynmask_jax.plans import Tiles
from dynmask_jax.vma import vary_like


@pytree
class Blocks:
    """An array `[B, T, heads, *H]` cut into blocks of tokens, in the layout it came in.

    A block is transposed when it is taken, which costs no more than the copy that taking it is, and
    then the array itself need not be. The G query heads of a key head and the tokens of a block make
    one axis of *rows*, G times the block's size: so each key head is one matrix product.

    Attributes:
      x: `[B, blocks, size, heads, *H]`, the last block filled up with zeros.
      bad: `[B, blocks, size, heads]`, which rows are taken as `fill`; None where none is.
      length: T.
      fill: what stands in bad rows.
    """

    x: Float[Array, "B blocks size heads *H"]
    bad: Bool[Array, "B blocks size heads"] | None
    length: int = static()
    fill: float = static()

    @classmethod
    def of(cls, x: Float[Array, "B T heads *H"], size: int) -> "Blocks":
        """Cut into blocks of `size` tokens."""
        return cls(_cut(x, size), None, x.shape[1], 0.0)

    @classmethod
    def of_finite(cls, x: Float[Array, "B T heads H"], size: int) -> "Blocks":
        """Cut into blocks, of which each is freed of what is not finite when it is taken."""
        return cls(_cut(x, size), _cut(bad_rows(x), size), x.shape[1], 0.0)

    @classmethod
    def of_keys_values(
        cls, k: Float[Array, "B S K H"], v: Float[Array, "B S K V"], size: int
    ) -> "tuple[Blocks, Blocks]":
        """Keys and values cut into blocks. Where either is not finite, the value is 0 and the key NaN.

        So the logits of that key are NaN, and stay NaN where it is visible: what becomes of a query that
        sees it is NaN, and nothing else is.
        """
        bad = _cut(bad_rows(k) | bad_rows(v), size)
        keys, values = _cut(k, size), _cut(v, size)
        return cls(keys, bad, k.shape[1], float("nan")), cls(values, bad, v.shape[1], 0.0)

    @property
    def count(self) -> int:
        """Blocks in a sequence."""
        return self.x.shape[1]

    def every(self) -> Array:
        """0, 1, … over the blocks of all sequences."""
        return jnp.arange(self.x.shape[0] * self.count, dtype=jnp.int32)

    def rows(self, b, i, key_heads: int) -> Float[Array, "K rows *H"]:
        """Block i of sequence b, its heads outermost."""
        block = at(self.x, b, i)
        if self.bad is not None:
            block = emptied(block, at(self.bad, b, i), self.fill)
        block = jnp.moveaxis(block, 1, 0)
        return block.reshape(key_heads, -1, *block.shape[2:])

    def tokens(self, rows: Float[Array, "K rows *H"]) -> Float[Array, "size heads *H"]:
        """Undoes `rows`."""
        size, heads = self.x.shape[2:4]
        return jnp.moveaxis(rows.reshape(heads, size, *rows.shape[2:]), 0, 1)

    def whole(self, blocks: Float[Array, "Bblocks size heads *H"]) -> Float[Array, "B T heads *H"]:
        """Undoes `of`, from the blocks of all sequences in one axis."""
        return blocks.reshape(self.x.shape[0], -1, *blocks.shape[2:])[:, : self.length]


def _cut(x: Array, size: int) -> Array:
    """`[B, T, …]` as `[B, blocks, size, …]`, the last block filled up with zeros."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *[(0, 0)] * (x.ndim - 2)))
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])


def by_rows(visible: Bool[Array, "*N bq bk"], heads: int, key_heads: int) -> Bool[Array, "*K rows bk"]:
    """A tile's mask over the rows of its queries; K is 1 where all heads agree."""
    if visible.ndim == 3:
        return visible.reshape(key_heads, -1, visible.shape[2])
    groups = jnp.broadcast_to(visible, (heads // key_heads, *visible.shape))
    return groups.reshape(1, -1, visible.shape[1])


def over_active(codes, add, start):
    """Folds `add(block, result, tested=…)` over a line's active blocks, in order; `tested` is traced.

    One loop for blocks that are full and for those to test: two were a third of what a layer compiles.
    """

    def add_one(block, result):
        return add(block, result, tested=at(codes, block) == TEST)

    return over_blocks(codes, ACTIVE, add_one, start)


def visible_rows(tiles: Tiles, tested, place: tuple, heads: int, key_heads: int) -> Bool[Array, "*K rows bk"]:
    """The mask of the tile `place` = (row of the plan, i, j), over the rows of its queries.

    It is evaluated where the tile is tested, and else true everywhere; with `tested` None always evaluated.
    """
    return by_rows(_where_tested(tiles, tested, place), heads, key_heads)


def visible_columns(
    tiles: Tiles, tested, place: tuple, heads: int, key_heads: int
) -> Bool[Array, "*K bk rows"]:
    """`visible_rows` with the tile's keys first, made so: to turn a tile costs as much as to evaluate it."""
    visible = _where_tested(tiles, tested, place, keys_first=True)
    if visible.ndim == 3:
        visible = visible.reshape(key_heads, -1, *visible.shape[1:]).swapaxes(1, 2)
    else:
        visible = jnp.broadcast_to(visible[:, None], (visible.shape[0], heads // key_heads, visible.shape[1]))
        visible = visible[None]
    return visible.reshape(*visible.shape[:2], -1)


def _where_tested(tiles: Tiles, tested, place: tuple, *, keys_first: bool = False):
    visible = functools.partial(tiles.visible, keys_first=keys_first)
    if tested is None:
        return visible(*place)
    # Of one type with the mask inside shard_map: `&` makes it so, where the mask does not read what varies.
    everything = vary_like(jnp.ones(jax.eval_shape(visible, *place).shape, bool), tiles, place)
    return lax.cond(tested, lambda: visible(*place) & everything, lambda: everything)
