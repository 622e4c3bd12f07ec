"""Attention on TPU: Pallas kernels for Mosaic, forward here and backward in `tpu_backward`.

The mask's own expression is traced inside the kernel, on the tokens of the tile, and asked only where
the plan says that a block must be tested, and there of the strips alone that show anything. On other
platforms the kernels are interpreted: right, slow, for tests.

References: FlashAttention-2, Dao 2023, arXiv:2307.08691; the flat list of blocks as scalar prefetch
follows JAX's splash attention and Pallas's block-sparse kernels.
"""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl

from dynmask_jax.array_typing import Array, pytree
from dynmask_jax.backends.backend import Backend
from dynmask_jax.backends.by_head import by_key_head
from dynmask_jax.backends.kernel_checks import check_kernel_bias, check_kernel_mask
from dynmask_jax.backends.kernel_tile import LOG2E, Numbers, dot
from dynmask_jax.backends.tpu_backward import shaped, sums
from dynmask_jax.backends.tpu_blocks import LANES, blocks_by_head, dropout_words, from_blocks, token_blocks
from dynmask_jax.backends.tpu_grid import Columns, Kernel, Lines, block_type, sweep
from dynmask_jax.backends.tpu_tile import TpuTile, by_code, hidden, keep_rows, lane_sums, widened
from dynmask_jax.errors import Unsupported
from dynmask_jax.plans import Plan
from dynmask_jax.scores import Scores


@pytree
class State:
    """What a line of queries gathers over its blocks, in vector memory.

    `peak` is the same in all lanes; `total` is spread over them until the line's end.
    """

    tokens: Array  # [2, bq, 128]
    peak: Array  # [bq, 128]
    total: Array  # [bq, 128]
    weighted: Array  # [bq, V]
    words: Array | None  # [2, bq, 128]


def _kernel(active, numbers, tokens, line, column, out, state, *, tile):
    (q, words), (k, v), (out, lse) = line, column, out
    head, step = pl.program_id(1), pl.program_id(2)
    _, begins, ends = active.at(step)

    @pl.when(begins)
    def _():
        keep_rows(state.tokens, tokens[0])
        if words is not None:
            keep_rows(state.words, words)
        state.peak[...] = jnp.full(state.peak.shape, -jnp.inf, jnp.float32)
        state.total[...] = jnp.zeros(state.total.shape, jnp.float32)
        state.weighted[...] = jnp.zeros(state.weighted.shape, jnp.float32)

    def add(hide, strips):
        columns = strips.take(tokens[1], 1)
        of_tile = numbers, head, (state.tokens, columns)
        logits = tile.biased(tile.capped(dot(q[...], strips.take(k, 0), 1, 1)), *of_tile)

        def keep(weights):
            if words is None:
                return weights
            return tile.kept_by_strip(weights, numbers, (state.words, columns[3:]))

        _add(state, hidden(logits, hide, of_tile), strips.take(v, 0), keep)

    by_code(active, step, tile, add)

    @pl.when(ends)
    def _():
        total = state.total[...].sum(axis=1, keepdims=True)  # [bq, 1]
        mean = state.weighted[...] / jnp.where(total == 0, 1.0, total)
        out[...] = (mean if words is None else mean * numbers.scale[0, 0]).astype(out.dtype)
        lse[...] = ((state.peak[...] + jnp.log2(total)) * (1 / LOG2E)).T[:1]


def _add(state: State, logits, values, keep):
    """One more block of keys: logits `[bq, bk]`, values `[bk, V]`, and what drops weights."""
    before = state.peak[...]
    peak = jnp.maximum(before, logits.max(axis=1, keepdims=True))  # [bq, 128]
    # A row that has seen nothing has a peak of −inf, which cannot be subtracted from −inf.
    level = jnp.maximum(peak, jnp.finfo(jnp.float32).min)
    weights = jnp.exp2(logits - widened(level, logits.shape[1]))
    rescale = jnp.exp2(before - level)
    state.peak[...] = peak
    state.total[...] = state.total[...] * rescale + lane_sums(weights)
    fresh = dot(keep(weights).astype(values.dtype), values, 1, 0)
    state.weighted[...] = state.weighted[...] * widened(rescale, fresh.shape[1]) + fresh


def forward(scores: Scores, q, k, v, plan: Plan):
    """`(out, lse)` of every query over the keys that the plan's mask shows it.

    A mask may use what Mosaic can compute of arrays: arithmetic, comparisons, logic, but no lookup. The
    compiler refuses blocks that exceed vector memory: 1,024 by 1,024 fit in bfloat16 with H = 128.

    Raises:
      Unsupported: for dtypes other than float32 and bfloat16, and for a mask that a kernel cannot
        compute: one that closes over an array, looks things up, or has leaves of other types than
        bool, int32, uint32 and float32.
    """
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        raise Unsupported(
            f"backend 'tpu' computes in float32 and bfloat16, got {q.dtype}; backend 'xla' takes others"
        )
    check_kernel_mask(plan.mask, "tpu")
    check_kernel_bias(scores.bias, "tpu")
    (size_q, size_k), rows = (plan.block_q, plan.block_k), plan.rows
    sizes = (q, size_q), (k, size_k), (v, size_k)
    blocks = [blocks_by_head(x, size, rows) for x, size in sizes]
    words = dropout_words(scores.dropout, plan)
    lines = Lines.of_queries(plan, (blocks[0], words.of_queries))
    columns = Columns(token_blocks(plan.kv_tokens, size_k, words.of_keys), tuple(blocks[1:]))
    heads, group, bq, width = q.shape[2], q.shape[2] // k.shape[2], blocks[0].shape[3], v.shape[3]
    kernel = Kernel(
        body=functools.partial(_kernel, tile=TpuTile.of(scores, plan)),
        name="dynmask_forward",
        heads=heads,
        inner=1,
        column_head=lambda head, _: head // group,
        out=(block_type((bq, width), q.dtype), block_type((1, bq))),
        scratch=State(
            block_type((2, bq, LANES), jnp.int32),
            block_type((bq, LANES)),
            block_type((bq, LANES)),
            block_type((bq, width)),
            None if scores.dropout is None else block_type((2, bq, LANES), jnp.int32),
        ),
    )
    out, lse = sweep(kernel, Numbers.of(scores, plan), lines, columns)
    return from_blocks(out, size_q, q), from_blocks(lse[:, :, :, 0], size_q, q)


TPU = by_key_head(Backend(forward, sums, shaped, check_vma=False))
