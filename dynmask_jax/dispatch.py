"""Attention under a mask or a plan: the checks, the table of backends, the choice between them."""

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from dynmask_jax.array_typing import Array, Float
from dynmask_jax.backends.backend import Backend
from dynmask_jax.backends.dense import DENSE
from dynmask_jax.backends.gpu import GPU
from dynmask_jax.backends.tpu import TPU
from dynmask_jax.backends.xla import XLA
from dynmask_jax.backends.xla_wide import XLA_WIDE
from dynmask_jax.bias_algebra import Bias, for_heads
from dynmask_jax.calls import as_plan, check_arrays, positive
from dynmask_jax.dropout import Dropout, check_dropout
from dynmask_jax.find_partitioning import find_partitioning
from dynmask_jax.foreign_options import no_option
from dynmask_jax.mask_algebra import Mask, head_count
from dynmask_jax.nonfinite import keep_nonfinite_apart
from dynmask_jax.partitioning import Partitioning
from dynmask_jax.plans import Plan
from dynmask_jax.platforms import defaults_of
from dynmask_jax.scores import Scores
from dynmask_jax.vma import vary_like

MISSING: Any = object()
"""No mask and no plan, of which a message can then say more than Python."""
BACKENDS: dict[str, Backend] = {
    "dense": DENSE,
    "xla": XLA,
    "xla_wide": XLA_WIDE,
    "tpu": TPU,
    "gpu": GPU,
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
    v: Float[Array, "B S K V"],
    mask_or_plan: Mask | Plan,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    bias: Bias | None = None,
    dropout: Dropout | None = None,
    backend: str | Backend | None = None,
    sharding: PartitionSpec | NamedSharding | None = None,
    return_lse: Literal[False] = False,
) -> Float[Array, "B T N V"]: ...
@overload
def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask_or_plan: Mask | Plan,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    bias: Bias | None = None,
    dropout: Dropout | None = None,
    backend: str | Backend | None = None,
    sharding: PartitionSpec | NamedSharding | None = None,
    return_lse: Literal[True],
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]: ...
def attention(
    q,
    k,
    v,
    mask_or_plan=MISSING,
    *,
    scale=None,
    soft_cap=None,
    sinks=None,
    bias=None,
    dropout=None,
    backend=None,
    sharding=None,
    return_lse=False,
    **others,
):
    """softmax(q·kᵀ · scale, over the keys that each query may see) · v.

    Args:
      q: queries, `[B, T, N, H]`.
      k, v: keys `[B, S, K, H]` and values `[B, S, K, V]`; K divides N, and query head n reads key
        head n // (N // K) (grouped queries). All three have one floating dtype; sums are in float32.
      mask_or_plan: a `Plan` made once for all layers, or a `Mask`, for which one is made here with
        queries and keys at positions 0, 1, …. That would be a guess for a mask that reads segments,
        and where the numbers of queries and keys differ for one that reads positions of queries:
        such a call needs a plan. So does one whose bias reads them.
      scale: what products are multiplied by; 1/√H by default.
      soft_cap: squash logits into ±soft_cap by c·tanh(x/c), before the mask.
      sinks: `[N]` logits, one a head, of a key that everyone sees and whose value is zero (gpt-oss;
        Xiao et al. 2023, arXiv:2309.17453).
      bias: what is added to the logits, after the soft cap: `ALiBi`, `RelativeBuckets`, a `BiasFunction`,
        or a sum of them. It reads the tokens that the mask reads.
      dropout: `Dropout(rate, key)` of the weights; the lse stays that of all weights.
      backend: "dense", "xla", "xla_wide", "tpu", "gpu" (the last two interpreted, and slow, on any other
        platform); None for `default_backend()`; or a `gpu_backend` with tiles of one's own. Neither a named
        backend nor the default falls back: on a TPU float16, say, is refused, until "xla" is named.
      sharding: how q is partitioned over a mesh, `PartitionSpec("data", None, "tensor")`, as a
        `NamedSharding` or over the mesh of `jax.set_mesh`: each device computes its own rows and heads. It
        need not be given on a mesh with Explicit axes, whose types say it, nor where the axes of the
        mesh that was set have the usual names (`ROW_AXES` and `HEAD_AXES` in `find_partitioning`).
      return_lse: give `(out, lse)`.

    Returns:
      out, `[B, T, N, V]` in q's dtype; and with `return_lse` the float32 log-sum-exp `[B, T, N]` of
      each query's visible logits, the sink's among them.

    A query that sees nothing gets zeros, passes on zero gradients, and has lse −inf (its sink's
    logit, where there are sinks). A key or value with a NaN or an infinity makes NaN of the out and
    lse of the queries that see it, and of what comes back through out to them (and to the sink of
    their head), and touches nothing else. Differentiable in q, k, v, sinks and the bias's
    floating leaves, in reverse mode and once. Memory is O(T + S), but with "dense" O(T·S).

    Raises:
      ValueError, TypeError: arguments that do not fit, by name.
        Tokens that are partitioned are among them: that is `context_parallel`.
      Unsupported: the named backend cannot do this, though another may.

    Warns:
      where a mesh with Auto axes was set, and along some of them all devices compute the same.

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
    options = {"scale": scale, "soft_cap": soft_cap, "bias": bias, "dropout": dropout}
    call = checked(q, k, v, mask_or_plan, sinks=sinks, backend=backend, **options)
    partitioning = find_partitioning(q, k, v, call.plan, sharding)
    arguments = q, k, v, sinks, call.plan, call.scores
    if partitioning is None:
        out, lse = attend(*arguments, backend=call.backend)
    else:
        out, lse = attend_partitioned(*arguments, backend=call.backend, partitioning=partitioning)
    return (out, lse) if return_lse else out


@dataclass(frozen=True)
class Call:
    """What `attention` was asked for, checked. Made by `checked`.

    Attributes:
      plan: which pairs.
      backend: what computes it.
      scores: how products become logits, and which weights are dropped.
    """

    plan: Plan
    backend: Backend
    scores: Scores


def checked(q, k, v, mask_or_plan, *, sinks=None, backend=None, **options) -> Call:
    """The arguments of `attention`, checked; raises as it says."""
    check_arrays(q, k, v)
    if sinks is not None and jnp.shape(sinks) != (q.shape[2],):
        raise ValueError(f"sinks must have shape [heads] = ({q.shape[2]},), got {jnp.shape(sinks)}")
    the_plan = as_plan(mask_or_plan, q.shape[0], q.shape[1], k.shape[1], options.get("bias"))
    if (heads := head_count(the_plan.mask)) not in (None, q.shape[2]):
        raise ValueError(f"the mask has leaves for {heads} heads, got {q.shape[2]} query heads")
    return Call(the_plan, known_backend(backend), _scores(q, **options))


def _scores(q, *, scale=None, soft_cap=None, bias=None, dropout=None) -> Scores:
    if bias is not None:
        bias = for_heads(bias, q.shape[2])
    if dropout is not None:
        check_dropout(dropout)
        dropout = dropout.draws(q.shape[0], q.shape[2])
    scale = positive("scale", scale, 1 / math.sqrt(q.shape[3]))
    return Scores(bias, dropout, scale, positive("soft_cap", soft_cap, None))


@functools.partial(jax.jit, static_argnames="backend")
def attend(q, k, v, sinks, the_plan: Plan, scores: Scores, *, backend: Backend):
    """`(out, lse)` of arguments that have been checked."""
    # One type for all: inside shard_map a gradient must vary over the same axes as its array.
    q, k, v, scores = vary_like((q, k, v, scores), q, k, v, the_plan, scores)
    computed = functools.partial(backend.attend, plan=the_plan, scores=scores)
    out, lse = keep_nonfinite_apart(computed, q, k, v, the_plan, marks_bad=backend.marks_bad)
    return with_sinks(out, lse, sinks)


@functools.partial(jax.jit, static_argnames=("partitioning", "backend"))
def attend_partitioned(
    q, k, v, sinks, the_plan: Plan, scores: Scores, *, partitioning: Partitioning, backend: Backend
):
    """`attend` where each device has its own rows and heads."""
    heads, key_heads = q.shape[2], k.shape[2]
    keys_shared = key_heads % partitioning.head_devices != 0

    def on_device(own: Plan, q, k, v, sinks, scores):
        if keys_shared:
            k, v = (partitioning.own_key_heads(x, heads) for x in (k, v))
        return attend(q, k, v, sinks, own, scores, backend=backend)

    of_queries = partitioning.arrays
    of_keys = partitioning.rows if keys_shared else of_queries
    return partitioning.over_devices(
        on_device,
        the_plan,
        (q, k, v, sinks, scores),
        (of_queries, of_keys, of_keys, partitioning.heads, partitioning.of_scores(scores)),
        (of_queries, of_queries),
        check_vma=backend.check_vma,
    )


def known_backend(backend: str | Backend | None) -> Backend:
    """The backend of a name, or the default one; refuses a name that there is not."""
    if isinstance(backend, Backend):
        return backend
    name = default_backend() if backend is None else backend
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))} or None, got {backend!r}")
    return BACKENDS[name]


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
