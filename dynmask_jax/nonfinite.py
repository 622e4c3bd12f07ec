"""Keeps a NaN or an infinity to those who may see it, whichever backend computes.

A hidden pair has weight 0, but 0 · NaN is NaN: inside a matrix product one bad value would reach every
query of its block. So backends take bad rows for zeros, and the queries that see one are marked afterwards.
The XLA loops take them so where they copy a block anyway (copies of whole arrays are memory, and time), and
mark queries as they go, by a key of NaN: a second loop over blocks was a fifth of what a layer compiles.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from dynmask_jax.array_typing import Array, Bool, Float
from dynmask_jax.block_codes import ACTIVE, over_blocks
from dynmask_jax.finite import bad_rows
from dynmask_jax.indexing import at, row_and_block
from dynmask_jax.plans import Plan, tiles_of
from dynmask_jax.vma import vary_like


def keep_nonfinite_apart(
    attend: Callable,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    plan: Plan,
    *,
    marks_bad: bool,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """`attend(q, k, v)`, which takes bad rows for zeros, with what is not finite contained.

    `marks_bad`: whether queries that see a bad key or value come out of it as NaN.

    A query that is not finite, or sees a key or value that is not, gets NaN as its out, its lse and
    its gradient, and adds nothing to the gradients of keys. A query that sees nothing passes nothing
    on, whatever it holds and whatever gradient it is handed.
    """
    out, lse = attend(q, k, v)
    sees_bad = jnp.isnan(lse) if marks_bad else sees(plan, bad_rows(k) | bad_rows(v), q.shape[:3])
    return marked(q, out, lse, sees_bad)


def marked(
    q: Float[Array, "B T N H"],
    out: Float[Array, "B T N V"],
    lse: Float[Array, "B T N"],
    sees_bad: Bool[Array, "B T N"],
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """A backend's `(out, lse)` with NaN for the queries that are not finite, or see what is not."""
    blind = jnp.isneginf(lse)
    poisoned = (bad_rows(q) | sees_bad) & ~blind
    # A selection, unlike a product, hands no NaN back to the side that it did not take.
    out = jnp.where(blind[..., None], jnp.zeros_like(out), out)
    # In the poisoned rows out is Σ q · NaN, so that NaN is also what comes back as q's gradient.
    mark = jnp.where(poisoned, jnp.nan, 0.0).astype(q.dtype)
    marked_rows = (q.sum(axis=-1) * mark)[..., None]
    lse = jnp.where(blind, -jnp.inf, jnp.where(poisoned, jnp.nan, lse))
    return jnp.where(poisoned[..., None], jnp.broadcast_to(marked_rows, out.shape), out), lse


def sees(plan: Plan, keys: Bool[Array, "B S K"], shape: tuple[int, ...]) -> Bool[Array, "B T N"]:
    """Which of the queries, of this shape, see any of the marked keys; no work where none is marked."""
    nobody = vary_like(jnp.zeros(shape, dtype=bool), plan, keys)
    return lax.cond(keys.any(), lambda: _sees_by_tile(plan, keys, shape), lambda: nobody)


def _sees_by_tile(plan, keys, shape):
    batch, length, heads = shape
    query_blocks, tiles = plan.codes.shape[1], tiles_of(plan)
    keys = jnp.repeat(keys, heads // keys.shape[2], axis=2).swapaxes(1, 2)
    keys = jnp.pad(keys, ((0, 0), (0, 0), (0, -keys.shape[2] % plan.block_k)))

    def query_block(number):
        b, i = row_and_block(number, query_blocks)
        row = b if plan.rows > 1 else 0

        def look(j, seen):
            marked = lax.dynamic_slice_in_dim(keys[b], j * plan.block_k, plan.block_k, axis=1)
            visible = tiles.visible(row, i, j).reshape(-1, plan.block_q, plan.block_k)
            return seen | (visible & marked[:, None, :]).any(axis=-1)

        nothing = vary_like(jnp.zeros((heads, plan.block_q), dtype=bool), tiles, keys)
        return over_blocks(at(plan.codes, row, i), ACTIVE, look, nothing)

    seen = lax.map(query_block, jnp.arange(batch * query_blocks, dtype=jnp.int32))
    return seen.swapaxes(1, 2).reshape(batch, -1, heads)[:, :length]
