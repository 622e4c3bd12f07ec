"""Arrays and tokens cut into the blocks that the TPU kernels take, filled up to whole vector registers."""

import jax.numpy as jnp

from dynmask_jax.array_typing import Array, Float, Int, pytree
from dynmask_jax.dropout import Draws
from dynmask_jax.find_codes import blocks_of
from dynmask_jax.plans import Plan
from dynmask_jax.tokens import Tokens

LANES = 128


def blocks_by_head(
    x: Float[Array, "B T N *H"], block: int, rows: int, filling: float = 0.0
) -> Float[Array, "O N blocks size *H"]:
    """Cut into blocks, heads first. O is B where one plan serves all sequences, else 1.

    Blocks are numbered over the rows of the plan; size is the block, filled up.
    """
    batch, length, heads, *rest = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % block), *[(0, 0)] * (x.ndim - 2)), constant_values=filling)
    x = x.reshape(batch // rows, rows, -1, block, heads, *rest)
    to_lanes = ((0, 0),) * 3 + ((0, -block % LANES),) + ((0, 0),) * (x.ndim - 4)
    x = jnp.pad(x, to_lanes, constant_values=filling)
    x = jnp.moveaxis(x, 4, 1)
    return x.reshape(batch // rows, heads, -1, x.shape[4], *rest)


def from_blocks(x: Float[Array, "O N blocks size *H"], block: int, like: Float[Array, "B T N ..."]):
    """`[B, T, N, *H]` again, of the batch and length of `like`."""
    outer, heads, _, _, *rest = x.shape
    x = x[:, :, :, :block].reshape(outer, heads, like.shape[0] // outer, -1, block, *rest)
    x = jnp.moveaxis(x, 1, 4)
    return x.reshape(like.shape[0], -1, heads, *rest)[:, : like.shape[1]]


@pytree
class Words:
    """What draws of dropout are made of, for the kernels. Made by `dropout_words`; None without dropout.

    Attributes:
      of_queries: `[O, N, blocks, 2, bq]`, filled up as other arrays.
      of_keys: `[R, S]`.
    """

    of_queries: Int[Array, "O N blocks 2 bq"] | None
    of_keys: Int[Array, "R S"] | None


def dropout_words(dropout: Draws | None, plan: Plan) -> Words:
    """The words of the plan's tokens."""
    if dropout is None:
        return Words(None, None)
    blocks = [blocks_by_head(x, plan.block_q, plan.rows) for x in dropout.of_queries(plan.q_tokens)]
    return Words(jnp.stack(blocks, axis=3), dropout.of_keys(plan.kv_tokens))


def token_blocks(
    tokens: Tokens, block: int, words: Int[Array, "R T"] | None = None
) -> Int[Array, "blocks fields size"]:
    """Of each block, numbered over all rows: position, segment, 1 where it is no filling, and its words."""
    real = jnp.ones_like(tokens.position)
    fields = [_filled(blocks_of(field, block), "edge") for field in (tokens.position, tokens.segment)]
    real = jnp.pad(real, ((0, 0), (0, -real.shape[1] % block))).reshape(*fields[0].shape[:2], block)
    fields.append(_filled(real, "constant"))
    if words is not None:
        fields.append(_filled(blocks_of(words, block), "edge"))
    fields = jnp.stack(fields, axis=2)
    return fields.reshape(-1, *fields.shape[2:])


def _filled(field, mode):
    return jnp.pad(field, ((0, 0), (0, 0), (0, -field.shape[2] % LANES)), mode=mode)
