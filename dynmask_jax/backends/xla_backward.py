"""The backward pass of the loop over active blocks: one pass over the blocks of keys.

The tiles lie with their keys first, `[K, bk, rows]`. So in each of the five matrix products of a tile
the left side contracts along its last axis; where it does not, XLA's CPU backend multiplies at less
than half the speed. Only d_q comes out transposed, and is turned once at the end.
"""

import jax
import jax.numpy as jnp
from jax import lax

from dynmask_jax.array_typing import Array, Bool, Float, pytree
from dynmask_jax.backends.blocks import Blocks, over_active, visible_columns
from dynmask_jax.indexing import add_at, at, row_and_block
from dynmask_jax.plans import tiles_of
from dynmask_jax.vma import vary_like


@pytree
class QueryBlock:
    """One block of scaled queries and what the backward pass needs of it.

    `delta` is Σ out·d_out − d_lse, the part of a logit's gradient that all its row shares.
    """

    q: Float[Array, "K rows H"]
    d_out: Float[Array, "K rows H"]
    lse: Float[Array, "K rows"]
    delta: Float[Array, "K rows"]


def gradients(scores, saved, cotangents):
    """The gradients of q, k and v from those of out and lse; d_q is summed in place."""
    q, k, v, plan, _, lse = saved
    wide, (heads, head_dim), key_heads = lse.dtype, q.shape[2:], k.shape[2]
    of_queries = (cotangents[0], *levels_of(saved, cotangents))
    q_blocks, *others = Blocks.of_finite(q, plan.block_q), *(Blocks.of(x, plan.block_q) for x in of_queries)
    k_blocks, v_blocks = (Blocks.of_finite(x, plan.block_k) for x in (k, v))
    tiles, columns = tiles_of(plan), plan.codes.swapaxes(1, 2)

    def key_block(d_q, number):
        b, j = row_and_block(number, k_blocks.count)
        row = b if plan.rows > 1 else 0
        keys, values = (blocks.rows(b, j, key_heads).astype(wide) for blocks in (k_blocks, v_blocks))
        keys_across = keys.swapaxes(1, 2)

        def add(i, sums, *, tested):
            d_q, d_k, d_v = sums
            queries, *rest = (x.rows(b, i, key_heads).astype(wide) for x in (q_blocks, *others))
            block = QueryBlock(queries * scores.scale, *rest)
            visible = visible_columns(tiles, tested, (row, i, j), heads, key_heads)
            d_products, weights = tile_gradients(scores, block, keys, values, visible)
            d_q = add_at(d_q, jnp.einsum("khs,ksr->khr", keys_across, d_products), b, i)
            d_k += jnp.einsum("ksr,krh->ksh", d_products, block.q)
            d_v += jnp.einsum("ksr,krh->ksh", weights, block.d_out)
            return d_q, d_k, d_v

        start = (d_q, *vary_like((jnp.zeros_like(keys), jnp.zeros_like(values)), keys))
        d_q, *d_kv = over_active(at(columns, row, j), add, start)
        return d_q, tuple(k_blocks.tokens(x).astype(k.dtype) for x in d_kv)

    rows = heads // key_heads * plan.block_q
    d_q = jnp.zeros((q.shape[0], q_blocks.count, key_heads, head_dim, rows), wide)
    d_q, (d_k, d_v) = lax.scan(key_block, vary_like(d_q, q_blocks, others), k_blocks.every())
    d_q = d_q.reshape(-1, *d_q.shape[2:]).swapaxes(2, 3) * scores.scale
    d_q = q_blocks.whole(jax.vmap(q_blocks.tokens)(d_q).astype(q.dtype))
    return d_q, k_blocks.whole(d_k), k_blocks.whole(d_v)


def levels_of(saved, cotangents) -> tuple[Float[Array, "B T N"], Float[Array, "B T N"]]:
    """Of every query, lse and Σ out·d_out − d_lse.

    The lse of one that sees nothing is 0 here, not −inf: it is subtracted from logits that may be −inf,
    where products overflowed. That of one that sees a key which is not finite is +inf: all its weights are
    zero, and nothing comes back through it to other keys.
    """
    *_, out, lse = saved
    d_out, d_lse = cotangents
    delta = jnp.sum(out.astype(lse.dtype) * d_out.astype(lse.dtype), axis=-1) - d_lse
    poisoned = jnp.isnan(lse)
    level = jnp.where(poisoned, jnp.inf, jnp.where(jnp.isneginf(lse), 0.0, lse))
    return level, jnp.where(poisoned, 0.0, delta)


def tile_gradients(scores, block: QueryBlock, keys, values, visible):
    """The gradients of a tile's products, and its weights: both `[K, bk, rows]`."""
    logits = scores.logits(jnp.einsum("ksh,krh->ksr", keys, block.q))
    # After the exponential: a hidden pair's may be infinite there.
    weights = _shown(jnp.exp(logits - block.lse[:, None]), visible)
    d_logits = weights * (jnp.einsum("ksh,krh->ksr", values, block.d_out) - block.delta[:, None])
    return _shown(d_logits * scores.slope(logits), visible), weights


def _shown(pairs: Float[Array, "K bk rows"], visible: Bool[Array, "*K bk rows"]):
    """Zero for hidden pairs, whatever was there."""
    return jnp.where(visible, pairs, 0.0)
