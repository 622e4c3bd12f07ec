"""Gradients of a bias's learnable leaves on TPU: a kernel of its own, along lines of queries.

Where nobody asks for them, as of an ALiBi's slopes that are constants, the compiler leaves it out.
"""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl

from dynmask_jax.array_typing import Array, pytree
from dynmask_jax.backends.kernel_tile import Numbers, dot, of_shown
from dynmask_jax.backends.tpu_blocks import LANES
from dynmask_jax.backends.tpu_grid import Columns, Kernel, Lines, block_type, sweep
from dynmask_jax.backends.tpu_tile import TpuTile, by_code, hidden, in_lanes, keep_rows, widened
from dynmask_jax.bias_algebra import learnable
from dynmask_jax.plans import Plan
from dynmask_jax.scores import Scores


@pytree
class State:
    """What a line of queries keeps over its blocks of keys; level and delta are alike in all lanes."""

    tokens: Array  # [2, bq, 128]
    level: Array  # [bq, 128]
    delta: Array  # [bq, 128]
    words: Array | None  # [2, bq, 128]
    sums: Array  # [leaves, 128]


def _kernel(active, numbers, tokens, line, column, out, state, *, tile):
    (q, d_out, shared, words), (k, v) = line, column
    head, step = pl.program_id(1), pl.program_id(2)
    _, begins, ends = active.at(step)

    @pl.when(begins)
    def _():
        keep_rows(state.tokens, tokens[0])
        if words is not None:
            keep_rows(state.words, words)
        state.level[...] = in_lanes(shared[:1])
        state.delta[...] = in_lanes(shared[1:])
        state.sums[...] = jnp.zeros(state.sums.shape, jnp.float32)

    def add(hide, strips):
        columns = strips.take(tokens[1], 1)
        of_tile = numbers, head, (state.tokens, columns)
        capped = tile.capped(dot(q[...], strips.take(k, 0), 1, 1))  # [bq, bk]
        width = capped.shape[1]
        logits = hidden(tile.biased(capped, *of_tile), hide, of_tile)
        weights = jnp.exp2(logits - widened(state.level[...], width))
        d_weights = dot(d_out[...], strips.take(v, 0), 1, 1)
        if words is not None:
            d_weights = tile.kept_by_strip(d_weights, numbers, (state.words, columns[3:]))
        d_logits = weights * (d_weights - widened(state.delta[...], width))
        state.sums[...] += tile.bias_gradients(of_shown(d_logits, weights, hide is not None), *of_tile)

    by_code(active, step, tile, add)

    @pl.when(ends)
    def _():
        out[...] = state.sums[...]


def bias_gradients(scores: Scores, plan: Plan, queries, columns: Columns) -> list[Array]:
    """Of each learnable leaf, summed over rows and pairs: scalars, or `[N]` of leaves per head.

    `queries` are blocks of q and d_out, of level and delta, and of words for dropout or None; the columns
    have k and v.
    """
    leaves = learnable(scores.bias)[0]
    if not leaves:
        return []
    heads, bq = queries[0].shape[1], queries[0].shape[3]
    group = heads // columns.arrays[0].shape[1]
    size = len(leaves), LANES
    kernel = Kernel(
        body=functools.partial(_kernel, tile=TpuTile.of(scores, plan)),
        name="dynmask_dbias",
        heads=heads,
        inner=1,
        column_head=lambda head, _: head // group,
        out=block_type(size),
        scratch=State(
            block_type((2, bq, LANES), jnp.int32),
            block_type((bq, LANES)),
            block_type((bq, LANES)),
            None if scores.dropout is None else block_type((2, bq, LANES), jnp.int32),
            block_type(size),
        ),
    )
    found = sweep(kernel, Numbers.of(scores, plan), Lines.of_queries(plan, queries), columns)
    by_head = found.sum(axis=(0, 2, 4))  # from [O, N, L, leaves, 128]
    return [by_head[:, at] if jnp.ndim(leaf) else by_head[:, at].sum() for at, leaf in enumerate(leaves)]
