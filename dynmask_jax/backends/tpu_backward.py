"""Gradients of the TPU backend: one kernel for dq, along lines of queries, one for dk and dv, of keys.

A third one, of the bias, is a variant of that for dq.

Each computes its tile of weights anew from q, k and lse; nothing of size T·S is kept. Logits, lse and
delta are as in `tpu_tile`: with delta = Σ out·d_out − d_lse, a logit's gradient is
weight · (d_out·v − delta).

Reference: FlashAttention-2, Dao 2023, arXiv:2307.08691, algorithm 2.
"""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl

from dynmask_jax.array_typing import Array, pytree
from dynmask_jax.backends.kernel_tile import LOG2E, Numbers, dot, of_shown
from dynmask_jax.backends.tpu_blocks import LANES, blocks_by_head, dropout_words, from_blocks, token_blocks
from dynmask_jax.backends.tpu_grid import Columns, Kernel, Lines, block_type, sweep
from dynmask_jax.backends.tpu_tile import TpuTile, by_code, hidden, in_lanes, keep_rows, widened
from dynmask_jax.bias_algebra import learnable
from dynmask_jax.plans import Plan
from dynmask_jax.scores import Scores


def gradients(scores: Scores, saved: tuple, cotangents: tuple) -> tuple[Array, Array, Array, list[Array]]:
    """dq, dk, dv, d_bias from the residuals `(q, k, v, plan, out, lse)` and the cotangents of out and lse."""
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
    queries += (jnp.stack(shared, axis=3), words.of_queries)
    keys = tuple(blocks_by_head(x, plan.block_k, plan.rows) for x in (k, v))
    columns = Columns(token_blocks(plan.kv_tokens, plan.block_k, words.of_keys), keys)
    dq = _sweep_queries(scores, plan, queries, columns)
    dk, dv = _sweep_keys(scores, plan, queries, Lines.of_keys(plan, words.of_keys, keys))
    return (
        from_blocks(dq, plan.block_q, q),
        from_blocks(dk, plan.block_k, k),
        from_blocks(dv, plan.block_k, v),
        bias_gradients(scores, plan, queries, columns),
    )


@pytree
class QueryState:
    """What a line of queries keeps over its blocks of keys; level and delta are alike in all lanes."""

    tokens: Array  # [2, bq, 128]
    level: Array  # [bq, 128]
    delta: Array  # [bq, 128]
    words: Array | None  # [2, bq, 128]
    sums: Array  # dq [bq, H], or the bias's gradients [leaves, 128]


def _query_kernel(active, numbers, tokens, line, column, out, state, *, tile):
    """Sums the gradients of queries, or those of the bias, over a line of queries."""
    (q, d_out, shared, words), (k, v) = line, column
    head, step = pl.program_id(1), pl.program_id(2)
    code, begins, ends = active.at(step)
    of_tile = numbers, head, (state.tokens, tokens[1])

    @pl.when(begins)
    def _():
        keep_rows(state.tokens, tokens[0])
        if words is not None:
            keep_rows(state.words, words)
        state.level[...] = in_lanes(shared[:1])
        state.delta[...] = in_lanes(shared[1:])
        state.sums[...] = jnp.zeros(state.sums.shape, jnp.float32)

    def add(hide):
        capped = tile.capped(dot(q[...], k[...], 1, 1))  # [bq, bk]
        width = capped.shape[1]
        logits = hidden(tile.biased(capped, *of_tile), hide)
        weights = jnp.exp2(logits - widened(state.level[...], width))
        d_weights = dot(d_out[...], v[...], 1, 1)
        if words is not None:
            d_weights = tile.kept_by_strip(d_weights, numbers, (state.words, tokens[1][3:]))
        d_logits = weights * (d_weights - widened(state.delta[...], width))
        if tile.of_bias:
            state.sums[...] += tile.bias_gradients(of_shown(d_logits, weights, hide is not None), *of_tile)
            return
        d_products = of_shown(tile.slope(capped, d_logits), weights, hide is not None)
        state.sums[...] += dot(d_products.astype(k.dtype), k[...], 1, 0)

    by_code(code, add, lambda logits: tile.hide(logits, *of_tile))

    @pl.when(ends)
    def _():
        sums = state.sums[...]
        out[...] = sums if tile.of_bias else (sums * tile.scale).astype(out.dtype)


