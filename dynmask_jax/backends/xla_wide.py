"""The loop over active blocks for wide machines: a GPU that has no kernel of its own.

Where `xla` takes one block after the other, here many lines of blocks take a step at once: the first
active block of each, then the second, …, until the longest of them is done. So a step is a few large
batched products. `jax.vmap` of the loop over one line is that arrangement: each turn computes all its lines,
and those that are done keep what they have. So lines go in groups of like length, sorted by it: what is
computed beyond the plan is the difference between a group's lines and its longest, for causal attention an
eighth, where all lines together would compute the whole square.

The gradients of queries are summed along lines of key blocks and those of keys along lines of query
blocks, apart: that is seven products a tile in place of five, and no two lines ever add to one place,
so results are the same bit for bit from run to run. Memory is O(T) too, times a tile's width.
"""

import functools

import jax
import jax.numpy as jnp

from dynmask_jax.array_typing import Array, Int
from dynmask_jax.backends.backend import Backend, as_they_are
from dynmask_jax.backends.blocks import Blocks, Cut, Heads
from dynmask_jax.backends.by_head import by_key_head
from dynmask_jax.backends.score_tiles import Place, score_tiles
from dynmask_jax.backends.xla import forward
from dynmask_jax.backends.xla_backward import QueryBlock, levels_of, tile_gradients
from dynmask_jax.block_codes import ACTIVE, SKIP, over_blocks
from dynmask_jax.indexing import at, row_and_block
from dynmask_jax.vma import vary_like

GROUPS = 8
"""Of lines, which take a step at once: fewer waste more on lines that are done, more are narrower."""


def by_length(codes: Int[Array, "R lines columns"], lines: int) -> Int[Array, "groups size"]:
    """The numbers of all lines of all sequences, the shortest first; the last ones again to fill up."""
    lengths = (codes != SKIP).sum(axis=2).reshape(-1)
    order = jnp.argsort(jnp.tile(lengths, lines // lengths.shape[0])).astype(jnp.int32)
    groups = min(GROUPS, lines)
    return jnp.pad(order, (0, -lines % groups), mode="edge").reshape(groups, -1)


def _in_groups(line, numbers, codes):
    grouped = by_length(codes, numbers.shape[0])
    found = jax.lax.map(jax.vmap(line), grouped)
    place = jnp.argsort(grouped.reshape(-1)[: numbers.shape[0]])
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[place], found)


class _Operands:
    """The blocks of queries and keys that the backward pass reads, and the gradients of one tile."""

    def __init__(self, scores, saved, cotangents):
        q, k, v, self.plan, _, lse = saved
        self.scores, self.dtype = scores, lse.dtype
        self.heads, group = Heads(0, k.shape[2]), q.shape[2] // k.shape[2]
        self.on_tiles = score_tiles(scores, self.plan, group)
        others = cotangents[0], *levels_of(saved, cotangents)
        cut_q, cut_k = Cut(self.plan.block_q), Cut(self.plan.block_k)
        self.of_queries = [Blocks.of_finite(q, cut_q, group), *(Blocks.of(x, cut_q, group) for x in others)]
        self.of_keys = [Blocks.of_finite(x, cut_k) for x in (k, v)]

    def queries_at(self, b, i) -> QueryBlock:
        queries, d_out, *others = (x.rows(b, i, 1, self.heads).astype(self.dtype) for x in self.of_queries)
        return QueryBlock(queries * self.scores.scale, self.on_tiles.rescaled(d_out), *others)

    def keys_at(self, b, j):
        return tuple(x.rows(b, j, 1, self.heads).astype(self.dtype) for x in self.of_keys)

    def row(self, b):
        """The plan's row for sequence b."""
        return b if self.plan.rows > 1 else 0

    def tile(self, place, block, keys, values):
        """`tile_gradients` of the block of queries i and of keys j of sequence b, `place` = (b, i, j)."""
        b, i, j = place
        place = Place(b, self.row(b), self.heads, i, j)
        return tile_gradients(self.on_tiles, place, block, (keys, values), None)


def gradients(scores, saved, cotangents):
    """The gradients of q, k, v and the bias from those of out and lse."""
    (q, k, v, plan, *_), of = saved, _Operands(scores, saved, cotangents)
    q_blocks, k_blocks = of.of_queries[0], of.of_keys[0]
    q_numbers, k_numbers = (
        jnp.arange(x.x.shape[0] * x.x.shape[1], dtype=jnp.int32) for x in (q_blocks, k_blocks)
    )
    columns = plan.codes.swapaxes(1, 2)

    def query_line(number):
        b, i = row_and_block(number, plan.codes.shape[1])
        block = of.queries_at(b, i)

        def add(j, sums):
            d_q, d_bias = sums
            keys, values = of.keys_at(b, j)
            d_products, _, share = of.tile((b, i, j), block, keys, values)
            return d_q + jnp.einsum("ksr,ksh->krh", d_products, keys), jax.tree.map(jnp.add, d_bias, share)

        start = jnp.zeros_like(block.q), of.on_tiles.no_gradient(of.dtype)
        start = vary_like(start, block, of.on_tiles, of.of_keys)
        d_q, d_bias = over_blocks(at(plan.codes, of.row(b), i), ACTIVE, add, start)
        return q_blocks.tokens(d_q * scores.scale, 1)[0], d_bias

    def key_line(number):
        b, j = row_and_block(number, plan.codes.shape[2])
        keys, values = of.keys_at(b, j)

        def add(i, sums):
            block, (d_k, d_v) = of.queries_at(b, i), sums
            d_products, weights, _ = of.tile((b, i, j), block, keys, values)
            d_k += jnp.einsum("ksr,krh->ksh", d_products, block.q)
            return d_k, d_v + jnp.einsum("ksr,krh->ksh", weights, block.d_out)

        start = vary_like((jnp.zeros_like(keys), jnp.zeros_like(values)), keys, of.on_tiles)
        found = over_blocks(at(columns, of.row(b), j), ACTIVE, add, start)
        return tuple(k_blocks.tokens(x, 1)[0] for x in found)

    d_q, d_bias = _in_groups(query_line, q_numbers, plan.codes)
    d_q = q_blocks.whole(d_q)
    d_k, d_v = (k_blocks.whole(x) for x in _in_groups(key_line, k_numbers, columns))
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), [x.sum(axis=0) for x in d_bias]


XLA_WIDE = by_key_head(
    Backend(
        functools.partial(forward, over_lines=_in_groups, test_all=True),
        gradients,
        prepared=as_they_are,
        marks_bad=True,
    )
)
