"""Attention under a mask or a plan: the checks, the table of backends, the choice between them."""

import functools
import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np

from dynmask_jax.array_typing import Array, Float
from dynmask_jax.backends.backend import Backend
from dynmask_jax.backends.dense import DENSE
from dynmask_jax.backends.tpu import TPU
from dynmask_jax.backends.xla import XLA
from dynmask_jax.backends.xla_wide import XLA_WIDE
from dynmask_jax.fields_read import fields_read, reads_segments
from dynmask_jax.foreign_options import no_option
from dynmask_jax.mask_algebra import Mask, check_mask, head_count
from dynmask_jax.nonfinite import keep_nonfinite_apart
from dynmask_jax.plans import Plan, plan
from dynmask_jax.platforms import defaults_of
from dynmask_jax.scores import Scores
from dynmask_jax.tokens import Tokens
from dynmask_jax.vma import vary_like

MISSING: Any = object()
"""No mask and no plan, of which a message can then say more than Python."""
BACKENDS: dict[str, Backend] = {
    "dense": DENSE,
    "xla": XLA,
    "xla_wide": XLA_WIDE,
    "tpu": TPU,
}
"""name -> what computes attention on one device."""


def default_backend(platform: str | None = None) -> str:
    """The backend that `attention(backend=None)` takes on a platform: "cpu", "gpu", "tpu".

    Without a name, on the platform that JAX computes on now. A program compiled ahead of time for
    another platform must name its backend.
    """
    return defaults_of(platform).backend


@overload
def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask_or_plan: Mask | Plan,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    backend: str | None = None,
    return_lse: Literal[False] = False,
) -> Float[Array, "B T N H"]: ...
@overload
def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask_or_plan: Mask | Plan,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    backend: str | None = None,
    return_lse: Literal[True],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]: ...
def attention(
    q,
    k,
    v,
    mask_or_plan=MISSING,
    *,
    scale=None,
    soft_cap=None,
    sinks=None,
    backend=None,
    return_lse=False,
    **others,
):
    """softmax(q·kᵀ · scale, over the keys that each query may see) · v.

    Args:
      q: queries, `[B, T, N, H]`.
      k, v: keys and values, `[B, S, K, H]`; K divides N, and query head n reads key head
        n // (N // K) (grouped queries). All three have one floating dtype; sums are in float32.
      mask_or_plan: a `Plan` made once for all layers, or a `Mask`, for which one is made here with
        queries and keys at positions 0, 1, …. That would be a guess for a mask that reads segments,
        and where the numbers of queries and keys differ for one that reads positions of queries:
        such a call needs a plan.
      scale: what products are multiplied by; 1/√H by default.
      soft_cap: squash logits into ±soft_cap by c·tanh(x/c), before the mask.
      sinks: `[N]` logits, one a head, of a key that everyone sees and whose value is zero (gpt-oss;
        Xiao et al. 2023, arXiv:2309.17453).
      backend: "dense", "xla", "xla_wide", "tpu" (interpreted, and slow, on any other platform), or
        None for `default_backend()`. Neither a named backend nor the default falls back: on a TPU
        float16, say, is refused, until "xla" is named.
      return_lse: give `(out, lse)`.

    Returns:
      out, `[B, T, N, H]` in q's dtype; and with `return_lse` the float32 log-sum-exp `[B, T, N]` of
      each query's visible logits, the sink's among them.

    A query that sees nothing gets zeros, passes on zero gradients, and has lse −inf (its sink's
    logit, where there are sinks). A key or value with a NaN or an infinity makes NaN of the out and
    lse of the queries that see it, and of what comes back through out to them (and to the sink of
    their head), and touches nothing else. Differentiable in q, k, v and sinks, in reverse mode and
    once. Memory is O(T + S), but with "dense" O(T·S).

    Raises:
      ValueError, TypeError: arguments that do not fit, by name.
      Unsupported: the named backend cannot do this, though another may.

    >>> q = k = v = jnp.ones((1, 4, 2, 8))
    >>> attention(q, k, v, Causal() & Window(2)).shape
    (1, 4, 2, 8)
    """
    if others:
        raise TypeError(no_option(min(others), BACKENDS))
    if mask_or_plan is MISSING:
        raise TypeError(
            "attention needs a mask or a plan after q, k and v: Everything(), where all is visible"
        )
    call = checked(q, k, v, mask_or_plan, scale=scale, soft_cap=soft_cap, sinks=sinks, backend=backend)
    out, lse = attend(q, k, v, sinks, call.plan, backend=call.backend, scores=call.scores)
    return (out, lse) if return_lse else out


MANY_HEADS = 128
"""No model has more key heads in a layer, as far as we know; sequences have more tokens."""


@dataclass(frozen=True)
class Call:
    """What `attention` was asked for, checked. Made by `checked`.

    Attributes:
      plan: which pairs.
      backend: its name.
      scores: how products become logits.
    """

    plan: Plan
    backend: str
    scores: Scores


def checked(q, k, v, mask_or_plan, *, scale=None, soft_cap=None, sinks=None, backend=None) -> Call:
    """The arguments of `attention`, checked; raises as it says."""
    _check_arrays(q, k, v)
    if sinks is not None and jnp.shape(sinks) != (q.shape[2],):
        raise ValueError(f"sinks must have shape [heads] = ({q.shape[2]},), got {jnp.shape(sinks)}")
    the_plan = as_plan(mask_or_plan, q.shape[0], q.shape[1], k.shape[1])
    if (heads := head_count(the_plan.mask)) not in (None, q.shape[2]):
        raise ValueError(f"the mask has leaves for {heads} heads, got {q.shape[2]} query heads")
    scale = _positive("scale", scale, 1 / math.sqrt(q.shape[3]))
    return Call(the_plan, _known(backend), Scores(scale, _positive("soft_cap", soft_cap, None)))


