"""Masks with per-head leaves: the blocks that a head skips are skipped for it, and nothing else changes."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import HEADS, TOLERANCE, Shape, enable_x64
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from slow import mostly

from dynmask_jax import (
    ALiBi,
    BiasFunction,
    Causal,
    Dropout,
    SameSegment,
    Tokens,
    Window,
    attention,
    context_parallel,
    plan,
)
from dynmask_jax.backends.backend import Backend
from dynmask_jax.backends.by_head import by_key_head
from dynmask_jax.dispatch import BACKENDS
from dynmask_jax.mask_algebra import head_count

KERNELS = [name for name in BACKENDS if name != "dense"]
WINDOWS = jnp.array([1, 4, 40, 9])
SHAPE = Shape(queries=37, keys=53)
MESH = jax.make_mesh((4,), ("context",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])


def _count(scores, q, k, v, plan):
    """In place of out, how many blocks the call was asked to compute."""
    del scores, k
    blocks = plan.active.astype(q.dtype)
    return jnp.broadcast_to(blocks, (*q.shape[:3], v.shape[3])) + 0 * q[..., :1], 0 * q[..., 0]


def _count_backward(scores, saved, cotangents):
    """In place of d_q, likewise."""
    q, k, v, plan, *_ = saved
    del scores, cotangents
    return plan.active.astype(q.dtype) + 0 * q, 0 * k, 0 * v, []


COUNTING = by_key_head(Backend(_count, _count_backward))
"""What it is asked to compute is what a backend does compute: its loops are over the plan's active blocks."""


def counts(the_plan, attend=attention, *, kv_heads=HEADS, heads=HEADS):
    """The blocks that each head costs, in the forward pass and in the backward pass: `[2, N]`."""
    t, s = the_plan.lengths
    q = jnp.ones((the_plan.rows, t, heads, 2))
    k = v = jnp.ones((the_plan.rows, s, kv_heads, 2))

    @jax.jit
    def run(q, k, v, the_plan):
        out, backward = jax.vjp(lambda q: attend(q, k, v, the_plan, backend=COUNTING), q)
        return out, backward(jnp.ones_like(out))[0]

    return [np.asarray(x) for x in run(q, k, v, the_plan)]


