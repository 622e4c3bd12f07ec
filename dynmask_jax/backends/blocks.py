"""Arrays of tokens and heads cut into blocks, as the loops of the XLA backends take them."""

import functools

import jax.numpy as jnp

from dynmask_jax.array_typing import Array, Bool, Float, pytree, static
from dynmask_jax.block_codes import FULL, TEST, over_blocks
from dynmask_jax.finite import bad_rows, emptied


@pytree
class Blocks:
    """An array `[B, T, heads, *H]` cut into blocks of tokens, in the layout it came in.

    A block is transposed when it is taken, which costs no more than the copy that taking it is, and
    then the array itself need not be. The G query heads of a key head and the tokens of a block make
    one axis of *rows*, G times the block's size: so each key head is one matrix product.

    Attributes:
      x: `[B, blocks, size, heads, *H]`, the last block filled up with zeros.
      bad: `[B, blocks, size, heads]`, which rows are taken as zeros; None where none is.
      length: T.
    """

    x: Float[Array, "B blocks size heads *H"]
    bad: Bool[Array, "B blocks size heads"] | None
    length: int = static()

    @classmethod
    def of(cls, x: Float[Array, "B T heads *H"], size: int) -> "Blocks":
        """Cut into blocks of `size` tokens."""
        length = x.shape[1]
        x = jnp.pad(x, ((0, 0), (0, -length % size), *[(0, 0)] * (x.ndim - 2)))
        return cls(x.reshape(x.shape[0], -1, size, *x.shape[2:]), None, length)

    @classmethod
    def of_finite(cls, x: Float[Array, "B T heads H"], size: int) -> "Blocks":
        """Cut into blocks, of which each is freed of what is not finite when it is taken."""
        blocks = cls.of(x, size)
        return cls(blocks.x, bad_rows(blocks.x), blocks.length)

    @property
    def count(self) -> int:
        """Blocks in a sequence."""
        return self.x.shape[1]

    def every(self) -> Array:
        """0, 1, … over the blocks of all sequences."""
        return jnp.arange(self.x.shape[0] * self.count, dtype=jnp.int32)

    def rows(self, b, i, key_heads: int) -> Float[Array, "K rows *H"]:
        """Block i of sequence b, its heads outermost."""
        block = self.x[b, i] if self.bad is None else emptied(self.x[b, i], self.bad[b, i])
        block = jnp.moveaxis(block, 1, 0)
        return block.reshape(key_heads, -1, *block.shape[2:])

    def tokens(self, rows: Float[Array, "K rows *H"]) -> Float[Array, "size heads *H"]:
        """Undoes `rows`."""
        size, heads = self.x.shape[2:4]
        return jnp.moveaxis(rows.reshape(heads, size, *rows.shape[2:]), 0, 1)

    def whole(self, blocks: Float[Array, "Bblocks size heads *H"]) -> Float[Array, "B T heads *H"]:
        """Undoes `of`, from the blocks of all sequences in one axis."""
        return blocks.reshape(self.x.shape[0], -1, *blocks.shape[2:])[:, : self.length]


def by_rows(visible: Bool[Array, "*N bq bk"], heads: int, key_heads: int) -> Bool[Array, "*K rows bk"]:
    """A tile's mask over the rows of its queries; K is 1 where all heads agree."""
    if visible.ndim == 3:
        return visible.reshape(key_heads, -1, visible.shape[2])
    groups = jnp.broadcast_to(visible, (heads // key_heads, *visible.shape))
    return groups.reshape(1, -1, visible.shape[1])


def over_active(codes, add, start):
    """Folds `add(block, result, tested=…)` over a line's active blocks: the full ones, then those to test."""
    result = over_blocks(codes, FULL, functools.partial(add, tested=False), start)
    return over_blocks(codes, TEST, functools.partial(add, tested=True), result)