@functools.partial(jax.jit, static_argnames=("backend", "scores"))
def attend(q, k, v, sinks, the_plan: Plan, *, backend: str, scores: Scores):
    """`(out, lse)` of arguments that have been checked."""
    # One type for all: inside shard_map a gradient must vary over the same axes as its array.
    q, k, v = vary_like((q, k, v), q, k, v, the_plan)
    out, lse = keep_nonfinite_apart(
        functools.partial(BACKENDS[backend].attend, plan=the_plan, scores=scores), q, k, v, the_plan
    )
    return with_sinks(out, lse, sinks)


def as_plan(mask_or_plan: Mask | Plan, batch: int, queries: int, keys: int) -> Plan:
    """The plan itself, or one for the mask with queries and keys at positions 0, 1, ….

    Raises:
      TypeError: it is neither.
      ValueError: the plan is for another batch, or other numbers of queries and keys; or the mask needs
        tokens.
    """
    if isinstance(mask_or_plan, Plan):
        _check_plan(mask_or_plan, batch, queries, keys)
        return mask_or_plan
    check_mask(mask_or_plan, "mask_or_plan must be a Mask or a Plan")
    check_without_tokens(mask_or_plan, queries, keys)
    return plan(mask_or_plan, Tokens.sequence(queries), Tokens.sequence(keys))


def check_without_tokens(mask: Mask, queries: int, keys: int):
    """Refuses a mask that needs to be told more of queries and keys than their numbers.

    Raises:
      ValueError: it reads segments; or positions of queries, and there are more keys than queries, or fewer.
    """
    if reads_segments(mask):
        raise ValueError(
            f"{mask!r} reads the segments of tokens, and there are none here, so packed documents would see "
            "each other: make a plan of the tokens, plan(mask, Tokens.packed([300, 212])) or "
            "plan(mask, Tokens(position, segment)), and give it in place of the mask"
        )
    if queries != keys and "q.position" in fields_read(mask):
        start = f"Tokens.sequence({queries}), Tokens.sequence({keys})"
        end = f"Tokens.sequence({queries}, start={keys - queries}), Tokens.sequence({keys})"
        raise ValueError(
            f"{mask!r} reads positions, and where {queries} queries stand among {keys} keys is not said: "
            f"give plan(mask, {end}) in place of the mask if the queries are the last tokens, "
            f"plan(mask, {start}) if they start where the keys do"
        )


def _known(backend: str | None) -> str:
    name = default_backend() if backend is None else backend
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))} or None, got {backend!r}")
    return name


def with_sinks(out, lse, sinks: Float[Array, " N"] | None):
    """`(out, lse)` with one more key for each head, which all see, of value zero: only the total grows."""
    if sinks is None:
        return out, lse
    sinks = jnp.broadcast_to(jnp.asarray(sinks, lse.dtype), lse.shape)
    # A query that sees nothing and has no sink either: neither side of the sum may be differentiated.
    nothing = jnp.isneginf(lse) & jnp.isneginf(sinks)
    total = jnp.logaddexp(jnp.where(nothing, 0.0, lse), sinks)
    share = jnp.where(nothing, 0.0, jnp.exp(lse - total))[..., None]
    return (out.astype(total.dtype) * share).astype(out.dtype), jnp.where(nothing, -jnp.inf, total)


def _check_arrays(q, k, v):
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, jax.Array | np.ndarray):
            raise TypeError(f"{name} must be an array, got {type(x).__name__}")
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(f"{name} must have shape [batch, tokens, heads, head_dim], got {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating, got {x.dtype}")
        if x.dtype != q.dtype:
            raise TypeError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {k.shape} and {v.shape}")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q and k must have one batch size, got {q.shape[0]} and {k.shape[0]}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must have one head dim, got {q.shape[3]} and {k.shape[3]}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"query heads ({q.shape[2]}) must be a multiple of key heads ({k.shape[2]})")
    _warn_of_layout(q, k)


def _warn_of_layout(q, k):
    """Says that arrays look as PyTorch lays them out, [batch, heads, tokens, head_dim]."""
    if q.shape[2] > q.shape[1] and k.shape[2] > max(k.shape[1], MANY_HEADS):
        warnings.warn(
            f"q {q.shape} and k {k.shape} have more heads than tokens: arrays are [batch, tokens, heads, "
            "head_dim] here; those of PyTorch, [batch, heads, tokens, head_dim], need .swapaxes(1, 2)",
            stacklevel=4,
        )


def _check_plan(the_plan: Plan, batch: int, queries: int, keys: int):
    if the_plan.codes.ndim != 3:
        raise ValueError(
            f"the plan's codes must have shape [rows, Tb, Sb], got {the_plan.codes.shape}; of plans made "
            "under vmap each goes to its own attention, under vmap too"
        )
    if the_plan.lengths != (queries, keys):
        t, s = the_plan.lengths
        raise ValueError(f"the plan is for {t} queries and {s} keys, got {queries} and {keys}")
    if the_plan.rows not in (1, batch):
        raise ValueError(f"the plan is for a batch of {the_plan.rows}, got {batch} sequences")


def _positive(name: str, value, default):
    if value is None:
        return default
    if not isinstance(value, int | float | np.number) or isinstance(value, bool):
        raise TypeError(f"{name} must be a Python number, fixed when compiled, got {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return float(value)