def blocks_of(windows, length, size):
    """How many blocks of a causal window each head has, by its definition: a head at a time."""
    return [int(plan(Causal() & Window(w), length, block_q=size, block_k=size).active) for w in windows]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_a_head_costs_the_blocks_that_its_own_key_head_shows(kv_heads):
    tokens = Tokens.sequence(64)
    windows = np.array([8, 64, 1, 16])
    the_plan = plan(Causal() & Window(jnp.asarray(windows)), tokens, block_q=8, block_k=8)
    widest = windows.reshape(kv_heads, -1).max(axis=1)
    expected = np.repeat(blocks_of(widest, tokens, 8), HEADS // kv_heads)
    assert len(set(expected)) == {4: 4, 2: 2, 1: 1}[kv_heads]
    for found in counts(the_plan, kv_heads=kv_heads):
        np.testing.assert_array_equal(found, np.broadcast_to(expected[None, None, :, None], found.shape))


def test_narrowed_plans_skip_per_head():
    """Also what the mask that is left does not say: codes that were found for other tokens, say."""
    tokens = Tokens.sequence(64)
    narrowed = plan(Causal(), tokens, block_q=8, block_k=8) & Window(jnp.array([8, 64, 1, 16]))
    at_once = plan(Causal() & Window(jnp.array([8, 64, 1, 16])), tokens, block_q=8, block_k=8)
    chex.assert_trees_all_equal(counts(narrowed), counts(at_once))
    known = jnp.where(jnp.arange(8)[:, None] < 4, narrowed.codes, 0)
    half = dataclasses.replace(narrowed, codes=known)
    for found in counts(half):
        np.testing.assert_array_equal(found[0, 0, :, 0], blocks_of([8, 64, 1, 16], Tokens.sequence(32), 8))


@pytest.mark.parametrize("strategy", ["ring", "all_gather", "ulysses"])
def test_sequences_over_devices_skip_per_head(strategy):
    """Each device has 16 of the queries, or with ulysses all of one head's."""
    windows = jnp.array([8, 64, 1, 16])
    the_plan = plan(Causal() & Window(windows), Tokens.sequence(64), block_q=8, block_k=8)
    attend = context_parallel(attention, mesh=MESH, strategy=strategy)
    found = counts(the_plan, attend)[1][0, ::16, :, 0]  # [devices, N]
    blocks = blocks_of(windows, Tokens.sequence(64), 8)
    if strategy == "ulysses":
        np.testing.assert_array_equal(found, np.broadcast_to(blocks, found.shape))
    else:
        np.testing.assert_array_equal(found.sum(axis=0), blocks)


@pytest.mark.parametrize("devices", [2, 4])
def test_heads_over_devices_skip_per_head(devices):
    """With four each has one head, and the plan's codes are still of all."""
    windows = jnp.array([8, 64, 1, 16])
    the_plan = plan(Causal() & Window(windows), Tokens.sequence(64), block_q=8, block_k=8)
    mesh = jax.make_mesh(
        (devices,), ("tensor",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    with jax.set_mesh(mesh):
        found = counts(the_plan, functools.partial(attention, sharding=P(None, None, "tensor")))
    for each in found:
        np.testing.assert_array_equal(each[0, 0, :, 0], blocks_of(windows, Tokens.sequence(64), 8))


def results(q, k, v, windows, bias, *, backend, **options):
    """Out, lse, and the gradients of q, k, v and the bias's floating leaves, under rows of their own."""
    seen = plan(Causal() & SameSegment() & Window(windows), *SHAPE.tokens(), block_q=16, block_k=8)

    def loss(q, k, v, bias):
        out, lse = attention(q, k, v, seen, bias=bias, backend=backend, return_lse=True, **options)
        waves = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
        return (out * waves).sum() + jnp.sin(jnp.where(jnp.isfinite(lse), lse, 0.0)).sum(), (out, lse)

    found = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True, allow_int=True)(q, k, v, bias)
    return [x for x in jax.tree.leaves(found) if x.dtype != jax.dtypes.float0]


def assert_close(actual, expected):
    tolerance = TOLERANCE[jnp.dtype("float32")]
    for a, b in zip(actual, expected, strict=True):
        # A leaf's gradient sums over all pairs, and so does its error.
        scale = max(1.0, float(np.abs(np.where(np.isfinite(b), b, 0)).max()))
        atol = max(tolerance["atol"] * scale, 1e-4 if np.ndim(b) < 3 else 0)
        np.testing.assert_allclose(a, b, rtol=tolerance["rtol"], atol=atol)


def _distance(q, k, slope, shift):
    return slope * (q.position - k.position - shift).astype(jnp.float32)


@pytest.mark.parametrize("backend", mostly(KERNELS, ["xla", "tpu"]))
def test_bias_and_dropout_of_each_head_go_with_it(backend):
    """Leaves of the bias for each head and for all; every head and row has draws of its own. One program."""
    q, k, v = SHAPE.qkv()
    bias = ALiBi.for_heads(HEADS) + BiasFunction(_distance, jnp.float32(0.02), jnp.int32(3))
    options = {"dropout": Dropout(0.3, jax.random.key(7)), "soft_cap": 3.0}
    run = jax.jit(functools.partial(results, **options), static_argnames="backend")
    for windows in (WINDOWS, WINDOWS[::-1], jnp.array([6] * HEADS)):
        found, expected = (run(q, k, v, windows, bias, backend=name) for name in (backend, "dense"))
        assert_close(found, expected)
    assert run._cache_size() == 2, "one for each backend"


@pytest.mark.parametrize("backend", mostly(KERNELS, ["gpu"]))
def test_under_vmap_over_windows_of_each_head(backend):
    q, k, v = Shape(batch=3).qkv()
    windows = jnp.array([[3, 40, 1, 7], [40, 2, 9, 5], [6, 6, 6, 6]])

    def loss(name, q, k, v, windows):
        seen = plan(Causal() & Window(windows), Tokens.sequence(40), block_q=16, block_k=8)
        return jnp.sin(attention(q[None], k[None], v[None], seen, backend=name)).sum()

    def run(name):
        return jax.jit(jax.vmap(jax.value_and_grad(functools.partial(loss, name), (0, 1, 2))))(
            q, k, v, windows
        )

    assert_close(jax.tree.leaves(run(backend)), jax.tree.leaves(run("dense")))


@pytest.mark.parametrize("backend", mostly(["xla", "xla_wide"], ["xla"]))  # the others have no float64
def test_float64(backend):
    with enable_x64(True):
        arrays = [x.astype(jnp.float64) for x in SHAPE.qkv()]
        found, expected = (results(*arrays, WINDOWS, None, backend=name) for name in (backend, "dense"))
    assert found[0].dtype == jnp.float64
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", mostly(["xla_wide", "tpu"], ["tpu"]))
def test_plans_of_two_grains(backend):
    """Those without block sizes: a head's narrow window shows few strips of its blocks."""
    q, k, v = Shape(queries=600, keys=600).qkv()
    mask = Causal() & Window(jnp.array([3, 600, 70, 9]))
    seen = plan(mask, Tokens.sequence(600))
    assert seen.fine is not None

    def loss(name, q, k, v):
        return jnp.sin(attention(q, k, v, seen, backend=name)).sum()

    found, expected = (
        jax.jit(jax.grad(functools.partial(loss, name), (0, 1, 2)))(q, k, v) for name in (backend, "dense")
    )
    assert_close(found, expected)


@pytest.mark.parametrize("backend", mostly(["xla", "xla_wide"], ["xla_wide"]))
def test_a_ring_whose_shards_are_single_blocks_has_both_grains(backend):
    seen = plan(Causal() & Window(jnp.array([4, 1024])), Tokens.sequence(1024))
    assert seen.fine is not None
    q, k, v = Shape(1, 1024, 1024, 2, 2, 4).qkv()
    mesh = jax.make_mesh((2,), ("context",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def gradients(attend):
        return jax.jit(jax.grad(lambda q: jnp.sin(attend(q, k, v, seen)).sum()))(q)

    on_ring = context_parallel(functools.partial(attention, backend=backend), mesh=mesh)
    expected = gradients(functools.partial(attention, backend="dense"))
    np.testing.assert_allclose(gradients(on_ring), expected, rtol=2e-5, atol=2e-5)


def test_long_plans_that_are_narrowed_by_heads_keep_their_small_blocks():
    """Those of the plan are sized for one reading of the mask, and each head's reading takes the same."""
    narrowed = plan(Causal(), Tokens.sequence(131_072)) & Window(jnp.full(4, 100))
    q, k = (jax.ShapeDtypeStruct((1, 131_072, heads, 8), jnp.float32) for heads in (4, 2))
    out = jax.eval_shape(lambda q, k, v: attention(q, k, v, narrowed, backend="xla_wide"), q, k, k)
    assert out.shape == q.shape


def test_a_mask_that_all_heads_share_is_computed_at_once():
    calls = []

    def forward(scores, q, k, v, plan):
        calls.append((q.shape[2], head_count(plan.mask)))
        return _count(scores, q, k, v, plan)

    backend = by_key_head(Backend(forward, _count_backward))
    q, k = jnp.ones((1, 16, HEADS, 2)), jnp.ones((1, 16, 2, 2))
    for mask in (Causal(), Causal() & Window(WINDOWS)):
        attention(q, k, k, mask, backend=backend)
    assert calls == [(4, None), (2, 2)]
