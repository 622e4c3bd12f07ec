"""Gradients on Hopper: a kernel of warpgroups for dq, along lines of queries, one for dk and dv, of keys.

What is computed is what `gpu_backward` says.

Reference: FlashAttention-3, Shah et al. 2024, arXiv:2407.08608.
"""

import jax.numpy as jnp

from dynmask_jax.backends import mosaic
from dynmask_jax.backends.hopper_lines import Worker
from dynmask_jax.backends.hopper_tile import Pairs
from dynmask_jax.backends.kernel_tile import of_shown


def query_kernel(worker: Worker) -> tuple:
    """dq of a warpgroup's queries, `[64, H]`."""
    pairs, first, second = Pairs.of(worker), worker.first, worker.second
    q, level, d_out, delta = worker.lines.arrays
    level, delta = mosaic.of_rows(level), mosaic.of_rows(delta)

    def add(slot, _, real, total):
        keys = first.arrived(slot)
        (k,) = keys.arrays
        capped = pairs.capped(mosaic.product(q, mosaic.turned(k)))
        logits = pairs.logits(capped, worker.line.head, keys, real) * pairs.factor
        weights = jnp.exp2(logits - mosaic.across(level, logits))
        (v,) = second.arrived(slot)
        d_weights = pairs.kept(mosaic.product(d_out, mosaic.turned(v)), keys)
        second.done(slot)
        d_logits = weights * (d_weights - mosaic.across(delta, weights))
        d_products = of_shown(pairs.tile.slope(capped, d_logits), weights, real is not None)
        total = mosaic.add_product(total, d_products.astype(q.dtype), k)
        first.done(slot)
        return total

    return (worker.each(add, mosaic.zeros(q.shape[1])) * pairs.tile.scale,)


def key_kernel(worker: Worker) -> tuple:
    """dk and dv of a warpgroup's keys, `[64, …]`."""
    pairs, first, second = Pairs.of(worker), worker.first, worker.second
    k, v = worker.lines.arrays

    def add(slot, turn, real, found):
        queries = first.arrived(slot)
        q, level = queries.arrays
        capped = pairs.capped(mosaic.product(k, mosaic.turned(q)))  # [keys, queries]
        head = worker.line.head * worker.turns.times + turn
        logits = pairs.logits(capped, head, queries, real) * pairs.factor
        weights = jnp.exp2(logits - mosaic.down(mosaic.of_columns(level), logits))
        d_out, delta = second.arrived(slot)
        d_values = mosaic.add_product(found[1], pairs.kept(weights, queries).astype(k.dtype), d_out)
        d_weights = pairs.kept(mosaic.product(v, mosaic.turned(d_out)), queries)
        d_logits = weights * (d_weights - mosaic.down(mosaic.of_columns(delta), weights))
        d_products = of_shown(pairs.tile.slope(capped, d_logits), weights, real is not None)
        mosaic.have_read()
        second.done(slot)
        d_keys = mosaic.add_product(found[0], d_products.astype(k.dtype), q)
        first.done(slot)
        return d_keys, d_values

    d_keys, d_values = worker.each(add, (mosaic.zeros(k.shape[1]), mosaic.zeros(v.shape[1])))
    return d_keys * pairs.tile.scale, d_values
