"""The oracle: attention as it is defined, in O(T·S) memory. JAX differentiates it."""

import jax.numpy as jnp
from jax import lax

from dynmask_jax.array_typing import Array, Float, sum_dtype
from dynmask_jax.finite import finite_rows
from dynmask_jax.masks import mask_tensor
from dynmask_jax.online_softmax import Partial, finish
from dynmask_jax.plans import Plan
from dynmask_jax.scores import Scores


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    plan: Plan,
    scores: Scores,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attention of every query over the keys that the plan's mask shows it; blocks play no part."""
    dtype, wide = q.dtype, sum_dtype(q.dtype)
    q, k, v = (finite_rows(x).astype(wide) for x in (q, k, v))
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    visible = _by_batch_and_head(mask_tensor(plan.mask, plan.q_tokens, plan.kv_tokens))

    logits = jnp.where(visible, scores.logits(jnp.einsum("btnh,bsnh->bnts", q * scores.scale, k)), -jnp.inf)
    peak = lax.stop_gradient(logits.max(axis=-1))
    level = jnp.where(jnp.isneginf(peak), 0.0, peak)
    weights = jnp.exp(logits - level[..., None])
    out, lse = finish(Partial(jnp.einsum("bnts,bsnh->bnth", weights, v), peak, weights.sum(axis=-1)))
    return out.swapaxes(1, 2).astype(dtype), lse.swapaxes(1, 2)


def _by_batch_and_head(visible):
    """`[B, T, S]` as `[B, 1, T, S]`; per-head masks have their N already."""
    return visible if visible.ndim == 4 else visible[:, None]
