"""Attention on NVIDIA cards from Ampere on: Pallas kernels through Triton, backward in `gpu_backward`.

The plan is data: each line's active blocks are a list that is made on the card, its full ones first. The
mask's own expression is traced inside the kernel, and asked on blocks to test alone. On other platforms the
kernels are interpreted: right, slow, for tests.

Reference: FlashAttention-2, Dao 2023, arXiv:2307.08691.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from dynmask_jax.backends.backend import Backend, as_they_are
from dynmask_jax.backends.by_head import by_key_head
from dynmask_jax.backends.gpu_backward import gradients
from dynmask_jax.backends.gpu_blocks import filled_heads, unfilled
from dynmask_jax.backends.gpu_choice import grains_of, hopper_grains
from dynmask_jax.backends.gpu_lines import Kernel, Layout, Line, Side, query_lists
from dynmask_jax.backends.gpu_merge import merged_softmax
from dynmask_jax.backends.gpu_options import Grain as Grain
from dynmask_jax.backends.gpu_options import Grains
from dynmask_jax.backends.gpu_options import Warpgroups as Warpgroups
from dynmask_jax.backends.gpu_sides import key_side, query_side
from dynmask_jax.backends.gpu_sweep import sweep
from dynmask_jax.backends.gpu_tile import Pairs
from dynmask_jax.backends.hopper import forward_kernel
from dynmask_jax.backends.kernel_checks import check_kernel_bias, check_kernel_mask
from dynmask_jax.backends.kernel_tile import LOG2E, Numbers, Tile, dot
from dynmask_jax.backends.triton import LOWERED
from dynmask_jax.errors import Unsupported
from dynmask_jax.finite import bad_rows, emptied
from dynmask_jax.plans import Plan
from dynmask_jax.platforms import compute_capability
from dynmask_jax.scores import Scores

MOST = 256
"""The greatest head dim: tiles of greater ones do not fit a card's registers."""


def _kernel(line: Line, numbers: Numbers, queries: Side, keys: Side, results: tuple):
    tile, pairs = line.layout.tile, Pairs.of(line, numbers, queries)
    q, (k, v) = queries.arrays[0][line.tokens, :], keys.arrays

    def add(_, at, real, found):
        weighted, peak, total = found
        logits = pairs.logits(tile.capped(dot(q, k[at, :], 1, 1)), line.head, keys, at, real)
        before, peak = peak, jnp.maximum(peak, logits.max(axis=1))
        # A row that has seen nothing has a peak of −inf, which cannot be subtracted from −inf.
        level = jnp.maximum(peak, jnp.finfo(jnp.float32).min)
        weights = jnp.exp2(logits - level[:, None])
        rescale = jnp.exp2(before - level)
        fresh = dot(pairs.kept(weights, keys, at).astype(v.dtype), v[at, :], 1, 0)
        return weighted * rescale[:, None] + fresh, peak, total * rescale + weights.sum(axis=1)

    rows = q.shape[0]
    nothing = (jnp.zeros((rows, v.shape[-1]), jnp.float32), jnp.full(rows, -jnp.inf, jnp.float32))
    nothing += (jnp.zeros(rows, jnp.float32),)
    weighted, peak, total = line.each(add, nothing)
    mean = weighted / jnp.where(total == 0, 1.0, total)[:, None]
    mean = mean if numbers.scale is None else mean * numbers.scale[0, 0]
    line.store(results, mean, (peak + jnp.log2(total)) * (1 / LOG2E))


