"""Gradients of the GPU backend: one kernel for dq, along lines of queries, one for dk and dv, of keys.

A third one sums the gradients of a bias. Each computes its tile of weights anew from q, k and lse; nothing
of size T·S is kept, and no two programs add to one place, so results are the same bit for bit from run to
run. With delta = Σ out·d_out − d_lse, a logit's gradient is weight · (d_out·v − delta).

Reference: FlashAttention-2, Dao 2023, arXiv:2307.08691, algorithm 2.
"""

import functools

import jax
import jax.numpy as jnp

from dynmask_jax.array_typing import Array
from dynmask_jax.backends.gpu_blocks import filled, filled_heads, unfilled
from dynmask_jax.backends.gpu_lines import Cut, Kernel, Line, Side, key_lists, query_lists, sweep
from dynmask_jax.backends.gpu_options import Grains, default_grains
from dynmask_jax.backends.gpu_sides import key_side, query_side
from dynmask_jax.backends.gpu_tile import Pairs
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
        d_out = (d_out * scores.dropout.scale).astype(d_out.dtype)
    wide = tuple(filled_heads(x, plan.block_q) for x in (q, d_out))
    # Queries that fill a block up get weights of zero, exp2(−inf).
    narrow = filled(level * LOG2E, plan.block_q, jnp.inf), filled(delta, plan.block_q)
    queries = query_side(scores, plan, (*wide, *narrow))
    keys = key_side(scores, plan, tuple(filled_heads(x, plan.block_k) for x in (k, v)))
    grains = grains or default_grains(max(q.shape[3], v.shape[3]), q.dtype)
    lists, numbers = query_lists(plan), Numbers.of(scores, plan)
    by_query = functools.partial(_along_queries, Tile.of(scores, plan), grains.dq, plan, lists, numbers)
    dq = by_query(queries, keys)
    kernel = functools.partial(_key_kernel, tile=Tile.of(scores, plan, keys_first=True))
    cut = Cut.of_keys(plan, grains.dkv)
    types = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in keys.arrays]
    over_keys = Kernel(functools.partial(kernel, cut=cut), "dynmask_dkv", cut, grains.dkv)
    dk, dv = sweep(over_keys, key_lists(plan), numbers, keys, queries, types)
    d_bias = _bias_gradients(scores, by_query, queries, keys)
    dq, dk, dv = (
        unfilled(x, block, *of.shape[1::2])
        for x, block, of in ((dq, plan.block_q, q), (dk, plan.block_k, k), (dv, plan.block_k, v))
    )
    return dq, dk, dv, d_bias


def _along_queries(tile, grain, plan, lists, numbers, queries: Side, keys: Side, leaves: int = 0):
    """dq, or a number for each program and leaf of the bias, `[B, programs, N]`."""
    cut = Cut.of_queries(plan, grain)
    q = queries.arrays[0]
    results = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    if leaves:
        programs = plan.codes.shape[1] * cut.line.tiles
        results = [jax.ShapeDtypeStruct((q.shape[0], programs, q.shape[2]), jnp.float32)] * leaves
    body = functools.partial(_bias_kernel if leaves else _query_kernel, tile=tile, cut=cut)
    kernel = Kernel(body, "dynmask_dbias" if leaves else "dynmask_dq", cut, grain)
    found = sweep(kernel, lists, numbers, queries, keys, results)
    return found if leaves else found[0]


def _query_kernel(program, lists, numbers, queries, keys, dq, *, tile: Tile, cut: Cut):
    line, k = Line.of(program, lists, cut), keys.arrays[0]
    logit_gradients = _logit_gradients(Pairs.of(tile, numbers, line, queries), line, queries, keys)

    def add(_, at, real, total):
        capped, weights, d_logits = logit_gradients(at, real)
        d_products = of_shown(tile.slope(capped, d_logits), weights, real is not None)
        return total + dot(d_products.astype(k.dtype), k[at, :], 1, 0)

    total = line.each(add, jnp.zeros((cut.line.tile, k.shape[-1]), jnp.float32))
    dq[line.tokens, :] = (total * tile.scale).astype(dq.dtype)


def _bias_kernel(program, lists, numbers, queries, keys, *of_leaves, tile: Tile, cut: Cut):
    line = Line.of(program, lists, cut)
    pairs = Pairs.of(tile, numbers, line, queries)
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
    q, d_out = (x[line.tokens, :] for x in queries.arrays[:2])
    level, delta = (x[line.tokens][:, None] for x in queries.arrays[2:])
    k, v = keys.arrays

    def of_tile(at, real):
        capped = tile.capped(dot(q, k[at, :], 1, 1))
        weights = jnp.exp2(pairs.logits(capped, line.head, keys, at, real) - level)
        d_weights = pairs.kept(dot(d_out, v[at, :], 1, 1), keys, at)
        return capped, weights, weights * (d_weights - delta)

    return of_tile


def _bias_gradients(scores: Scores, by_query, queries: Side, keys: Side) -> list[Array]:
    """Gradients of the bias's learnable leaves, by a kernel of its own.

    Where nobody asks for them, as of an ALiBi's slopes that are constants, the compiler leaves it out.
    """
    leaves = learnable(scores.bias)[0]
    if not leaves:
        return []
    found = by_query(queries, keys, leaves=len(leaves))
    by_head = [x.sum(axis=(0, 1)) for x in found]
    return [x if jnp.ndim(leaf) else x.sum() for x, leaf in zip(by_head, leaves, strict=True)]


def _key_kernel(program, lists, numbers, keys, queries, dk, dv, *, tile: Tile, cut: Cut):
    line = Line.of(program, lists, cut)
    pairs = Pairs.of(tile, numbers, line, keys)
    k, v = (x[line.tokens, :] for x in keys.arrays)
    q_ref = queries.arrays[0]
    group = q_ref.shape[1] if len(q_ref.shape) == 3 else 1

    def add(turn, at, real, found):
        own = (at,) if group == 1 else (at, turn)
        head = line.head * group + turn
        q, d_out = (x[(*own, slice(None))] for x in queries.arrays[:2])
        level, delta = (x[own][None, :] for x in queries.arrays[2:])
        capped = tile.capped(dot(k, q, 1, 1))  # [keys, queries]
        weights = jnp.exp2(pairs.logits(capped, head, queries, at, real) - level)
        d_values = dot(pairs.kept(weights, queries, *own).astype(d_out.dtype), d_out, 1, 0)
        d_logits = weights * (pairs.kept(dot(v, d_out, 1, 1), queries, *own) - delta)
        d_products = of_shown(tile.slope(capped, d_logits), weights, real is not None)
        return found[0] + dot(d_products.astype(q.dtype), q, 1, 0), found[1] + d_values

    nothing = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    d_keys, d_values = line.each(add, nothing, times=group)
    dk[line.tokens, :] = (d_keys * tile.scale).astype(dk.dtype)
    dv[line.tokens, :] = d_values.astype(dv.dtype)
