"""Gradients of the GPU backend: one kernel for dq, along lines of queries, one for dk and dv, of keys.

A third one sums the gradients of a bias. Each computes its tile of weights anew from q, k and lse; nothing
of size T·S is kept, and no two programs add to one place, so results are the same bit for bit from run to
run. With delta = Σ out·d_out − d_lse, a logit's gradient is weight · (d_out·v − delta).

Reference: FlashAttention-2, Dao 2023, arXiv:2307.08691, algorithm 2.
"""

import jax
import jax.numpy as jnp

from dynmask_jax.array_typing import Array
from dynmask_jax.backends.gpu_blocks import filled, filled_heads, unfilled
from dynmask_jax.backends.gpu_choice import bias_grain, grains_of
from dynmask_jax.backends.gpu_lines import Kernel, Layout, Line, Side, key_lists, query_lists
from dynmask_jax.backends.gpu_merge import merged_sums
from dynmask_jax.backends.gpu_options import Grain, Grains
from dynmask_jax.backends.gpu_sides import key_side, query_side
from dynmask_jax.backends.gpu_sweep import sweep
from dynmask_jax.backends.gpu_tile import Pairs
from dynmask_jax.backends.hopper_backward import key_kernel, query_kernel
from dynmask_jax.backends.kernel_tile import LOG2E, Numbers, Tile, dot, of_shown
from dynmask_jax.backends.xla_backward import levels_of
from dynmask_jax.bias_algebra import learnable
from dynmask_jax.finite import finite_rows
from dynmask_jax.scores import Scores


def gradients(
    grains: Grains | None, scores: Scores, saved: tuple, cotangents: tuple
) -> tuple[Array, Array, Array, list[Array]]:
    """dq, dk, dv, d_bias from the residuals `(q, k, v, plan, out, lse)` and the cotangents of out and lse."""
    q, k, v, plan, *_ = saved
    d_out, (level, delta) = cotangents[0], levels_of(saved, cotangents)
    q, k, v = map(finite_rows, (q, k, v))
    if scores.dropout is not None:  # so that a tile's weights need only be left out
        d_out = (d_out.astype(jnp.float32) * scores.dropout.scale).astype(d_out.dtype)
    wide = (filled_heads(x, plan.block_q) for x in (q, d_out))
    # Queries that fill a block up get weights of zero, exp2(−inf).
    narrow = filled(level * LOG2E, plan.block_q, jnp.inf), filled(delta, plan.block_q)
    queries = query_side(scores, plan, tuple(x for pair in zip(wide, narrow, strict=True) for x in pair))
    keys = key_side(scores, plan, tuple(filled_heads(x, plan.block_k) for x in (k, v)))
    head_dims = q.shape[3], v.shape[3]
    grains = grains_of(grains, scores, plan, (*head_dims, q.dtype))
    numbers = Numbers.of(scores, plan)

    def layout(grain, heads, **how):
        return Layout.of(Tile.of(scores, plan, **how), plan, grain, q.shape[0] * heads, grains.busy)

    lists = query_lists(plan)
    body = _query_kernel if isinstance(grains.dq, Grain) else query_kernel
    over_queries = Kernel(body, "dynmask_dq", layout(grains.dq, q.shape[2]), merged_sums)
    (dq,) = sweep(over_queries, lists, numbers, queries, keys, _types(queries.arrays[:1]))
    body = _key_kernel if isinstance(grains.dkv, Grain) else key_kernel
    over_keys = Kernel(body, "dynmask_dkv", layout(grains.dkv, k.shape[2], keys_first=True), merged_sums)
    dk, dv = sweep(over_keys, key_lists(plan), numbers, keys, queries, _types(keys.arrays))
    leaves = layout(bias_grain(grains, max(head_dims), q.dtype), q.shape[2])
    d_bias = _bias_gradients(scores, leaves, (lists, numbers, queries, keys))
    dq, dk, dv = (
        unfilled(x, block, *of.shape[1::2])
        for x, block, of in ((dq, plan.block_q, q), (dk, plan.block_k, k), (dv, plan.block_k, v))
    )
    return dq, dk, dv, d_bias


def _types(arrays: tuple) -> list:
    return [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]


