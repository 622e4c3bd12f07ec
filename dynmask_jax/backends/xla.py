"""Attention in plain XLA: a loop over the plan's active blocks, forward and backward.

Runs wherever XLA does. Memory is O(T): one tile of logits lives at a time, and the residuals are
q, k, v, out and lse. Full blocks are computed without the mask. Sums are taken in one fixed order, so
results are the same bit for bit from run to run.

Reference: FlashAttention-2, Dao 2023, arXiv:2307.08691.
"""

import jax.numpy as jnp
from jax import lax

from dynmask_jax.array_typing import sum_dtype
from dynmask_jax.backends.backend import Backend, as_they_are
from dynmask_jax.backends.blocks import Blocks, by_rows, over_active
from dynmask_jax.backends.xla_backward import gradients
from dynmask_jax.online_softmax import Partial, from_logits, merge, normalize
from dynmask_jax.plans import tiles_of
from dynmask_jax.vma import vary_like


def forward(scores, q, k, v, plan, over_lines=lax.map):
    """`(out, lse)`, where `over_lines(line, places)` stacks `line(place)` over lines of blocks."""
    wide, heads, key_heads = sum_dtype(q.dtype), q.shape[2], k.shape[2]
    q_blocks, tiles = Blocks.of_finite(q, plan.block_q), tiles_of(plan)
    k_blocks, v_blocks = (Blocks.of_finite(x, plan.block_k) for x in (k, v))

    def query_block(at):
        b, i = at // q_blocks.count, at % q_blocks.count
        row = b if plan.rows > 1 else 0
        queries = q_blocks.rows(b, i, key_heads).astype(wide) * scores.scale

        def add(j, partial, *, tested):
            keys, values = (blocks.rows(b, j, key_heads).astype(wide) for blocks in (k_blocks, v_blocks))
            visible = by_rows(tiles.visible(row, i, j), heads, key_heads) if tested else None
            return merge(partial, _tile(scores, queries, keys, values, visible))

        empty = vary_like(Partial.empty(queries.shape, wide), queries)
        out, lse = normalize(over_active(plan.codes[row, i], add, empty))
        return q_blocks.tokens(out).astype(q.dtype), q_blocks.tokens(lse)

    out, lse = over_lines(query_block, q_blocks.every())
    return q_blocks.whole(out), q_blocks.whole(lse)


def _tile(scores, queries, keys, values, visible) -> Partial:
    """Attention of a block of queries `[K, rows, H]` over a block of keys `[K, bk, H]`."""
    logits = scores.logits(jnp.einsum("krh,ksh->krs", queries, keys))
    if visible is not None:
        logits = jnp.where(visible, logits, -jnp.inf)
    weights, peak, total = from_logits(logits)
    return Partial(jnp.einsum("krs,ksh->krh", weights, values), peak, total)


XLA = Backend(forward, gradients, prepared=as_they_are)