def forward(grains: Grains | None, scores: Scores, q, k, v, plan: Plan):
    """`(out, lse)` of every query over the keys that the plan's mask shows it.

    Raises:
      Unsupported: for other dtypes than float32, bfloat16 and float16; head dims above 256; a card from
        before Ampere; and a mask or a bias that a kernel cannot compute: one that closes over an array, looks
        things up, or has leaves of other types than bool, int32, uint32 and float32.
    """
    _check(scores, q, v.shape[3], plan)
    grains = grains_of(grains, scores, plan, (q.shape[3], v.shape[3], q.dtype))
    queries = query_side(scores, plan, (filled_heads(q, plan.block_q),))
    # A key of NaN marks the queries that see it: what is not finite needs no second look.
    bad = bad_rows(k) | bad_rows(v)
    k, v = emptied(k, bad, jnp.nan), emptied(v, bad)
    keys = key_side(scores, plan, tuple(filled_heads(x, plan.block_k) for x in (k, v)))
    batch, length, heads, _ = queries.arrays[0].shape
    shape = batch, length, heads
    results = [
        jax.ShapeDtypeStruct((*shape, keys.arrays[1].shape[3]), q.dtype),
        jax.ShapeDtypeStruct(shape, jnp.float32),
    ]
    layout = Layout.of(Tile.of(scores, plan), plan, grains.forward, batch * heads, grains.busy)
    body = _kernel if isinstance(grains.forward, Grain) else forward_kernel
    kernel = Kernel(body, "dynmask_forward", layout, merged_softmax)
    out, lse = sweep(kernel, query_lists(plan), Numbers.of(scores, plan), queries, keys, results)
    out = unfilled(out, plan.block_q, q.shape[1], v.shape[3])
    return out, unfilled(lse, plan.block_q, q.shape[1])


def _check(scores: Scores, q, width: int, plan: Plan):
    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise Unsupported(
            f"backend 'gpu' computes in float32, bfloat16 and float16, got {q.dtype}; backend 'xla_wide' "
            "takes others"
        )
    if max(q.shape[3], width) > MOST:
        raise Unsupported(
            f"backend 'gpu' takes head dims up to {MOST}, got {q.shape[3]} and {width}; backend 'xla_wide' "
            "takes greater ones"
        )
    if (capability := compute_capability()) is not None and capability < 8:
        raise Unsupported(
            "backend 'gpu' has kernels for NVIDIA cards from Ampere on (compute capability 8.0), got one of "
            f"{capability}; backend 'xla_wide' runs on it"
        )
    check_kernel_mask(plan.mask, "gpu", LOWERED)
    check_kernel_bias(scores.bias, "gpu", LOWERED)


@dataclass(frozen=True)
class _Forward:
    """The forward pass in these tiles. A record, so that backends of equal tiles are equal, to `jit` too."""

    grains: Grains | None

    def __call__(self, scores: Scores, q, k, v, plan: Plan):
        kind = q.shape[3], v.shape[3], q.dtype
        return _on_cards(forward, self.grains, (scores, plan, kind), (scores, q, k, v, plan))


@dataclass(frozen=True)
class _Gradients:
    """The backward pass, likewise."""

    grains: Grains | None

    def __call__(self, scores: Scores, saved: tuple, cotangents: tuple):
        q, _, v, plan, *_ = saved
        kind = q.shape[3], v.shape[3], q.dtype
        return _on_cards(gradients, self.grains, (scores, plan, kind), (scores, saved, cotangents))


def _on_cards(compute, grains: Grains | None, call: tuple, operands: tuple):
    """`compute(grains, *operands)`; on a Hopper in its own kernels, where the call is one for them.

    A program that is traced beside a Hopper may be for another platform: that is known once it is lowered.
    """
    compute_all = functools.partial(compute, grains)
    if (own := hopper_grains(grains, *call)) is None:
        return compute_all(*operands)
    return lax.platform_dependent(*operands, cuda=functools.partial(compute, own), default=compute_all)


def gpu_backend(grains: Grains | None = None) -> Backend:
    """The GPU backend with tiles of one's own, for a tuner; None for those of the table.

    >>> tile = Grain(line=64, column=32, warps=4, stages=2)
    >>> q = k = v = jnp.ones((1, 64, 2, 16))
    >>> attention(q, k, v, Causal(), backend=gpu_backend(Grains(tile, tile, tile))).shape
    (1, 64, 2, 16)
    """
    passes = _Forward(grains), _Gradients(grains)
    return by_key_head(Backend(*passes, prepared=as_they_are, marks_bad=True, check_vma=False))


GPU = gpu_backend()
