"""A tile inside a GPU kernel: the tokens of a line and of its columns, logits under mask and bias, draws."""

import functools
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from dynmask_jax.backends.gpu_lines import Line, Side
from dynmask_jax.backends.kernel_tile import LOG2E, Numbers, Tile
from dynmask_jax.backends.tile_expressions import strongly_typed
from dynmask_jax.tokens import Tokens


@dataclass(frozen=True)
class Pairs:
    """What a program needs of its line to score pairs with columns.

    Attributes:
      tile: what is fixed.
      numbers: refs.
      tokens: of the line, `[line, 1]`.
      words: of the line, for dropout, each `[line, 1]`; none without.
    """

    tile: Tile
    numbers: Numbers
    tokens: Tokens
    words: tuple

    @classmethod
    def of(cls, line: Line, numbers: Numbers, side: Side) -> "Pairs":
        """Of a program's line, on its side."""
        tokens = _tokens_at(side, line.tokens)[:, None]
        words = tuple(word[line.tokens][:, None] for word in side.words)
        return cls(line.layout.tile, numbers, tokens, words)

    def logits(self, capped, head, columns: Side, at, real):
        """Logits · log2 e with bias `[line, column]`; −inf where a pair is hidden, if real is not None."""
        if self.tile.types.bias is None and real is None:
            return capped
        column, shape = _tokens_at(columns, at)[None, :], capped.shape
        logits = capped
        if self.tile.types.bias is not None:
            bias = self.tile.bias_of(self.numbers, head)
            score = strongly_typed(functools.partial(self.tile.score, shape=shape), bias, self.tokens, column)
            logits = logits + LOG2E * score
        if real is None:
            return logits
        mask = self.tile.mask_of(self.numbers, head)
        seen = strongly_typed(functools.partial(self.tile.visible, shape=shape), mask, self.tokens, column)
        if real is not True:
            seen = seen & jnp.broadcast_to(real[None, :], shape)
        return jnp.where(seen, logits, -jnp.inf)

    def bias_slopes(self, head, columns: Side, at, shape: tuple[int, ...]) -> list:
        """d logit / d leaf of each learnable leaf of the bias, `[line, column]`."""
        column = _tokens_at(columns, at)[None, :]
        bias = self.tile.bias_of(self.numbers, head)
        slopes = functools.partial(self.tile.score_slopes, shape=shape)
        return strongly_typed(slopes, bias, self.tokens, column)

    def kept(self, pairs, columns: Side, *at: Any):
        """The pairs, 0 where their weight is dropped; `at` is the columns' tile, and which of their heads."""
        threshold = self.numbers.threshold
        if threshold is None:
            return pairs
        column = tuple(word[at][None, :] for word in columns.words)
        return self.tile.kept(pairs, threshold[0, 0], self.words, column)


def _tokens_at(side: Side, at) -> Tokens:
    """The side's tokens in a slice, from refs."""
    return Tokens(side.tokens.position[at], side.tokens.segment[at])
