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
from dynmask_jax.backends.score_tiles import Place, ScoreTiles, score_tiles
from dynmask_jax.indexing import add_at, at, row_and_block
from dynmask_jax.vma import vary_like


@pytree
class QueryBlock:
    """One block of scaled queries and what the backward pass needs of it.

    `d_out` is divided by 1 − rate, where weights are dropped. `delta` is Σ out·d_out − d_lse, the part of a
    logit's gradient that all its row shares.
    """

    q: Float[Array, "K rows H"]
    d_out: Float[Array, "K rows V"]
    lse: Float[Array, "K rows"]
    delta: Float[Array, "K rows"]


def gradients(scores, saved, cotangents):
    """The gradients of q, k, v and the bias from those of out and lse; d_q is summed in place."""
    q, k, v, plan, _, lse = saved
    wide, (heads, head_dim), key_heads = lse.dtype, q.shape[2:], k.shape[2]
    of_queries = (cotangents[0], *levels_of(saved, cotangents))
    q_blocks, *others = Blocks.of_finite(q, plan.block_q), *(Blocks.of(x, plan.block_q) for x in of_queries)
    k_blocks, v_blocks = (Blocks.of_finite(x, plan.block_k) for x in (k, v))
    on_tiles, columns = score_tiles(scores, plan, heads, key_heads), plan.codes.swapaxes(1, 2)

    def key_block(totals, number):
        b, j = row_and_block(number, k_blocks.count)
        row = b if plan.rows > 1 else 0
        keys, values = (blocks.rows(b, j, key_heads).astype(wide) for blocks in (k_blocks, v_blocks))
        keys_across = keys.swapaxes(1, 2)

        def add(i, sums, *, tested):
            d_q, d_bias, d_k, d_v = sums
            place = Place(b, row, i, j)
            queries, d_out, *rest = (x.rows(b, i, key_heads).astype(wide) for x in (q_blocks, *others))
            block = QueryBlock(queries * scores.scale, on_tiles.rescaled(d_out), *rest)
            visible = visible_columns(on_tiles.tiles, tested, place[1:], heads, key_heads)
            d_products, weights, share = tile_gradients(on_tiles, place, block, (keys, values), visible)
            d_bias = jax.tree.map(jnp.add, d_bias, share)
            d_q = add_at(d_q, jnp.einsum("khs,ksr->khr", keys_across, d_products), b, i)
            d_k += jnp.einsum("ksr,krh->ksh", d_products, block.q)
            d_v += jnp.einsum("ksr,krh->ksh", weights, block.d_out)
            return d_q, d_bias, d_k, d_v

        start = (*totals, *vary_like((jnp.zeros_like(keys), jnp.zeros_like(values)), keys, on_tiles))
        *totals, d_k, d_v = over_active(at(columns, row, j), add, start)
        return tuple(totals), tuple(k_blocks.tokens(x).astype(k.dtype) for x in (d_k, d_v))

    rows = heads // key_heads * plan.block_q
    d_q = jnp.zeros((q.shape[0], q_blocks.count, key_heads, head_dim, rows), wide)
    totals = vary_like((d_q, on_tiles.no_gradient(wide)), q_blocks, others, on_tiles, k_blocks)
    (d_q, d_bias), (d_k, d_v) = lax.scan(key_block, totals, k_blocks.every())
    d_q = d_q.reshape(-1, *d_q.shape[2:]).swapaxes(2, 3) * scores.scale
    d_q = q_blocks.whole(jax.vmap(q_blocks.tokens)(d_q).astype(q.dtype))
    return d_q, k_blocks.whole(d_k), k_blocks.whole(d_v), d_bias


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


def tile_gradients(on_tiles: ScoreTiles, place: Place, block: QueryBlock, keys_values: tuple, visible):
    """Of a tile the gradients of its products and its weights that are kept, `[K, bk, rows]`, and d_bias."""
    (keys, values), scores = keys_values, on_tiles.scores
    capped = scores.capped(jnp.einsum("ksh,krh->ksr", keys, block.q))
    logits = on_tiles.biased(capped, place, keys_first=True)
    # After the exponential: a hidden pair's may be infinite there.
    weights = _shown(jnp.exp(logits - block.lse[:, None]), visible)
    d_weights = on_tiles.kept(jnp.einsum("ksh,krh->ksr", values, block.d_out), place, keys_first=True)
    d_logits = weights * (d_weights - block.delta[:, None])
    d_bias = on_tiles.bias_gradient(_shown(d_logits, visible), place)
    d_products = _shown(d_logits * scores.slope(capped), visible)
    return d_products, on_tiles.kept(weights, place, keys_first=True), d_bias


def _shown(pairs: Float[Array, "K bk rows"], visible: Bool[Array, "*K bk rows"]):
    """Zero for hidden pairs, whatever was there."""
    return jnp.where(visible, pairs, 0.0)
