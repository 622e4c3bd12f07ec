"""Which blocks a mask shows, from one reading of its expression over the spans of blocks of tokens."""

import functools

import jax.numpy as jnp

from dynmask_jax.array_typing import Array, Int
from dynmask_jax.block_codes import FULL, SKIP, TEST
from dynmask_jax.mask_algebra import Mask, by_head, evaluate, head_count
from dynmask_jax.sharding import over_rows
from dynmask_jax.spans import Span
from dynmask_jax.tokens import Tokens


def find_codes(
    mask: Mask, q_tokens: Tokens, kv_tokens: Tokens, blocks: tuple[int, int]
) -> Int[Array, "R Tb Sb"]:
    """The codes of the blocks between tokens `[R, T]` and `[R, S]`, `blocks` of them each way in a block."""
    return over_rows(functools.partial(_codes_of, blocks=blocks), mask, q_tokens, kv_tokens)


def _codes_of(mask: Mask, q_tokens: Tokens, kv_tokens: Tokens, *, blocks: tuple[int, int]):
    block_q, block_k = blocks
    codes = _codes(mask, _block_spans(q_tokens, block_q), _block_spans(kv_tokens, block_k))
    whole_q = jnp.arange(codes.shape[1]) < q_tokens.shape[1] // block_q
    whole_k = jnp.arange(codes.shape[2]) < kv_tokens.shape[1] // block_k
    # A ragged last block has no pair at its padding: it is tested, never full.
    return jnp.where(whole_q[:, None] & whole_k[None, :], codes, jnp.minimum(codes, TEST))


def blocks_of(values: Int[Array, "R T"], size: int) -> Int[Array, "R Tb size"]:
    """Cut into blocks; the last is filled up with copies of the last value, which widen no span."""
    values = jnp.pad(values, ((0, 0), (0, -values.shape[1] % size)), mode="edge")
    return values.reshape(values.shape[0], -1, size)


def _block_spans(tokens: Tokens, size: int) -> Tokens:
    def span(field):
        blocks = blocks_of(field, size)
        return Span(blocks.min(axis=-1), blocks.max(axis=-1))

    return Tokens(span(tokens.position), span(tokens.segment))


def _codes(mask: Mask, q: Tokens, k: Tokens) -> Int[Array, "R Tb Sb"]:
    shape = (*q.shape, k.shape[1])

    def verdict(one_head):
        seen = evaluate(one_head, q[:, :, None], k[:, None, :])
        return jnp.broadcast_to(seen.some, shape), jnp.broadcast_to(seen.every, shape)

    some, every = by_head(verdict, mask)
    if head_count(mask) is not None:
        some, every = some.any(axis=0), every.all(axis=0)
    return jnp.where(every, FULL, jnp.where(some, TEST, SKIP)).astype(jnp.int8)
