"""The oracle: attention as it is defined, in O(T·S) memory. JAX differentiates it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax

from dynmask_jax.array_typing import Array, Float, sum_dtype
from dynmask_jax.backends.backend import Backend
from dynmask_jax.bias_algebra import bias_tensor, learnable
from dynmask_jax.dropout import kept_pairs
from dynmask_jax.mask_algebra import mask_tensor
from dynmask_jax.online_softmax import Partial, normalize
from dynmask_jax.plans import Plan
from dynmask_jax.scores import Scores


def forward(scores: Scores, q, k, v, plan: Plan) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """`(out, lse)` of every query over the keys that the plan's mask shows it; blocks play no part."""
    logits, values = _logits_and_values(scores, q, k, v, plan)
    kept = _kept(scores, plan, logits.dtype)
    peak = lax.stop_gradient(logits.max(axis=-1))
    level = jnp.where(jnp.isneginf(peak), 0.0, peak)
    weights = jnp.exp(logits - level[..., None])
    weighted = jnp.einsum("bnts,bsnh->bnth", weights * kept, values)
    out, lse = normalize(Partial(weighted, peak, weights.sum(axis=-1)))
    return out.swapaxes(1, 2).astype(q.dtype), lse.swapaxes(1, 2)


def gradients(scores: Scores, saved: tuple, cotangents: tuple) -> tuple[Array, Array, Array, list[Array]]:
    """d_q, d_k, d_v, d_bias: of Σ weight · (d_out·v − delta), whose weights have the lse that was saved."""
    q, k, v, plan, out, lse = saved
    wide = lse.dtype
    d_out, d_lse = (x.astype(wide).swapaxes(1, 2) for x in cotangents)
    delta = (out.astype(wide).swapaxes(1, 2) * d_out).sum(axis=-1) - d_lse
    level = jnp.where(jnp.isneginf(lse), 0.0, lse).swapaxes(1, 2)

    numbers, rebuilt = learnable(scores.bias)
    kept = _kept(scores, plan, wide)

    def credit(q, k, v, numbers):
        with_numbers = replace(scores, bias=rebuilt(numbers))
        logits, values = _logits_and_values(with_numbers, q, k, v, plan)
        worth = jnp.einsum("bnth,bsnh->bnts", d_out, values) * kept - delta[..., None]
        return (jnp.exp(logits - level[..., None]) * worth).sum()

    return jax.grad(credit, argnums=(0, 1, 2, 3))(q, k, v, list(map(jnp.asarray, numbers)))


def _logits_and_values(scores, q, k, v, plan):
    """Logits `[B, N, T, S]`, −inf where hidden, and values `[B, S, N, H]`."""
    q, k, v = (x.astype(sum_dtype(q.dtype)) for x in (q, k, v))
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    visible = _by_batch_and_head(mask_tensor(plan.mask, plan.q_tokens, plan.kv_tokens))
    logits = scores.capped(jnp.einsum("btnh,bsnh->bnts", q * scores.scale, k))
    if scores.bias is not None:
        bias = bias_tensor(scores.bias, plan.q_tokens, plan.kv_tokens, heads=q.shape[2])
        logits += bias.astype(logits.dtype)
    return jnp.where(visible, logits, -jnp.inf), v


def _kept(scores, plan: Plan, dtype) -> Float[Array, "B N T S"] | float:
    """What each weight is multiplied by: 0 where it is dropped."""
    if scores.dropout is None:
        return 1.0
    kept = kept_pairs(scores.dropout, plan.q_tokens, plan.kv_tokens)
    return jnp.where(kept, scores.dropout.scale.astype(dtype), 0.0)


def _by_batch_and_head(visible):
    """`[B, T, S]` as `[B, 1, T, S]`; per-head masks have their N already."""
    return visible if visible.ndim == 4 else visible[:, None]


DENSE = Backend(forward, gradients, differentiable=True)
