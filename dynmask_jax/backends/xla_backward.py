"""The backward pass of the loop over active blocks: one pass over the blocks of keys.

The tiles lie with their keys first, `[K, bk, rows]`. So in each of the five matrix products of a tile
the left side contracts along its last axis; where it does not, XLA's CPU backend multiplies at less
than half the speed. Only d_q comes out transposed, and is turned once at the end.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from dynmask_jax.array_typing import Array, Bool, Float, pytree
from dynmask_jax.backends.blocks import Blocks, Heads, over_active
from dynmask_jax.backends.grains import Grain, cuts_of, grains_of
from dynmask_jax.backends.score_tiles import Place, ScoreTiles
from dynmask_jax.indexing import at, row_and_block
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
    wide, heads, group = lse.dtype, (q.shape[2], k.shape[2]), q.shape[2] // k.shape[2]
    cut_q, cut_k = cuts_of(plan)
    of_queries = (cotangents[0], *levels_of(saved, cotangents))
    queries = Blocks.of_finite(q, cut_q, group), *(Blocks.of(x, cut_q, group) for x in of_queries)
    keys = tuple(Blocks.of_finite(x, cut_k) for x in (k, v))
    grains = grains_of(scores, plan, heads, by_keys=True)

    def key_line(totals, number):
        b, j = row_and_block(number, plan.codes.shape[2])
        row = b if plan.rows > 1 else 0
        return grains.over_line(
            lambda grain: functools.partial(_key_block, scores, grain, (queries, keys), (b, row)),
            totals,
            row,
            j,
        )

    d_q = jnp.zeros((q.shape[0], queries[0].x.shape[1], heads[1], q.shape[3], group * cut_q.size), wide)
    on_tiles = grains.coarse.on_tiles
    totals = vary_like((d_q, on_tiles.no_gradient(wide)), queries, on_tiles, keys)
    numbers = jnp.arange(k.shape[0] * plan.codes.shape[2], dtype=jnp.int32)
    (d_q, d_bias), d_keys = lax.scan(key_line, totals, numbers)
    d_q = d_q.reshape(-1, *d_q.shape[2:]).swapaxes(2, 3) * scores.scale
    d_q = jax.vmap(lambda rows: queries[0].tokens(rows, 1)[0])(d_q).astype(q.dtype)
    d_k, d_v = (of.whole(x.reshape(-1, *x.shape[2:])) for of, x in zip(keys, d_keys, strict=True))
    return queries[0].whole(d_q), d_k, d_v, d_bias


def _key_block(scores, grain: Grain, blocks: tuple, place: tuple, totals: tuple, j, heads: Heads):
    """Adds a line of one grain to the totals of d_q and d_bias; gives its keys' gradients in blocks."""
    (of_queries, of_keys), (b, row), on_tiles = blocks, place, grain.on_tiles
    wide, group = totals[0].dtype, of_queries[0].group
    keys, values = (x.rows(b, j * grain.blocks_k, grain.blocks_k, heads).astype(wide) for x in of_keys)
    keys_across = keys.swapaxes(1, 2)

    def add(i, sums, *, tested):
        d_q, d_bias, d_k, d_v = sums
        at_tile = Place(b, row, heads, i, j)
        part = i * grain.blocks_q, grain.blocks_q, heads
        queries, d_out, *rest = (x.rows(b, *part).astype(wide) for x in of_queries)
        block = QueryBlock(queries * scores.scale, on_tiles.rescaled(d_out), *rest)
        d_products, weights, share = tile_gradients(on_tiles, at_tile, block, (keys, values), tested)
        d_bias = jax.tree.map(jnp.add, d_bias, share)
        d_q = _add_rows(d_q, jnp.einsum("khs,ksr->khr", keys_across, d_products), b, part, group)
        d_k += jnp.einsum("ksr,krh->ksh", d_products, block.q)
        d_v += jnp.einsum("ksr,krh->ksh", weights, block.d_out)
        return d_q, d_bias, d_k, d_v

    start = (*totals, *vary_like((jnp.zeros_like(keys), jnp.zeros_like(values)), keys, on_tiles))
    *sums, d_k, d_v = over_active(at(grain.codes, row, j), add, start)
    of = zip(of_keys, (d_k, d_v), strict=True)
    return tuple(sums), tuple(x.tokens(rows, grain.blocks_k).astype(x.x.dtype) for x, rows in of)


def _add_rows(total: Float[Array, "B blocks K H rows"], tile: Float[Array, "k H rows"], b, part, group: int):
    """The total with a tile of d_q added to its blocks: `part` is the first, how many, and the heads.

    The rows of a block are those of its G heads, one after the other; those of a tile have all its blocks for
    each head.
    """
    start, count, heads = part
    tile = tile.reshape(*tile.shape[:2], group, count, -1)
    tile = jnp.moveaxis(tile, 3, 0).reshape(1, count, *tile.shape[:2], total.shape[4])
    place = [jnp.asarray(each, jnp.int32) for each in (b, start, heads.part * heads.size, 0, 0)]
    return lax.dynamic_update_slice(total, lax.dynamic_slice(total, place, tile.shape) + tile, place)


def levels_of(saved, cotangents) -> tuple[Float[Array, "B T N"], Float[Array, "B T N"]]:
    """Of every query, lse and Σ out·d_out − d_lse.

    The lse of one that sees nothing is 0 here, not −inf: it is subtracted from logits that may be −inf,
    where products overflowed. That of one that sees a key which is not finite is +inf: all its weights are
    zero, and nothing comes back through it to other keys.
    """
    *_, out, lse = saved
    d_out, d_lse = cotangents
    # Not as the sum of a product, which took 70 times as long on a CPU; see `finite.bad_rows`.
    out, d_out = (x.astype(lse.dtype) for x in (out, d_out))
    delta = jnp.vecdot(out, d_out, precision=lax.Precision.HIGHEST) - d_lse
    poisoned = jnp.isnan(lse)
    level = jnp.where(poisoned, jnp.inf, jnp.where(jnp.isneginf(lse), 0.0, lse))
    return level, jnp.where(poisoned, 0.0, delta)


def tile_gradients(on_tiles: ScoreTiles, place: Place, block: QueryBlock, keys_values: tuple, tested):
    """Of a tile the gradients of its products and its weights that are kept, `[K, bk, rows]`, and d_bias.

    `tested` as in `ScoreTiles.where_tested`.
    """
    (keys, values), scores = keys_values, on_tiles.scores
    capped = scores.capped(jnp.einsum("ksh,krh->ksr", keys, block.q))
    logits = on_tiles.biased(capped, place, keys_first=True)
    d_weights = on_tiles.kept(jnp.einsum("ksh,krh->ksr", values, block.d_out), place, keys_first=True)

    def gradients(visible):
        # After the exponential: a hidden pair's may be infinite there.
        weights = _shown(jnp.exp(logits - block.lse[:, None]), visible)
        d_logits = weights * (d_weights - block.delta[:, None])
        d_products = _shown(d_logits * scores.slope(capped), visible)
        return d_products, weights, on_tiles.bias_gradient(_shown(d_logits, visible), place)

    d_products, weights, d_bias = on_tiles.where_tested(gradients, tested, place, keys_first=True)
    return d_products, on_tiles.kept(weights, place, keys_first=True), d_bias


def _shown(pairs: Float[Array, "K bk rows"], visible: Bool[Array, "*K bk rows"] | None):
    """Zero for hidden pairs, whatever was there; None hides none."""
    return pairs if visible is None else jnp.where(visible, pairs, 0.0)