def _sweep_queries(scores: Scores, plan: Plan, queries, columns: Columns, *, of_bias: bool = False):
    heads, (bq, head_dim) = queries[0].shape[1], queries[0].shape[3:]
    group = heads // columns.arrays[0].shape[1]
    size, dtype = (bq, head_dim), queries[0].dtype
    if of_bias:
        size, dtype = (len(learnable(scores.bias)[0]), LANES), jnp.float32
    kernel = Kernel(
        body=functools.partial(_query_kernel, tile=TpuTile.of(scores, plan, of_bias=of_bias)),
        name="dynmask_dbias" if of_bias else "dynmask_dq",
        heads=heads,
        inner=1,
        column_head=lambda head, _: head // group,
        out=block_type(size, dtype),
        scratch=QueryState(
            block_type((2, bq, LANES), jnp.int32),
            block_type((bq, LANES)),
            block_type((bq, LANES)),
            None if scores.dropout is None else block_type((2, bq, LANES), jnp.int32),
            block_type(size),
        ),
    )
    return sweep(kernel, Numbers.of(scores, plan), Lines.of_queries(plan, queries), columns)


def bias_gradients(scores: Scores, plan: Plan, queries, columns: Columns) -> list[Array]:
    """Gradients of the bias's learnable leaves, by a kernel of its own.

    Where nobody asks for them, as of an ALiBi's slopes that are constants, the compiler leaves it out.
    """
    leaves = learnable(scores.bias)[0]
    if not leaves:
        return []
    found = _sweep_queries(scores, plan, queries, columns, of_bias=True)  # [O, N, L, leaves, 128]
    by_head = found.sum(axis=(0, 2, 4))
    return [by_head[:, at] if jnp.ndim(leaf) else by_head[:, at].sum() for at, leaf in enumerate(leaves)]


@pytree
class KeyState:
    """What a line of keys gathers over its blocks of queries and the heads of its group."""

    tokens: Array  # [2, bk, 128]
    dk: Array  # [bk, H]
    dv: Array  # [bk, V]
    words: Array | None  # [1, bk, 128]


def _key_kernel(active, numbers, tokens, line, column, out, state, *, tile):
    (k, v), (q, d_out, shared, words), (dk, dv) = line, column, out
    head, step, inner = (pl.program_id(axis) for axis in (1, 2, 3))
    group = pl.num_programs(3)
    code, begins, ends = active.at(step)

    @pl.when(begins & (inner == 0))
    def _():
        keep_rows(state.tokens, tokens[0])
        if words is not None:
            keep_rows(state.words, tokens[0], (3,))
        state.dk[...] = jnp.zeros(state.dk.shape, jnp.float32)
        state.dv[...] = jnp.zeros(state.dv.shape, jnp.float32)

    of_tile = numbers, head * group + inner, (state.tokens, tokens[1])

    def keep(pairs):
        return pairs if words is None else tile.kept_by_strip(pairs, numbers, (state.words, words))

    def add(hide):
        capped = tile.capped(dot(k[...], q[...], 1, 1))  # [bk, bq]
        weights = jnp.exp2(hidden(tile.biased(capped, *of_tile), hide) - shared[:1])
        state.dv[...] += dot(keep(weights).astype(d_out.dtype), d_out[...], 1, 0)
        d_logits = weights * (keep(dot(v[...], d_out[...], 1, 1)) - shared[1:])
        d_products = of_shown(tile.slope(capped, d_logits), weights, hide is not None)
        state.dk[...] += dot(d_products.astype(q.dtype), q[...], 1, 0)

    by_code(code, add, lambda logits: tile.hide(logits, *of_tile))

    @pl.when(ends & (inner == group - 1))
    def _():
        dk[...] = (state.dk[...] * tile.scale).astype(dk.dtype)
        dv[...] = state.dv[...].astype(dv.dtype)


def _sweep_keys(scores: Scores, plan: Plan, queries, lines: Lines):
    k, v = lines.arrays
    heads, bk = k.shape[1], k.shape[3]
    group = queries[0].shape[1] // heads
    kernel = Kernel(
        body=functools.partial(_key_kernel, tile=TpuTile.of(scores, plan, keys_first=True)),
        name="dynmask_dkv",
        heads=heads,
        inner=group,
        column_head=lambda head, inner: head * group + inner,
        out=tuple(block_type(x.shape[3:], x.dtype) for x in (k, v)),
        scratch=KeyState(
            block_type((2, bk, LANES), jnp.int32),
            block_type(k.shape[3:]),
            block_type(v.shape[3:]),
            None if scores.dropout is None else block_type((1, bk, LANES), jnp.int32),
        ),
    )
    columns = Columns(token_blocks(plan.q_tokens, plan.block_q), queries)
    return sweep(kernel, Numbers.of(scores, plan), lines, columns)
