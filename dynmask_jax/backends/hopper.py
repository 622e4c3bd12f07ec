"""Attention forward on Hopper: a kernel of warpgroups that compute while another brings keys and values.

Two warpgroups take turns: while one has the tensor cores, the other has the exponentials.

Reference: FlashAttention-3, Shah et al. 2024, arXiv:2407.08608.
"""

import jax.numpy as jnp

from dynmask_jax.backends import mosaic
from dynmask_jax.backends.hopper_lines import Worker
from dynmask_jax.backends.hopper_tile import Pairs
from dynmask_jax.backends.kernel_tile import LOG2E


def forward_kernel(worker: Worker) -> tuple:
    """The mean of the values, `[64, V]`, and the log-sum-exp, `[64]`, of a warpgroup's queries."""
    pairs, numbers = Pairs.of(worker), worker.numbers
    (q,) = worker.lines.arrays
    first, second = worker.first, worker.second

    def add(slot, _, real, found):
        weighted, peak, total = found
        keys = first.arrived(slot)
        products = mosaic.product(q, mosaic.turned(keys.arrays[0]), meanwhile=worker.switch)
        logits = pairs.logits(pairs.capped(products), worker.line.head, keys, real)
        if not pairs.drops:  # the next keys may come while weights are computed
            first.done(slot)
        before, peak = peak, jnp.maximum(peak, logits.max(axis=1) * pairs.factor)
        # A row that has seen nothing has a peak of −inf, which cannot be subtracted from −inf.
        level = jnp.maximum(peak, jnp.finfo(jnp.float32).min)
        weights = jnp.exp2(logits * pairs.factor - mosaic.across(level, logits))
        rescale = jnp.exp2(before - level)
        weighted, total = weighted * mosaic.across(rescale, weighted), total * rescale + weights.sum(axis=1)
        narrow = pairs.kept(weights, keys).astype(q.dtype)
        if pairs.drops:
            first.done(slot)
        weighted, peak, total, narrow = mosaic.in_order(weighted, peak, total, narrow)
        (v,) = second.arrived(slot)
        worker.switch()
        weighted = mosaic.add_product(weighted, narrow, v)
        second.done(slot)
        return weighted, peak, total

    nothing = mosaic.zeros(second.width), mosaic.filled_rows(-jnp.inf), mosaic.filled_rows(0.0)
    # The second one begins when the first has begun: from then on they are never at the same.
    worker.switch_if(1)
    weighted, peak, total = worker.each(add, nothing)
    worker.switch_if(0)
    mean = weighted / mosaic.across(jnp.where(total == 0, 1.0, total), weighted)
    if numbers.scale is not None:
        mean = mean * numbers.scale[0, 0]
    return mean, (peak + jnp.log2(total)) * (1 / LOG2E)
