"""Attention in plain XLA: a loop over the plan's active blocks, forward and backward.

Runs wherever XLA does. Memory is O(T): one tile of logits lives at a time, and the residuals are
q, k, v, out and lse. Full blocks are computed without the mask. Sums are taken in one fixed order, so
results are the same bit for bit from run to run.

Reference: FlashAttention-2, Dao 2023, arXiv:2307.08691.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from dynmask_jax.array_typing import Array, Bool, Float, pytree, sum_dtype
from dynmask_jax.online_softmax import Partial, finish, from_logits, merge
from dynmask_jax.plans import FULL, TEST, Plan, over_blocks, tiles_of
from dynmask_jax.scores import Scores
from dynmask_jax.varying import vary_like


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    plan: Plan,
    scores: Scores,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attention of every query over the keys that the plan's mask shows it."""
    return _attend(scores, q, k, v, plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scores, q, k, v, plan):
    return _forward(scores, q, k, v, plan)


def _attend_forward(scores, q, k, v, plan):
    out, lse = _forward(scores, q, k, v, plan)
    return (out, lse), (q, k, v, plan, out, lse)


def _attend_backward(scores, saved, cotangents):
    q, k, v, plan, out, lse = saved
    return *_backward(scores, (q, k, v, plan, out, lse), cotangents), None


_attend.defvjp(_attend_forward, _attend_backward)


@pytree
class QueryBlock:
    """One block of scaled queries and what the backward pass needs of it; G share a key head.

    `delta` is Σ out·d_out − d_lse, the part of a logit's gradient that all its row shares.
    """

    q: Float[Array, "K G bq H"]
    d_out: Float[Array, "K G bq H"]
    lse: Float[Array, "K G bq"]
    delta: Float[Array, "K G bq"]


def _forward(scores, q, k, v, plan):
    wide = sum_dtype(q.dtype)
    q_blocks = _query_blocks(q, k.shape[2], plan)
    k_blocks, v_blocks = (_key_blocks(x, plan) for x in (k, v))
    tiles = tiles_of(plan)

    def query_block(at):
        b, i = at // q_blocks.shape[1], at % q_blocks.shape[1]
        row = b if plan.rows > 1 else 0
        queries = q_blocks[b, i].astype(wide) * scores.scale

        def add(j, partial, *, tested):
            keys, values = (blocks[b, j].astype(wide) for blocks in (k_blocks, v_blocks))
            visible = _by_key_head(tiles.visible(row, i, j), queries) if tested else None
            return merge(partial, _tile(scores, queries, keys, values, visible))

        empty = vary_like(Partial.empty(queries.shape, wide), queries)
        return finish(_over_active(plan.codes[row, i], add, empty))

    out, lse = lax.map(query_block, _counted(q_blocks))
    return _from_query_blocks(out, q).astype(q.dtype), _from_query_blocks(lse, q)


def _tile(scores, queries, keys, values, visible) -> Partial:
    """Attention of a block of queries `[K, G, bq, H]` over a block of keys `[K, bk, H]`."""
    logits = scores.logits(_products(queries, keys))
    if visible is not None:
        logits = jnp.where(visible, logits, -jnp.inf)
    weights, peak, total = from_logits(logits)
    return Partial(jnp.einsum("kgqs,ksh->kgqh", weights, values), peak, total)


def _products(queries, keys):
    return jnp.einsum("kgqh,ksh->kgqs", queries, keys)


