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
from dynmask_jax.backends.blocks import Blocks, visible_columns
from dynmask_jax.backends.xla import forward
from dynmask_jax.backends.xla_backward import QueryBlock, levels_of, tile_gradients
from dynmask_jax.block_codes import ACTIVE, over_blocks
from dynmask_jax.indexing import at, row_and_block
from dynmask_jax.plans import tiles_of
from dynmask_jax.vma import vary_like


def _at_once(line, places):
    return jax.vmap(line)(places)


class _Operands:
    """The blocks of queries and keys that the backward pass reads, and the gradients of one tile."""

    def __init__(self, scores, saved, cotangents):
        q, k, v, self.plan, _, lse = saved
        self.scores, self.dtype = scores, lse.dtype
        self.heads, self.key_heads, self.tiles = q.shape[2], k.shape[2], tiles_of(self.plan)
        others = cotangents[0], *levels_of(saved, cotangents)
        block_q, block_k = self.plan.block_q, self.plan.block_k
        self.of_queries = [Blocks.of_finite(q, block_q), *(Blocks.of(x, block_q) for x in others)]
        self.of_keys = [Blocks.of_finite(x, block_k) for x in (k, v)]

    def queries_at(self, b, i) -> QueryBlock:
        queries, *others = (x.rows(b, i, self.key_heads).astype(self.dtype) for x in self.of_queries)
        return QueryBlock(queries * self.scores.scale, *others)

    def keys_at(self, b, j):
        return tuple(x.rows(b, j, self.key_heads).astype(self.dtype) for x in self.of_keys)

    def row(self, b):
        """The plan's row for sequence b."""
        return b if self.plan.rows > 1 else 0

    def tile(self, place, block, keys, values):
        """`tile_gradients` of the block of queries i and of keys j of sequence b, `place` = (b, i, j)."""
        b, i, j = place
        visible = visible_columns(self.tiles, None, (self.row(b), i, j), self.heads, self.key_heads)
        return tile_gradients(self.scores, block, keys, values, visible)


def gradients(scores, saved, cotangents):
    """The gradients of q, k and v from those of out and lse."""
    (q, k, v, plan, *_), of = saved, _Operands(scores, saved, cotangents)
    q_blocks, k_blocks = of.of_queries[0], of.of_keys[0]
    columns = plan.codes.swapaxes(1, 2)

    def query_line(number):
        b, i = row_and_block(number, q_blocks.count)
        block = of.queries_at(b, i)

        def add(j, d_q):
            keys, values = of.keys_at(b, j)
            d_products, _ = of.tile((b, i, j), block, keys, values)
            return d_q + jnp.einsum("ksr,ksh->krh", d_products, keys)

        d_q = over_blocks(at(plan.codes, of.row(b), i), ACTIVE, add, jnp.zeros_like(block.q))
        return q_blocks.tokens(d_q * scores.scale)

    def key_line(number):
        b, j = row_and_block(number, k_blocks.count)
        keys, values = of.keys_at(b, j)

        def add(i, sums):
            block, (d_k, d_v) = of.queries_at(b, i), sums
            d_products, weights = of.tile((b, i, j), block, keys, values)
            d_k += jnp.einsum("ksr,krh->ksh", d_products, block.q)
            return d_k, d_v + jnp.einsum("ksr,krh->ksh", weights, block.d_out)

        start = vary_like((jnp.zeros_like(keys), jnp.zeros_like(values)), keys)
        return tuple(k_blocks.tokens(x) for x in over_blocks(at(columns, of.row(b), j), ACTIVE, add, start))

    d_q = q_blocks.whole(_at_once(query_line, q_blocks.every()))
    d_k, d_v = (k_blocks.whole(x) for x in _at_once(key_line, k_blocks.every()))
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)


XLA_WIDE = Backend(
    functools.partial(forward, over_lines=_at_once, test_all=True),
    gradients,
    prepared=as_they_are,
    marks_bad=True,
)
