"""Gradients of the TPU backend: one kernel along lines of keys gives dq, dk and dv, of five products a tile.

A tile of weights is computed anew from q, k and lse; nothing of size T·S is kept. dk and dv are summed in
vector memory over a line, dq in HBM over the lines: see `tpu_sums`. Logits, lse and delta are as in
`tpu_tile`: with delta = Σ out·d_out − d_lse, a logit's gradient is weight · (d_out·v − delta).

Queries and gradients lie upright, `[H, tokens]`. So the three products that make gradients have H rows,
and cost half as much where H is 64, half a matrix unit's width.

Reference: FlashAttention-2, Dao 2023, arXiv:2307.08691, algorithm 2.
"""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl

from dynmask_jax.array_typing import Array, pytree
from dynmask_jax.backends.kernel_tile import LOG2E, Numbers, dot, of_shown
from dynmask_jax.backends.tpu_bias import bias_gradients
from dynmask_jax.backends.tpu_blocks import LANES, blocks_by_head, dropout_words, from_blocks, token_blocks
from dynmask_jax.backends.tpu_grid import Columns, Kernel, Lines, block_type, sweep
from dynmask_jax.backends.tpu_tile import TpuTile, by_code, hidden, keep_rows
from dynmask_jax.plans import Plan
from dynmask_jax.scores import Scores

Gradients = tuple[Array, Array, Array, list[Array]]


def sums(scores: Scores, saved: tuple, cotangents: tuple) -> Gradients:
    """dq, dk, dv, d_bias from the residuals `(q, k, v, plan, out, lse)` and the cotangents of out and lse.

    The first three in blocks, upright: `[O, N, blocks, H, size]`, and dq without the scale.
    """
    q, k, v, plan, out, lse = saved
    d_out, d_lse = cotangents
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1) - d_lse
    # A query that sees nothing gets weights of zero: exp2(−inf).
    level = jnp.where(jnp.isneginf(lse), jnp.inf, lse * LOG2E)
    if scores.dropout is not None:  # so that a tile's weights need only be left out
        d_out = (d_out.astype(jnp.float32) * scores.dropout.scale).astype(d_out.dtype)
    words = dropout_words(scores.dropout, plan)
    queries = tuple(blocks_by_head(x, plan.block_q, plan.rows) for x in (q, d_out))
    # Queries that fill a block up weigh nothing: their own logit, a bias alone, may be any number.
    shared = (level, jnp.inf), (delta, 0.0)
    shared = [blocks_by_head(x, plan.block_q, plan.rows, filling) for x, filling in shared]
    beside = jnp.stack(shared, axis=3), words.of_queries
    keys = tuple(blocks_by_head(x, plan.block_k, plan.rows) for x in (k, v))
    upright = tuple(_turned(x) for x in queries)
    (dk, dv), dq = _sweep(scores, plan, (*upright, *beside), Lines.of_keys(plan, words.of_keys, keys))
    columns = Columns(token_blocks(plan.kv_tokens, plan.block_k, words.of_keys), keys)
    return dq, dk, dv, bias_gradients(scores, plan, (*queries, *beside), columns)


def shaped(scores: Scores, gradients: Gradients, saved: tuple) -> Gradients:
    """What `sums` returns, or a sum of such, in the shapes and types of q, k and v."""
    *arrays, plan, _, _ = saved
    dq, dk, dv, d_bias = gradients
    blocks = (dq * scores.scale, plan.block_q), (dk, plan.block_k), (dv, plan.block_k)
    dq, dk, dv = (
        from_blocks(_turned(x.astype(like.dtype)), size, like)
        for (x, size), like in zip(blocks, arrays, strict=True)
    )
    return dq, dk, dv, d_bias


def _turned(blocks: Array) -> Array:
    return blocks.swapaxes(3, 4)


@pytree
class State:
    """What a line of keys gathers over its blocks of queries and the heads of its group."""

    tokens: Array  # [2, bk, 128]; 3 where keys may be filling
    k_upright: Array  # [H, bk]
    dk: Array  # [H, bk]
    dv: Array  # [V, bk]
    words: Array | None  # [1, bk, 128]


def _kernel(active, numbers, tokens, line, column, out, state, *, tile):
    (k, v), (q, d_out, shared, words), ((dk, dv), dq) = line, column, out
    head, step, inner = (pl.program_id(axis) for axis in (1, 2, 3))
    group = pl.num_programs(3)
    _, begins, ends = active.at(step)
    dq.begin()

    @pl.when(begins & (inner == 0))
    def _():
        state.k_upright[...] = k[...].T
        keep_rows(state.tokens, tokens[0], range(state.tokens.shape[0]))
        if words is not None:
            keep_rows(state.words, tokens[0], (3,))
        state.dk[...] = jnp.zeros(state.dk.shape, jnp.float32)
        state.dv[...] = jnp.zeros(state.dv.shape, jnp.float32)

    def add(hide, strips):
        of_tile = numbers, head * group + inner, (strips.take(state.tokens, 1), tokens[1])

        def keep(pairs):
            if words is None:
                return pairs
            return tile.kept_by_strip(pairs, numbers, (strips.take(state.words, 1), words))

        capped = tile.capped(dot(strips.take(k, 0), q[...], 1, 0))  # [bk, bq]
        weights = jnp.exp2(hidden(tile.biased(capped, *of_tile), hide, of_tile) - shared[:1])
        strips.add_to(state.dv, dot(d_out[...], keep(weights).astype(d_out.dtype), 1, 1))
        d_logits = weights * (keep(dot(strips.take(v, 0), d_out[...], 1, 0)) - shared[1:])
        d_products = of_shown(tile.slope(capped, d_logits), weights, hide is not None).astype(q.dtype)
        strips.add_to(state.dk, dot(q[...], d_products, 1, 1))
        dq.add(dot(strips.take(state.k_upright, 1), d_products, 1, 0))

    by_code(active, step, tile, add)
    dq.end()

    @pl.when(ends & (inner == group - 1))
    def _():
        dk[...] = (state.dk[...] * tile.scale).astype(dk.dtype)
        dv[...] = state.dv[...].astype(dv.dtype)


def _sweep(scores: Scores, plan: Plan, queries, lines: Lines):
    k, v = lines.arrays
    heads, bk = k.shape[1], k.shape[3]
    group = queries[0].shape[1] // heads
    tile = TpuTile.of(scores, plan, keys_first=True)
    kernel = Kernel(
        body=functools.partial(_kernel, tile=tile),
        name="dynmask_backward",
        heads=heads,
        inner=group,
        column_head=lambda head, inner: head * group + inner,
        out=tuple(block_type(x.shape[:2:-1], x.dtype) for x in (k, v)),
        scratch=State(
            block_type((3 if tile.filled else 2, bk, LANES), jnp.int32),
            block_type(k.shape[:2:-1], k.dtype),
            block_type(k.shape[:2:-1]),
            block_type(v.shape[:2:-1]),
            None if scores.dropout is None else block_type((1, bk, LANES), jnp.int32),
        ),
        sums=block_type(queries[0].shape[3:]),
    )
    columns = Columns(token_blocks(plan.q_tokens, plan.block_q), queries)
    return sweep(kernel, Numbers.of(scores, plan), lines, columns)
