"""Attention in plain XLA: a loop over the plan's active blocks, forward and backward.

Runs wherever XLA does. Each line of blocks is worked in the grain that costs it less (`grains`). Memory is
O(T): one tile of logits lives at a time, and the residuals are q, k, v, out and lse. The mask is evaluated in
the blocks to test alone. Sums are taken in one fixed order, so results are the same bit for bit from run to
run.

Reference: FlashAttention-2, Dao 2023, arXiv:2307.08691.
"""

import jax.numpy as jnp
from jax import lax

from dynmask_jax.array_typing import sum_dtype
from dynmask_jax.backends.backend import Backend, as_they_are
from dynmask_jax.backends.blocks import Blocks, over_active
from dynmask_jax.backends.by_head import by_key_head
from dynmask_jax.backends.grains import cuts_of, grains_of
from dynmask_jax.backends.score_tiles import Place
from dynmask_jax.backends.xla_backward import gradients
from dynmask_jax.indexing import at, row_and_block
from dynmask_jax.online_softmax import Partial, extend, normalize
from dynmask_jax.vma import vary_like


def _in_turn(line, numbers, codes):
    del codes
    return lax.map(line, numbers)


def forward(scores, q, k, v, plan, over_lines=_in_turn, *, test_all: bool = False):
    """`(out, lse)`, where `over_lines(line, numbers, codes)` stacks `line(number)` over lines of the plan.

    `test_all`: evaluate the mask in full blocks too, where a branch would not save it, and take all heads at
    once.
    """
    wide, heads, group = sum_dtype(q.dtype), (q.shape[2], k.shape[2]), q.shape[2] // k.shape[2]
    cut_q, cut_k = cuts_of(plan)
    grains = grains_of(scores, plan, heads, all_heads=test_all)
    q_blocks, (k_blocks, v_blocks) = Blocks.of_finite(q, cut_q, group), Blocks.of_keys_values(k, v, cut_k)

    def in_grain(grain, b, row):
        on_tiles = grain.on_tiles

        def query_block(carry, i, heads):
            queries = q_blocks.rows(b, i * grain.blocks_q, grain.blocks_q, heads).astype(wide) * scores.scale

            def add(j, partial, *, tested):
                place = Place(b, row, heads, i, j)
                part = j * grain.blocks_k, grain.blocks_k, heads
                keys, values = (blocks.rows(b, *part).astype(wide) for blocks in (k_blocks, v_blocks))
                logits = on_tiles.biased(scores.capped(jnp.einsum("krh,ksh->krs", queries, keys)), place)

                def hide(visible):
                    return logits if visible is None else jnp.where(visible, logits, -jnp.inf)

                hidden = on_tiles.where_tested(hide, None if test_all else tested, place)

                def weigh(weights):
                    return jnp.einsum("krs,ksh->krh", on_tiles.kept(weights, place), values)

                return extend(partial, hidden, weigh)

            shape = (*queries.shape[:2], v.shape[3])
            empty = vary_like(Partial.empty(shape, wide), queries, on_tiles)
            out, lse = normalize(over_active(at(grain.codes, row, i), add, empty))
            out = on_tiles.rescaled(out).astype(q.dtype)
            return carry, tuple(q_blocks.tokens(x, grain.blocks_q) for x in (out, lse))

        return query_block

    def line(number):
        b, i = row_and_block(number, plan.codes.shape[1])
        row = b if plan.rows > 1 else 0
        return grains.over_line(lambda grain: in_grain(grain, b, row), (), row, i)[1]

    numbers = jnp.arange(q.shape[0] * plan.codes.shape[1], dtype=jnp.int32)
    return tuple(q_blocks.whole(_joined(x)) for x in over_lines(line, numbers, plan.codes))


def _joined(x):
    """`[lines, blocks, …]` as `[lines · blocks, …]`."""
    return x.reshape(-1, *x.shape[2:])


XLA = by_key_head(Backend(forward, gradients, prepared=as_they_are, marks_bad=True))
