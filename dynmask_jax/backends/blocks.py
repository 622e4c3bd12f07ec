"""Arrays of tokens and heads cut into blocks, as the loops of the XLA backends take them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dynmask_jax.array_typing import Array, Bool, Float, pytree, static
from dynmask_jax.block_codes import ACTIVE, TEST, over_blocks
from dynmask_jax.finite import bad_rows, emptied
from dynmask_jax.indexing import at
from dynmask_jax.tiles import Tiles


class Cut(NamedTuple):
    """How a sequence is cut.

    Attributes:
      size: tokens in a block.
      tile: blocks in a row in the largest tile: to a multiple of them a sequence is filled up.
    """

    size: int
    tile: int = 1

    def blocks(self, x: Array) -> Array:
        """`[B, T, …]` as `[B, blocks, size, …]`, filled up with zeros."""
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % (self.size * self.tile)), *[(0, 0)] * (x.ndim - 2)))
        return x.reshape(x.shape[0], -1, self.size, *x.shape[2:])


class Heads(NamedTuple):
    """Some of the key heads, with their query heads: of parts of `size` each the one numbered `part`."""

    part: Array | int
    size: int

    def of(self, tree, group: int):
        """Of a tree's leaves `[N, …]` those of its query heads, `group` of each key head; scalars stay."""
        own = self.size * group

        def leaf(value):
            if not jnp.ndim(value) or value.shape[0] == own:
                return value
            return lax.dynamic_slice_in_dim(jnp.asarray(value), self.part * own, own)

        return jax.tree.map(leaf, tree)


@pytree
class Blocks:
    """An array `[B, T, heads, *H]` cut into blocks of tokens, in the layout it came in.

    What a tile needs, some blocks in a row and some of the heads, is transposed when it is taken. That costs
    no more than the copy that taking it is, and then the array itself need not be. The G query heads of a
    key head and the tokens make one axis of *rows*: so each key head is one matrix product.

    Attributes:
      x: `[B, blocks, size, heads, *H]`, the last blocks filled up with zeros.
      bad: `[B, blocks, size, heads]`, which rows are taken as `fill`; None where none is.
      length: T.
      group: heads of a key head: G, or 1 for keys and values.
      fill: what stands in bad rows.
    """

    x: Float[Array, "B blocks size heads *H"]
    bad: Bool[Array, "B blocks size heads"] | None
    length: int = static()
    group: int = static()
    fill: float = static()

    @classmethod
    def of(cls, x: Float[Array, "B T heads *H"], cut: Cut, group: int = 1) -> "Blocks":
        """Cut into blocks."""
        return cls(cut.blocks(x), None, x.shape[1], group, 0.0)

    @classmethod
    def of_finite(cls, x: Float[Array, "B T heads H"], cut: Cut, group: int = 1) -> "Blocks":
        """Cut into blocks, of which each is freed of what is not finite when it is taken."""
        return cls(cut.blocks(x), cut.blocks(bad_rows(x)), x.shape[1], group, 0.0)

    @classmethod
    def of_keys_values(
        cls, k: Float[Array, "B S K H"], v: Float[Array, "B S K V"], cut: Cut
    ) -> "tuple[Blocks, Blocks]":
        """Keys and values cut into blocks. Where either is not finite, the value is 0 and the key NaN.

        So the logits of that key are NaN, and stay NaN where it is visible: what becomes of a query that
        sees it is NaN, and nothing else is.
        """
        bad = cut.blocks(bad_rows(k) | bad_rows(v))
        keys, values = cut.blocks(k), cut.blocks(v)
        return cls(keys, bad, k.shape[1], 1, float("nan")), cls(values, bad, v.shape[1], 1, 0.0)

    def rows(self, b, start, count: int, heads: Heads) -> Float[Array, "k rows *H"]:
        """Some blocks of sequence b, `count` from the block `start` on, of some key heads."""
        block = self._part(self.x, b, start, count, heads)
        if self.bad is not None:
            block = emptied(block, self._part(self.bad, b, start, count, heads), self.fill)
        block = block.reshape(*block.shape[:2], heads.size, self.group, *block.shape[3:])
        block = block.transpose(2, 3, 0, 1, *range(4, block.ndim))  # [k, G, count, size, *H]
        return block.reshape(heads.size, -1, *block.shape[4:])

    def _part(self, x, b, start, count: int, heads: Heads):
        size, own = x.shape[2], heads.size * self.group
        place = b, start, 0, heads.part * own, *[0] * (x.ndim - 4)
        shape = 1, count, size, own, *x.shape[4:]
        return lax.dynamic_slice(x, [jnp.asarray(each, jnp.int32) for each in place], shape)[0]

    def tokens(self, rows: Float[Array, "k rows *H"], count: int) -> Float[Array, "count size heads *H"]:
        """Undoes `rows`: so many blocks, of the heads in the rows."""
        size = self.x.shape[2]
        blocks = rows.reshape(rows.shape[0] * self.group, count, size, *rows.shape[2:])
        return blocks.transpose(1, 2, 0, *range(3, blocks.ndim))

    def whole(self, blocks: Float[Array, "Bblocks size heads *H"]) -> Float[Array, "B T heads *H"]:
        """Undoes `of`, from the blocks of all sequences in one axis."""
        return blocks.reshape(self.x.shape[0], -1, *blocks.shape[2:])[:, : self.length]


def over_active(codes, add, start):
    """Folds `add(block, result, tested=…)` over a line's active blocks, in order; `tested` is traced.

    One loop for blocks that are full and for those to test: two were a third of what a layer compiles.
    """

    def add_one(block, result):
        return add(block, result, tested=at(codes, block) == TEST)

    return over_blocks(codes, ACTIVE, add_one, start)


def visible_rows(tiles: Tiles, place, group: int) -> Bool[Array, "*k rows bk"]:
    """The mask of the tile at a `Place`, over the rows of its queries; axis 0 is 1 for heads alike."""
    visible = tiles.visible(place.row, place.i, place.j)
    if visible.ndim == 3:
        return visible.reshape(place.heads.size, -1, visible.shape[2])
    return jnp.broadcast_to(visible, (group, *visible.shape)).reshape(1, -1, visible.shape[1])


def visible_columns(tiles: Tiles, place, group: int) -> Bool[Array, "*k bk rows"]:
    """`visible_rows` with the tile's keys first, made so: to turn a tile costs as much as to evaluate it."""
    visible = tiles.visible(place.row, place.i, place.j, keys_first=True)
    if visible.ndim == 3:
        visible = visible.reshape(place.heads.size, -1, *visible.shape[1:]).swapaxes(1, 2)
    else:
        visible = jnp.broadcast_to(visible[:, None], (visible.shape[0], group, visible.shape[1]))[None]
    return visible.reshape(*visible.shape[:2], -1)