def _query_kernel(line: Line, numbers: Numbers, queries: Side, keys: Side, results: tuple):
    tile, k = line.layout.tile, keys.arrays[0]
    logit_gradients = _logit_gradients(Pairs.of(line, numbers, queries), line, queries, keys)

    def add(_, at, real, total):
        capped, weights, d_logits = logit_gradients(at, real)
        d_products = of_shown(tile.slope(capped, d_logits), weights, real is not None)
        return total + dot(d_products.astype(k.dtype), k[at, :], 1, 0)

    total = line.each(add, jnp.zeros((line.layout.line.tile, k.shape[-1]), jnp.float32))
    line.store(results, total * tile.scale)


def _bias_kernel(line: Line, numbers: Numbers, queries: Side, keys: Side, of_leaves: tuple):
    pairs = Pairs.of(line, numbers, queries)
    logit_gradients = _logit_gradients(pairs, line, queries, keys)

    def add(_, at, real, totals):
        _, weights, d_logits = logit_gradients(at, real)
        d_logits = of_shown(d_logits, weights, real is not None)
        slopes = pairs.bias_slopes(line.head, keys, at, d_logits.shape)
        return tuple(total + (d_logits * each).sum() for total, each in zip(totals, slopes, strict=True))

    found = line.each(add, (jnp.float32(0.0),) * len(of_leaves))
    for leaf, total in zip(of_leaves, found, strict=True):
        leaf[line.program] = total


def _logit_gradients(pairs: Pairs, line: Line, queries: Side, keys: Side):
    """What gives, for a tile of keys, its capped products, weights, and gradients of logits."""
    tile = pairs.tile
    q, d_out = (x[line.tokens, :] for x in queries.arrays[::2])
    level, delta = (x[line.tokens][:, None] for x in queries.arrays[1::2])
    k, v = keys.arrays

    def of_tile(at, real):
        capped = tile.capped(dot(q, k[at, :], 1, 1))
        weights = jnp.exp2(pairs.logits(capped, line.head, keys, at, real) - level)
        d_weights = pairs.kept(dot(d_out, v[at, :], 1, 1), keys, at)
        return capped, weights, weights * (d_weights - delta)

    return of_tile


def _bias_gradients(scores: Scores, layout: Layout, operands: tuple) -> list[Array]:
    """Gradients of the bias's learnable leaves, by a kernel of its own; operands are lists, numbers, sides.

    Where nobody asks for them, as of an ALiBi's slopes that are constants, the compiler leaves it out.
    """
    leaves = learnable(scores.bias)[0]
    if not leaves:
        return []
    lists, numbers, queries, keys = operands
    batch, _, heads, _ = queries.arrays[0].shape
    of_programs = jax.ShapeDtypeStruct((batch, layout.programs, heads), jnp.float32)
    kernel = Kernel(_bias_kernel, "dynmask_dbias", layout, None)
    found = sweep(kernel, lists, numbers, queries, keys, [of_programs] * len(leaves))
    by_head = [x.sum(axis=(0, 1)) for x in found]
    return [x if jnp.ndim(leaf) else x.sum() for x, leaf in zip(by_head, leaves, strict=True)]


def _key_kernel(line: Line, numbers: Numbers, keys: Side, queries: Side, results: tuple):
    tile, pairs = line.layout.tile, Pairs.of(line, numbers, keys)
    k, v = (x[line.tokens, :] for x in keys.arrays)
    q_ref = queries.arrays[0]
    group = q_ref.shape[1] if len(q_ref.shape) == 3 else 1

    def add(turn, at, real, found):
        own = (at,) if group == 1 else (at, turn)
        head = line.head * group + turn
        q, d_out = (x[(*own, slice(None))] for x in queries.arrays[::2])
        level, delta = (x[own][None, :] for x in queries.arrays[1::2])
        capped = tile.capped(dot(k, q, 1, 1))  # [keys, queries]
        weights = jnp.exp2(pairs.logits(capped, head, queries, at, real) - level)
        d_values = dot(pairs.kept(weights, queries, *own).astype(d_out.dtype), d_out, 1, 0)
        d_logits = weights * (pairs.kept(dot(v, d_out, 1, 1), queries, *own) - delta)
        d_products = of_shown(tile.slope(capped, d_logits), weights, real is not None)
        return found[0] + dot(d_products.astype(q.dtype), q, 1, 0), found[1] + d_values

    nothing = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    d_keys, d_values = line.each(add, nothing, times=group)
    line.store(results, d_keys * tile.scale, d_values)
