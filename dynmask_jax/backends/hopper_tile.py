"""A tile inside a kernel for Hopper: products of 64 tokens of a line with columns under mask, bias, draws."""

import functools
from dataclasses import dataclass

import jax.numpy as jnp

from dynmask_jax.backends import mosaic
from dynmask_jax.backends.gpu_lines import Side
from dynmask_jax.backends.hopper_lines import Worker
from dynmask_jax.backends.kernel_tile import LOG2E, Numbers, Tile
from dynmask_jax.backends.tile_expressions import elementwise
from dynmask_jax.dropout import draw
from dynmask_jax.tokens import Tokens


@dataclass(frozen=True)
class Pairs:
    """What a warpgroup needs of its line to score pairs with columns.

    Attributes:
      tile: what is fixed.
      numbers: refs.
      tokens: of the line, `[64]`.
      words: of the line, for dropout, each `[64]`; none without.
    """

    tile: Tile
    numbers: Numbers
    tokens: Tokens
    words: tuple

    @classmethod
    def of(cls, worker: Worker) -> "Pairs":
        """Of a worker's own tokens."""
        side = worker.lines
        tokens = Tokens(mosaic.of_rows(side.tokens.position), mosaic.of_rows(side.tokens.segment))
        return cls(worker.line.layout.tile, worker.numbers, tokens, tuple(map(mosaic.of_rows, side.words)))

    @property
    def drops(self) -> bool:
        """Whether weights are dropped."""
        return self.numbers.threshold is not None

    @property
    def plain(self) -> bool:
        """Whether logits are products times a number, which is positive."""
        return self.tile.soft_cap is None and self.tile.types.bias is None

    @property
    def factor(self) -> float:
        """What `logits` are multiplied by for logits · log2 e: so that scaling is part of other sums."""
        return self.tile.scale * LOG2E if self.plain else 1.0

    def capped(self, products):
        """Products, scaled and capped unless they are plain."""
        if self.plain:
            return products
        cap = self.tile.soft_cap
        if cap is None:
            return self.tile.capped(products)
        # By the exponential, whose error is a float32's of the cap: the hardware's own tanh has 11 bits.
        power = jnp.exp2(products * (2 * LOG2E * self.tile.scale / cap))
        return (cap * LOG2E) * (1.0 - 2.0 / (power + 1.0))

    def logits(self, capped, head, columns: Side, real):
        """With bias; −inf where a pair is hidden, if real is not None. To be multiplied by `factor`."""
        bias, logits, shape = self.tile.types.bias, capped, capped.shape
        if bias is None and real is None:
            return logits
        fields = columns.tokens.position, columns.tokens.segment
        column = Tokens(*map(mosaic.of_columns, fields))
        mosaic.have_read()

        def of_pairs(function, owner):
            return elementwise(functools.partial(function, shape=shape), owner, self.tokens, column, shape)

        if bias is not None:
            score = of_pairs(self.tile.score, self.tile.bias_of(self.numbers, head))
            logits = logits + LOG2E * score
        if real is None:
            return logits
        seen = of_pairs(self.tile.visible, self.tile.mask_of(self.numbers, head))
        if real is not True:
            seen = seen & mosaic.down(real, seen)
        (logits,) = mosaic.in_order(jnp.where(seen, logits, -jnp.inf))
        return logits

    def kept(self, pairs, columns: Side):
        """The pairs, 0 where their weight is dropped."""
        if (threshold := self.numbers.threshold) is None:
            return pairs
        words = tuple(map(mosaic.of_columns, columns.words))
        mosaic.have_read()

        def drawn(threshold, line, column):
            (first, second), (of_key,) = (column, line) if self.tile.keys_first else (line, column)
            return draw(first, second, of_key) >= threshold

        return jnp.where(elementwise(drawn, threshold[0, 0], self.words, words, pairs.shape), pairs, 0.0)
