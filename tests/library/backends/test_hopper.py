"""The kernels of a Hopper's warpgroups, interpreted against the oracle with every access checked for races.

The interpreter simulates warpgroups, barriers and copies; it came with JAX 0.11.2 (Python 3.12).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MASKS, TOLERANCE, UNREADABLE, Shape
from slow import mostly

from dynmask_jax import (
    ALiBi,
    BiasFunction,
    Causal,
    Dropout,
    Predicate,
    Sinks,
    Tokens,
    Unsupported,
    Window,
    attention,
    plan,
)
from dynmask_jax.backends import gpu_choice, gpu_options, mosaic
from dynmask_jax.backends.gpu import Grain, Grains, Warpgroups, gpu_backend
from dynmask_jax.scores import Scores

pytestmark = pytest.mark.filterwarnings(f"ignore:.*{UNREADABLE}")
interpreter = pytest.mark.skipif(mosaic.missing() is not None, reason=f"needs {mosaic.missing()}")
ALL = Grains(Warpgroups(128, 64, 2), Warpgroups(128, 64, 2), Warpgroups(128, 64, 2), busy=1)
SHAPE = Shape(batch=1, queries=256, keys=320, heads=4, kv_heads=2, head_dim=64, block_q=128, block_k=64)
RAGGED = Shape(batch=2, queries=150, keys=170, heads=4, kv_heads=2, head_dim=64, block_q=120, block_k=70)


def results(arrays, seen, backend, **options):
    """Out, lse, and the gradients of q, k and v."""

    def loss(q, k, v):
        out, lse = attention(q, k, v, seen, backend=backend, return_lse=True, **options)
        weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return (out.astype(jnp.float32) * weights).sum() + jnp.where(jnp.isinf(lse), 0.0, lse).sum(), (
            out,
            lse,
        )

    gradients, outputs = jax.grad(loss, (0, 1, 2), has_aux=True)(*arrays)
    return *outputs, *gradients


def check(arrays, seen, grains=ALL, **options):
    """As the oracle, by the tolerance of the arrays' dtype; a gradient's is of its greatest entry."""
    found = results(arrays, seen, gpu_backend(grains), **options)
    expected = results([x.astype(jnp.float32) for x in arrays], seen, "dense", **options)
    tolerance = TOLERANCE[arrays[0].dtype]
    for a, b in zip(found, expected, strict=True):
        size = max(1.0, float(jnp.abs(jnp.where(jnp.isfinite(b), b, 0.0)).max()))
        a = np.asarray(a, np.float32)
        np.testing.assert_allclose(a, b, rtol=tolerance["rtol"], atol=tolerance["atol"] * size)


@interpreter
@pytest.mark.parametrize("name", mostly(MASKS, ["per_head_window", "random_chunks", "nothing"]))
def test_masks(name):
    seen = plan(MASKS[name], *SHAPE.tokens(), block_q=SHAPE.block_q, block_k=SHAPE.block_k)
    check(SHAPE.qkv(jnp.bfloat16), seen)


@interpreter
@pytest.mark.parametrize(
    ("shape", "dtype"), mostly([(SHAPE, jnp.float16), (RAGGED, jnp.bfloat16)], [(RAGGED, jnp.bfloat16)])
)
def test_blocks_that_are_filled_up(shape, dtype):
    """And two sequences with segments of their own."""
    seen = plan(MASKS["same_segment"], *shape.tokens(), block_q=shape.block_q, block_k=shape.block_k)
    check(shape.qkv(dtype), seen)


OPTIONS = {
    "soft_cap": {"soft_cap": 2.0},
    "dropout": {"dropout": Dropout(0.3, jax.random.key(1))},
    "bias": {"bias": ALiBi(jnp.asarray([0.5, 0.25, 0.1, 0.05]))},
    "sinks": {"sinks": jnp.asarray([0.5, -1.0, 2.0, 0.0])},
    "literals": {"bias": BiasFunction(lambda q, k: jnp.where(q.segment == k.segment, 0.5, 0.0))},
}


@interpreter
@pytest.mark.parametrize("name", mostly(OPTIONS, ["dropout", "bias"]))
def test_options(name):
    seen = plan(Causal() & Window(100), *SHAPE.tokens(), block_q=SHAPE.block_q, block_k=SHAPE.block_k)
    check(SHAPE.qkv(jnp.bfloat16), seen, **OPTIONS[name])


@interpreter
def test_gradients_of_a_bias_are_triton_s():
    seen = plan(Causal(), *SHAPE.tokens(), block_q=SHAPE.block_q, block_k=SHAPE.block_k)
    q, k, v = SHAPE.qkv(jnp.bfloat16)

    def loss(slopes, backend):
        out = attention(q, k, v, seen, bias=ALiBi(slopes), backend=backend).astype(jnp.float32)
        return (out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)).sum()

    slopes = jnp.asarray([0.5, 0.25, 0.1, 0.05])
    found, expected = (jax.grad(loss)(slopes, each) for each in (gpu_backend(ALL), "gpu"))
    np.testing.assert_allclose(found, expected, rtol=0.01)


@interpreter
def test_one_warpgroup_and_values_of_another_width():
    seen = plan(Causal() & Window(70), *SHAPE.tokens(), block_q=SHAPE.block_q, block_k=SHAPE.block_k)
    q, k, v = SHAPE.qkv(jnp.bfloat16)
    grains = Grains(Warpgroups(64, 64, 3), Warpgroups(64, 64, 2), ALL.dkv, busy=1)
    check((q, k, jnp.concatenate([v, v * 0.5], axis=-1)), seen, grains)


@interpreter
def test_long_lines_are_cut_into_chunks():
    """One key that all see makes a long line of keys; two queries that see all, of queries."""
    mask = Causal() & (Window(30) | Sinks(3)) | Predicate(lambda q, k: q.position == 7)
    seen = plan(mask, *SHAPE.tokens(), block_q=SHAPE.block_q, block_k=SHAPE.block_k)
    check(SHAPE.qkv(jnp.bfloat16), seen, Grains(ALL.forward, ALL.dq, ALL.dkv, busy=16))


@interpreter
def test_keys_that_are_not_finite():
    """NaN where a query sees one, and nowhere else."""
    q, k, v = SHAPE.qkv(jnp.bfloat16)
    seen = plan(Causal() & Window(40), *SHAPE.tokens(), block_q=SHAPE.block_q, block_k=SHAPE.block_k)
    found, expected = (
        attention(q, k.at[0, 33, 0, 5].set(jnp.inf), v, seen, backend=each)
        for each in (gpu_backend(ALL), "dense")
    )
    assert np.isnan(expected).any()
    assert not np.isnan(expected).all()
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))


@interpreter
def test_under_vmap():
    q, k, v = (x[:, None] for x in Shape(2, 128, 128, 2, 1, 64, 128, 64).qkv(jnp.bfloat16))
    seen = plan(Causal(), Tokens.sequence(128), block_q=128, block_k=64)
    found, expected = (
        jax.vmap(lambda *x, each=each: attention(*x, seen, backend=each))(q, k, v)
        for each in (gpu_backend(ALL), "dense")
    )
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (found, expected)), atol=0.02)


SEEN = plan(Causal(), Tokens.sequence(256), block_q=128, block_k=128)
KIND = 64, 64, jnp.bfloat16


def on(monkeypatch, capability: float, missing: str | None = None):
    monkeypatch.setattr(gpu_choice, "compute_capability", lambda: capability)
    monkeypatch.setattr(gpu_options, "compute_capability", lambda: capability)
    monkeypatch.setattr(mosaic, "missing", lambda: missing)


PLAIN = Scores(bias=None, dropout=None, scale=0.1, soft_cap=None)


def chosen(kind=KIND, seen=SEEN, soft_cap=None):
    return gpu_choice.hopper_grains(None, dataclasses.replace(PLAIN, soft_cap=soft_cap), seen, kind)


def test_a_hopper_gets_them_where_they_can(monkeypatch):
    on(monkeypatch, 9.0)
    assert chosen().forward == gpu_options.WARPGROUPS[64][0]
    wide = chosen((256, 256, jnp.bfloat16))
    assert [type(each) for each in (wide.forward, wide.dq, wide.dkv)] == [Warpgroups, Grain, Grain]
    assert isinstance(chosen((128, 128, jnp.bfloat16), soft_cap=1.0).dkv, Grain)
    assert isinstance(chosen((128, 128, jnp.bfloat16)).dkv, Warpgroups)


@pytest.mark.parametrize(
    ("kind", "mask", "blocks"),
    [
        ((64, 64, jnp.float32), Causal(), 128),
        ((32, 64, jnp.bfloat16), Causal(), 128),
        (KIND, Causal(), 32),
        (KIND, Predicate(lambda q, k: jnp.sqrt(q.position.astype(float)) > 2), 128),
    ],
)
def test_where_they_cannot_the_others_compute(monkeypatch, kind, mask, blocks):
    on(monkeypatch, 9.0)
    seen = plan(Causal(), Tokens.sequence(256), block_q=blocks, block_k=blocks)
    seen = dataclasses.replace(seen, mask=mask)
    assert chosen(kind, seen) is None
    assert gpu_choice.grains_of(None, PLAIN, seen, kind) == gpu_options.default_grains(64, kind[2])
    with pytest.raises(Unsupported, match=r"backend 'gpu': forward=Warpgroups.* needs .*, got "):
        gpu_choice.grains_of(ALL, PLAIN, seen, kind)


@pytest.mark.parametrize(("capability", "missing"), [(8.0, None), (10.0, None), (9.0, "JAX 0.11.2 or newer")])
def test_other_cards_and_older_jax_have_none(monkeypatch, capability, missing):
    on(monkeypatch, capability, missing)
    assert chosen() is None


@interpreter
def test_a_program_traced_beside_a_hopper_runs_elsewhere_too(monkeypatch):
    on(monkeypatch, 9.0)
    monkeypatch.setattr(mosaic, "interpreted", lambda: False)
    q, k, v = Shape(1, 128, 128, 2, 1, 64).qkv(jnp.bfloat16)
    assert chosen() is not None
    found, expected = (attention(q, k, v, Causal(), backend=each) for each in ("gpu", "dense"))
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (found, expected)), atol=0.02)


@pytest.mark.parametrize(
    ("name", "grain", "kind"),
    [
        ("forward", Warpgroups(128, 128, 2), (256, 256, jnp.bfloat16)),
        ("forward", Warpgroups(128, 64, 9), (128, 128, jnp.bfloat16)),
        ("forward", Warpgroups(128, 512, 2), (64, 64, jnp.bfloat16)),
        ("dkv", Warpgroups(128, 64, 2), (256, 256, jnp.bfloat16)),
    ],
)
def test_tiles_that_do_not_fit_a_card(monkeypatch, name, grain, kind):
    on(monkeypatch, 9.0)
    seen = plan(Causal(), Tokens.sequence(1024), block_q=512, block_k=512)
    others = Grains(*[Grain(64, 32, 4, 1)] * 3)
    with pytest.raises(Unsupported, match=f"{name}=Warpgroups.* needs 227 KiB of shared memory or less, got"):
        gpu_choice.grains_of(dataclasses.replace(others, **{name: grain}), PLAIN, seen, kind)
    fits = dataclasses.replace(others, forward=Warpgroups(128, 256, 2))
    gpu_choice.grains_of(fits, PLAIN, seen, KIND)


@pytest.mark.parametrize(
    "head_dims", [(64, 64), (80, 80), (128, 64), (64, 128), (192, 128), (64, 256), (256, 256)]
)
def test_tiles_of_the_table_fit_a_card(monkeypatch, head_dims):
    on(monkeypatch, 9.0)
    kind = (*head_dims, jnp.bfloat16)
    assert gpu_choice.grains_of(chosen(kind), PLAIN, SEEN, kind) == chosen(kind)


def test_what_is_missing_is_said(monkeypatch):
    on(monkeypatch, 9.0, "JAX 0.11.2 or newer (this is 0.10.2)")
    q = jnp.ones((1, 128, 1, 64), jnp.bfloat16)
    with pytest.raises(
        Unsupported, match=r"forward=Warpgroups.* needs JAX 0\.11\.2 or newer .*a Grain takes"
    ):
        attention(q, q, q, Causal(), backend=gpu_backend(ALL))


def test_warpgroups_ask_for_no_more_registers_than_there_are():
    """Of 168 a thread, at which three of them begin: more, and a card would wait for ever."""
    assert 2 * mosaic._REGISTERS[2] + mosaic._LEAST_REGISTERS == 3 * 168


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ((96, 64, 2), "line must be 64 or 128, got 96"),
        ((64, 48, 2), "column must be a power of two and at least 64, got 48"),
        ((64, 64, 1), "stages must be at least 2, got 1"),
    ],
)
def test_tiles_that_cannot_be(numbers, words):
    with pytest.raises(ValueError, match=f"Warpgroups: {words}"):
        Warpgroups(*numbers)
