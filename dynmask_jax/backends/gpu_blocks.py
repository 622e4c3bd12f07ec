"""Arrays and tokens as the GPU kernels take them: blocks and head dims filled up to powers of two."""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from dynmask_jax.array_typing import Array
from dynmask_jax.find_codes import blocks_of
from dynmask_jax.tokens import Tokens

LEAST = 16
"""Rows and columns of the least matrix that a tensor core multiplies."""


def filled_size(size: int) -> int:
    """The power of two that a block or a head dim is filled up to."""
    return max(LEAST, pl.next_power_of_2(size))


def filled(x: Array, block: int, value: float = 0.0) -> Array:
    """`[B, T, N, *H]` with each block filled up: `[B, blocks · size, N, *H]`. Whole blocks are not copied."""
    batch, length, *rest = x.shape
    space = filled_size(block) - block
    ends = ((0, 0),) * len(rest)
    x = jnp.pad(x, ((0, 0), (0, -length % block), *ends), constant_values=value)
    if not space:
        return x
    x = jnp.pad(
        x.reshape(batch, -1, block, *rest), ((0, 0), (0, 0), (0, space), *ends), constant_values=value
    )
    return x.reshape(batch, -1, *rest)


def filled_heads(x: Array, block: int) -> Array:
    """As `filled`, of `[B, T, N, H]`, the head dim too."""
    return filled(jnp.pad(x, ((0, 0),) * 3 + ((0, filled_size(x.shape[3]) - x.shape[3]),)), block)


def unfilled(x: Array, block: int, length: int, head_dim: int | None = None) -> Array:
    """What `filled` and `filled_heads` added, taken away: T tokens are left, and so much of the head dim."""
    batch, _, *rest = x.shape
    if filled_size(block) != block:
        x = x.reshape(batch, -1, filled_size(block), *rest)[:, :, :block].reshape(batch, -1, *rest)
    x = x[:, :length]
    return x if head_dim is None else x[..., :head_dim]


def filled_tokens(tokens: Tokens, block: int) -> Tokens:
    """`[R, blocks · size]`, filled up with copies of each block's last token."""

    def field(values):
        blocks = blocks_of(values, block)
        space = filled_size(block) - block
        return jnp.pad(blocks, ((0, 0), (0, 0), (0, space)), mode="edge").reshape(values.shape[0], -1)

    return Tokens(field(tokens.position), field(tokens.segment))
