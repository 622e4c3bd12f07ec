"""Gradients of the TPU backend: one kernel for dq, along lines of queries, one for dk and dv, of keys.

Each computes its tile of weights anew from q, k and lse; nothing of size T·S is kept. Logits, lse and
delta are as in `tpu_tile`: with delta = Σ out·d_out − d_lse, a logit's gradient is
weight · (d_out·v − delta).

Reference: FlashAttention-2, Dao 2023, arXiv:2307.08691, algorithm 2.
"""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl

from dynmask_jax.array_typing import Array, pytree
from dynmask_jax.backends.tpu_grid import (
    LANES,
    Columns,
    Kernel,
    Lines,
    block_type,
    blocks_by_head,
    from_blocks,
    sweep,
    token_blocks,
)
from dynmask_jax.backends.tpu_tile import LOG2E, Tile, by_code, dot, hidden, in_lanes, keep_tokens, widened
from dynmask_jax.plans import Plan
from dynmask_jax.scores import Scores


def gradients(scores: Scores, saved: tuple, cotangents: tuple) -> tuple[Array, Array, Array, list[Array]]:
    """dq, dk, dv from the residuals `(q, k, v, plan, out, lse)` and the cotangents of out and lse."""
    q, k, v, plan, out, lse = saved
    d_out, d_lse = cotangents
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1) - d_lse
    # A query that sees nothing gets weights of zero: exp2(−inf).
    level = jnp.where(jnp.isneginf(lse), jnp.inf, lse * LOG2E)
    queries = tuple(blocks_by_head(x, plan.block_q, plan.rows) for x in (q, d_out))
    shared = jnp.stack([blocks_by_head(x, plan.block_q, plan.rows) for x in (level, delta)], axis=3)
    queries += (shared,)
    keys = tuple(blocks_by_head(x, plan.block_k, plan.rows) for x in (k, v))
    dq = _sweep_queries(scores, plan, queries, keys)
    dk, dv = _sweep_keys(scores, plan, queries, keys)
    return (
        from_blocks(dq, plan.block_q, q),
        from_blocks(dk, plan.block_k, k),
        from_blocks(dv, plan.block_k, v),
        [],
    )


def _of_shown(d_products, weights, hide):
    """Zero where the weight is: a hidden key or value may be so great that its products overflow."""
    return d_products if hide is None else jnp.where(weights > 0.0, d_products, 0.0)


@pytree
class QueryState:
    """What a line of queries keeps over its blocks of keys; level and delta are alike in all lanes."""

    tokens: Array  # [2, bq, 128]
    level: Array  # [bq, 128]
    delta: Array  # [bq, 128]
    dq: Array  # [bq, H]


def _query_kernel(active, mask, tokens, line, column, out, state, *, tile):
    (q, d_out, shared), (k, v) = line, column
    head, step = pl.program_id(1), pl.program_id(2)
    code, begins, ends = active.at(step)

    @pl.when(begins)
    def _():
        keep_tokens(state.tokens, tokens[0])
        state.level[...] = in_lanes(shared[:1])
        state.delta[...] = in_lanes(shared[1:])
        state.dq[...] = jnp.zeros(state.dq.shape, jnp.float32)

    def add(hide):
        logits = tile.logits(dot(q[...], k[...], 1, 1))  # [bq, bk]
        width = logits.shape[1]
        weights = jnp.exp2(hidden(logits, hide) - widened(state.level[...], width))
        d_weights = dot(d_out[...], v[...], 1, 1)
        d_logits = weights * (d_weights - widened(state.delta[...], width))
        d_products = _of_shown(tile.slope(logits, d_logits), weights, hide)
        state.dq[...] += dot(d_products.astype(k.dtype), k[...], 1, 0)

    by_code(code, add, lambda logits: tile.hide(logits, mask, head, (state.tokens[...], tokens[1][...])))

    @pl.when(ends)
    def _():
        out[...] = (state.dq[...] * tile.scores.scale).astype(out.dtype)


def _sweep_queries(scores, plan: Plan, queries, keys):
    heads, (bq, head_dim) = queries[0].shape[1], queries[0].shape[3:]
    group = heads // keys[0].shape[1]
    kernel = Kernel(
        body=functools.partial(_query_kernel, tile=Tile.of(scores, plan, keys_first=False)),
        name="dynmask_dq",
        heads=heads,
        inner=1,
        column_head=lambda head, _: head // group,
        out=block_type((bq, head_dim), queries[0].dtype),
        scratch=QueryState(
            block_type((2, bq, LANES), jnp.int32),
            block_type((bq, LANES)),
            block_type((bq, LANES)),
            block_type((bq, head_dim)),
        ),
    )
    columns = Columns(token_blocks(plan.kv_tokens, plan.block_k), keys)
    return sweep(kernel, plan.mask, Lines.of_queries(plan, queries), columns)


@pytree
class KeyState:
    """What a line of keys gathers over its blocks of queries and the heads of its group."""

    tokens: Array  # [2, bk, 128]
    dk: Array  # [bk, H]
    dv: Array  # [bk, H]


def _key_kernel(active, mask, tokens, line, column, out, state, *, tile, group):
    (k, v), (q, d_out, shared), (dk, dv) = line, column, out
    head, step, inner = (pl.program_id(axis) for axis in (1, 2, 3))
    code, begins, ends = active.at(step)

    @pl.when(begins & (inner == 0))
    def _():
        keep_tokens(state.tokens, tokens[0])
        state.dk[...] = jnp.zeros(state.dk.shape, jnp.float32)
        state.dv[...] = jnp.zeros(state.dv.shape, jnp.float32)

    def add(hide):
        logits = tile.logits(dot(k[...], q[...], 1, 1))  # [bk, bq]
        weights = jnp.exp2(hidden(logits, hide) - shared[:1])
        state.dv[...] += dot(weights.astype(d_out.dtype), d_out[...], 1, 0)
        d_logits = weights * (dot(v[...], d_out[...], 1, 1) - shared[1:])
        d_products = _of_shown(tile.slope(logits, d_logits), weights, hide)
        state.dk[...] += dot(d_products.astype(q.dtype), q[...], 1, 0)

    def hide(logits):
        return tile.hide(logits, mask, head * group + inner, (state.tokens[...], tokens[1][...]))

    by_code(code, add, hide)

    @pl.when(ends & (inner == group - 1))
    def _():
        dk[...] = (state.dk[...] * tile.scores.scale).astype(dk.dtype)
        dv[...] = state.dv[...].astype(dv.dtype)


def _sweep_keys(scores, plan: Plan, queries, keys):
    heads, (bk, head_dim) = keys[0].shape[1], keys[0].shape[3:]
    group = queries[0].shape[1] // heads
    kernel = Kernel(
        body=functools.partial(_key_kernel, tile=Tile.of(scores, plan, keys_first=True), group=group),
        name="dynmask_dkv",
        heads=heads,
        inner=group,
        column_head=lambda head, inner: head * group + inner,
        out=(block_type((bk, head_dim), keys[0].dtype),) * 2,
        scratch=KeyState(
            block_type((2, bk, LANES), jnp.int32), block_type((bk, head_dim)), block_type((bk, head_dim))
        ),
    )
    columns = Columns(token_blocks(plan.q_tokens, plan.block_q), queries)
    return sweep(kernel, plan.mask, Lines.of_keys(plan, keys), columns)
