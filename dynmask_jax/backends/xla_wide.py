"""The loop over active blocks for wide machines: a GPU that has no kernel of its own.

Where `xla` takes one block after the other, here every line of blocks takes a step at once: the first
active block of each, then the second, …, until the longest line is done. So a step is a few large
batched products. `jax.vmap` of the loop over one line is that arrangement: each turn computes all lines,
and those that are done keep what they have. So a pass costs its longest line times all lines: a window
costs what it shows, but causal attention the whole square, and so does one query or key that is seen by all.

The gradients of queries are summed along lines of key blocks and those of keys along lines of query
blocks, apart: that is seven products a tile in place of five, and no two lines ever add to one place,
so results are the same bit for bit from run to run. Memory is O(T) too, times a tile's width.
"""

import functools

import jax
import jax.numpy as jnp

from dynmask_jax.backends.backend import Backend, as_they_are
from dynmask_jax.backends.blocks import Blocks, by_rows, over_active
from dynmask_jax.backends.xla import forward
from dynmask_jax.backends.xla_backward import QueryBlock, levels_of, tile_gradients
from dynmask_jax.plans import tiles_of
from dynmask_jax.vma import vary_like


def _at_once(line, places):
    return jax.vmap(line)(places)


def gradients(scores, saved, cotangents):
    """The gradients of q, k and v from those of out and lse."""
    q, k, v, plan, _, lse = saved
    wide, heads, key_heads, tiles = lse.dtype, q.shape[2], k.shape[2], tiles_of(plan)
    others = cotangents[0], *levels_of(saved, cotangents)
    of_queries = [Blocks.of_finite(q, plan.block_q), *(Blocks.of(x, plan.block_q) for x in others)]
    of_keys = [Blocks.of_finite(x, plan.block_k) for x in (k, v)]
    q_blocks, k_blocks = of_queries[0], of_keys[0]

    def queries_at(b, i):
        queries, *others = (x.rows(b, i, key_heads).astype(wide) for x in of_queries)
        return QueryBlock(queries * scores.scale, *others)

    def keys_at(b, j):
        return tuple(x.rows(b, j, key_heads).astype(wide) for x in of_keys)

    def tile(b, i, j, block, keys, values, tested):
        row = b if plan.rows > 1 else 0
        visible = by_rows(tiles.visible(row, i, j), heads, key_heads) if tested else None
        return tile_gradients(scores, block, keys, values, visible)

    def query_line(at):
        b, i = at // q_blocks.count, at % q_blocks.count
        block = queries_at(b, i)

        def add(j, d_q, *, tested):
            keys, values = keys_at(b, j)
            d_products, _ = tile(b, i, j, block, keys, values, tested)
            return d_q + jnp.einsum("ksr,ksh->krh", d_products, keys)

        codes = plan.codes[b if plan.rows > 1 else 0, i]
        return q_blocks.tokens(over_active(codes, add, jnp.zeros_like(block.q)) * scores.scale)

    def key_line(at):
        b, j = at // k_blocks.count, at % k_blocks.count
        keys, values = keys_at(b, j)

        def add(i, sums, *, tested):
            block, (d_k, d_v) = queries_at(b, i), sums
            d_products, weights = tile(b, i, j, block, keys, values, tested)
            d_k += jnp.einsum("ksr,krh->ksh", d_products, block.q)
            return d_k, d_v + jnp.einsum("ksr,krh->ksh", weights, block.d_out)

        codes = plan.codes[b if plan.rows > 1 else 0, :, j]
        start = vary_like((jnp.zeros_like(keys), jnp.zeros_like(values)), keys)
        return tuple(k_blocks.tokens(x) for x in over_active(codes, add, start))

    d_q = q_blocks.whole(_at_once(query_line, q_blocks.every()))
    d_k, d_v = (k_blocks.whole(x) for x in _at_once(key_line, k_blocks.every()))
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)


XLA_WIDE = Backend(functools.partial(forward, over_lines=_at_once), gradients, prepared=as_they_are)