def _backward(scores, saved, cotangents):
    q, k, v, plan, out, lse = saved
    wide = lse.dtype
    d_out, d_lse = cotangents
    delta = jnp.sum(out.astype(wide) * d_out.astype(wide), axis=-1) - d_lse
    scaled = q.astype(wide) * scores.scale
    queries = QueryBlock(*(_query_blocks(x, k.shape[2], plan) for x in (scaled, d_out, lse, delta)))
    k_blocks, v_blocks = (_key_blocks(x, plan) for x in (k, v))
    key_blocks, tiles = k_blocks.shape[1], tiles_of(plan)

    def key_block(dq_blocks, at):
        b, j = at // key_blocks, at % key_blocks
        row = b if plan.rows > 1 else 0
        keys, values = (blocks[b, j].astype(wide) for blocks in (k_blocks, v_blocks))

        def add(i, sums, *, tested):
            dq_blocks, dk, dv = sums
            block = jax.tree.map(lambda x: x[b, i].astype(wide), queries)
            visible = _by_key_head(tiles.visible(row, i, j), block.q) if tested else None
            dq_tile, dk_tile, dv_tile = _tile_gradients(scores, block, keys, values, visible)
            return dq_blocks.at[b, i].add(dq_tile), dk + dk_tile, dv + dv_tile

        start = (dq_blocks, *vary_like((jnp.zeros_like(keys), jnp.zeros_like(values)), keys))
        dq_blocks, dk, dv = _over_active(plan.codes[row, :, j], add, start)
        return dq_blocks, (dk, dv)

    dq_blocks = vary_like(jnp.zeros(queries.q.shape, wide), queries)
    dq, (dk, dv) = lax.scan(key_block, dq_blocks, _counted(k_blocks))
    dq = _from_query_blocks(dq.reshape(-1, *dq.shape[2:]), q) * scores.scale
    dk, dv = (_from_key_blocks(x, k) for x in (dk, dv))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _tile_gradients(scores, block: QueryBlock, keys, values, visible):
    """What one tile adds to the gradients of its queries, keys and values."""
    logits = scores.logits(_products(block.q, keys))
    # After the exponential: a query that sees nothing has lse −inf, and gets inf there.
    weights = _shown(jnp.exp(logits - block.lse[..., None]), visible)
    d_logits = weights * (_products(block.d_out, values) - block.delta[..., None])
    d_products = _shown(d_logits, visible) * scores.slope(logits)
    return (
        jnp.einsum("kgqs,ksh->kgqh", d_products, keys),
        jnp.einsum("kgqs,kgqh->ksh", d_products, block.q),
        jnp.einsum("kgqs,kgqh->ksh", weights, block.d_out),
    )


def _counted(blocks: Float[Array, "B blocks ..."]):
    """0, 1, … over the blocks of all sequences."""
    return jnp.arange(blocks.shape[0] * blocks.shape[1], dtype=jnp.int32)


def _shown(pairs, visible):
    """Zero for hidden pairs, whatever was there."""
    return pairs if visible is None else jnp.where(visible, pairs, 0.0)


def _over_active(codes, add, start):
    """Folds `add` over a line's active blocks: first the full ones, then those to test."""
    result = over_blocks(codes, FULL, functools.partial(add, tested=False), start)
    return over_blocks(codes, TEST, functools.partial(add, tested=True), result)


def _by_key_head(visible: Bool[Array, "*N bq bk"], queries: Float[Array, "K G bq H"]):
    """A tile's mask in the shape of its logits, `[K, G, bq, bk]`; an axis is 1 where all agree."""
    heads = queries.shape[:2] if visible.ndim == 3 else (1, 1)
    return visible.reshape(*heads, *visible.shape[-2:])


def _query_blocks(x: Float[Array, "B T N *H"], key_heads: int, plan: Plan) -> Float[Array, "B Tb K G bq *H"]:
    batch, _, heads, *rest = x.shape
    x = _padded(x, plan.block_q).reshape(batch, -1, plan.block_q, key_heads, heads // key_heads, *rest)
    return jnp.moveaxis(x, 2, 4)


def _key_blocks(x: Float[Array, "B S K H"], plan: Plan) -> Float[Array, "B Sb K bk H"]:
    batch, _, heads, head_dim = x.shape
    return _padded(x, plan.block_k).reshape(batch, -1, plan.block_k, heads, head_dim).swapaxes(2, 3)


def _padded(x, size: int):
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *[(0, 0)] * (x.ndim - 2)))


def _from_query_blocks(x: Float[Array, "BTb K G bq *H"], like: Float[Array, "B T N H"]):
    batch, length, heads = like.shape[:3]
    x = jnp.moveaxis(x, 3, 1).reshape(batch, -1, heads, *x.shape[4:])
    return x[:, :length]


def _from_key_blocks(x: Float[Array, "BSb K bk H"], like: Float[Array, "B S K H"]):
    batch, length, heads, head_dim = like.shape
    return x.swapaxes(1, 2).reshape(batch, -1, heads, head_dim)[:, :length]
