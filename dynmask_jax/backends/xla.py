"""Attention in plain XLA: a loop over the plan's active blocks, forward and backward.

Runs wherever XLA does. Memory is O(T): one tile of logits lives at a time, and the residuals are
q, k, v, out and lse. The mask is evaluated in the blocks to test alone. Sums are taken in one fixed order, so
results are the same bit for bit from run to run.

Reference: FlashAttention-2, Dao 2023, arXiv:2307.08691.
"""

import jax.numpy as jnp
from jax import lax

from dynmask_jax.array_typing import sum_dtype
from dynmask_jax.backends.backend import Backend, as_they_are
from dynmask_jax.backends.blocks import Blocks, over_active, visible_rows
from dynmask_jax.backends.score_tiles import Place, score_tiles
from dynmask_jax.backends.xla_backward import gradients
from dynmask_jax.indexing import at, row_and_block
from dynmask_jax.online_softmax import Partial, extend, normalize
from dynmask_jax.vma import vary_like


def _in_turn(line, numbers, codes):
    del codes
    return lax.map(line, numbers)


def forward(scores, q, k, v, plan, over_lines=_in_turn, *, test_all: bool = False):
    """`(out, lse)`, where `over_lines(line, numbers, codes)` stacks `line(number)` over lines of the plan.

    `test_all`: evaluate the mask in full blocks too, where a branch would not save it.
    """
    wide, heads, key_heads = sum_dtype(q.dtype), q.shape[2], k.shape[2]
    q_blocks, on_tiles = Blocks.of_finite(q, plan.block_q), score_tiles(scores, plan, heads, key_heads)
    k_blocks, v_blocks = Blocks.of_keys_values(k, v, plan.block_k)

    def query_block(number):
        b, i = row_and_block(number, q_blocks.count)
        row = b if plan.rows > 1 else 0
        queries = q_blocks.rows(b, i, key_heads).astype(wide) * scores.scale

        def add(j, partial, *, tested):
            place = Place(b, row, i, j)
            keys, values = (blocks.rows(b, j, key_heads).astype(wide) for blocks in (k_blocks, v_blocks))
            tested = None if test_all else tested
            visible = visible_rows(on_tiles.tiles, tested, place[1:], heads, key_heads)
            logits = on_tiles.biased(scores.capped(jnp.einsum("krh,ksh->krs", queries, keys)), place)

            def weigh(weights):
                return jnp.einsum("krs,ksh->krh", on_tiles.kept(weights, place), values)

            return extend(partial, jnp.where(visible, logits, -jnp.inf), weigh)

        shape = (*queries.shape[:2], v.shape[3])
        empty = vary_like(Partial.empty(shape, wide), queries, on_tiles)
        out, lse = normalize(over_active(at(plan.codes, row, i), add, empty))
        return q_blocks.tokens(on_tiles.rescaled(out)).astype(q.dtype), q_blocks.tokens(lse)

    out, lse = over_lines(query_block, q_blocks.every(), plan.codes)
    return q_blocks.whole(out), q_blocks.whole(lse)


XLA = Backend(forward, gradients, prepared=as_they_are, marks_bad=True)
