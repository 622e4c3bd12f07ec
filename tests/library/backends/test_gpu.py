"""What the GPU backend is made of: lists of blocks, tiles within blocks, and what it refuses."""

import pickle
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MASKS, SHAPES, Shape, enable_x64
from hypothesis import given, settings
from hypothesis import strategies as st
from slow import examples, mostly

from dynmask_jax import (
    BiasFunction,
    Causal,
    Dropout,
    Predicate,
    SameSegment,
    Tokens,
    Unsupported,
    Window,
    attention,
    default_backend,
    plan,
    platforms,
)
from dynmask_jax.backends import gpu, gpu_options
from dynmask_jax.backends.gpu import Grain, Grains, gpu_backend
from dynmask_jax.backends.gpu_lists import WIDTH, lists_of
from dynmask_jax.block_codes import FULL, SKIP, TEST


@settings(max_examples=examples(10, thorough=200))
@given(
    seed=st.integers(0, 2**31), rows=st.integers(1, 2), lines=st.integers(1, 4), columns=st.integers(1, 40)
)
def test_lists_hold_what_is_active_in_order(seed, rows, lines, columns):
    codes = np.random.default_rng(seed).integers(0, 3, (rows, lines, columns)).astype(np.int8)
    found = jax.tree.map(np.asarray, lists_of(jnp.asarray(codes)))
    for row in range(rows):
        for line in range(lines):
            code, listed = codes[row, line], found.columns[row, line]
            full, test = found.full[row, line], found.test[row, line]
            np.testing.assert_array_equal(listed[:full], np.flatnonzero(code == FULL))
            np.testing.assert_array_equal(listed[:columns][::-1][:test], np.flatnonzero(code == TEST))
        length = (codes[row] != SKIP).sum(axis=1)
        assert (np.diff(length[found.order[row]]) <= 0).all(), "the longest line first"
        assert sorted(found.order[row]) == list(range(lines))


def test_lists_of_more_columns_than_one_step_takes():
    codes = np.random.default_rng(0).integers(0, 3, (1, 2, 2 * WIDTH + 5)).astype(np.int8)
    found = lists_of(jnp.asarray(codes))
    for line in range(2):
        full, test = int(found.full[0, line]), int(found.test[0, line])
        listed = np.asarray(found.columns[0, line])
        np.testing.assert_array_equal(listed[:full], np.flatnonzero(codes[0, line] == FULL))
        backwards = listed[: codes.shape[2]][::-1][:test]
        np.testing.assert_array_equal(backwards, np.flatnonzero(codes[0, line] == TEST))


TILES = [(*tile, busy) for tile in ((16, 16), (16, 32), (32, 16), (128, 128)) for busy in (1, 256)]


@pytest.mark.parametrize(("line", "column", "busy"), mostly(TILES, [(16, 32, 256), (128, 128, 1)]))
def test_tiles_smaller_and_greater_than_blocks(line, column, busy):
    """Blocks of 64 and 50 in tiles: several to a block, or one that is a block's; lines cut, and whole."""
    shape = Shape(queries=150, keys=170, block_q=64, block_k=50)
    q, k, v = shape.qkv()
    seen = plan(Causal() & Window(40) & SameSegment(), *shape.tokens(), block_q=64, block_k=50)
    backend = gpu_backend(Grains(*[Grain(line, column, 4, 1)] * 3, busy=busy))

    def loss(q, k, v, backend):
        return jnp.sin(attention(q, k, v, seen, backend=backend)).sum()

    found, expected = (
        jax.jit(jax.value_and_grad(loss, (0, 1, 2)), static_argnums=3)(q, k, v, each)
        for each in (backend, "dense")
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("queries", mostly([1, 40], [1]))
def test_few_queries_and_many_keys(queries):
    """And a query that sees nothing, a key that is not finite, and one that nobody may see."""
    shape = Shape(batch=1, queries=queries, keys=700, block_q=32, block_k=16)
    q, k, v = shape.qkv()
    q_tokens = Tokens(jnp.arange(queries) + 700 - queries, jnp.arange(queries) % 3)
    seen = plan(
        Causal() & SameSegment(), q_tokens, Tokens(jnp.arange(700), jnp.arange(700) // 3 % 3), block_k=16
    )
    v = v.at[0, 12].set(jnp.nan)
    for dropout in (None, Dropout(0.3, jax.random.key(0))):
        found, expected = (
            attention(q, k, v, seen, backend=name, return_lse=True, dropout=dropout)
            for name in ("gpu", "dense")
        )
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=4e-6)


@pytest.mark.slow  # `test_attention` has it of every backend
def test_results_are_the_same_bit_for_bit():
    q, k, v = SHAPES["ragged"].qkv()
    the_plan = plan(MASKS["same_segment"], *SHAPES["ragged"].tokens(), block_q=16, block_k=8)
    program = jax.jit(jax.grad(lambda *x: attention(*x, the_plan, backend="gpu").sum(), (0, 1, 2)))
    for a, b in zip(program(q, k, v), program(q, k, v), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "words"),
    [
        (jnp.float64, 8, "float32, bfloat16 and float16, got float64"),
        (jnp.bfloat16, 257, "up to 256, got 257"),
    ],
)
def test_what_a_card_cannot_is_refused_with_the_remedy(dtype, head_dim, words, request):
    if dtype == jnp.float64:
        request.getfixturevalue("x64")
    q = jnp.ones((1, 4, 1, head_dim), dtype)
    with pytest.raises(Unsupported, match=f"backend 'gpu' .*{words}.*'xla_wide'"):
        attention(q, q, q, Causal(), backend="gpu")


@pytest.fixture
def x64():
    with enable_x64(True):
        yield


def test_float32_where_numbers_have_64_bits(x64):
    q, k, v = SHAPES["even"].qkv(jnp.float32)
    found, expected = (
        jax.grad(lambda *x, name=name: attention(*x, Causal(), backend=name).sum(), (0, 1, 2))(q, k, v)
        for name in ("gpu", "dense")
    )
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=4e-6)


def test_what_triton_has_no_operation_for_is_refused():
    q = jnp.ones((1, 8, 1, 8))
    rounded = BiasFunction(lambda q, k: jnp.round((q.position - k.position).astype(jnp.float32)))
    with pytest.raises(
        Unsupported, match=r"backend 'gpu': .*uses round, which a kernel cannot; take .*xla_wide"
    ):
        attention(q, q, q, Causal(), bias=rounded, backend="gpu")
    looked_up = BiasFunction(
        lambda q, k: jax.lax.cond(
            True, lambda: jnp.arange(8.0)[q.position], lambda: jnp.zeros(q.position.shape)
        )
    )
    with pytest.raises(Unsupported, match=r"BiasFunction"):
        attention(q, q, q, Causal(), bias=looked_up, backend="gpu")


@jax.custom_vjp
def _doubled(x):
    return 2 * x


_doubled.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))


def test_expressions_of_literals_and_functions_with_rules_of_their_own(monkeypatch):
    """Where JAX_PLATFORMS=cuda there is no CPU to compute literals on."""
    devices = jax.local_devices

    def local_devices(*args, backend=None, **options):
        if backend == "cpu":
            raise RuntimeError("Unknown backend cpu")
        return devices(*args, backend=backend, **options)

    monkeypatch.setattr(jax, "local_devices", local_devices)
    q, k, v = SHAPES["even"].qkv()
    mask = Predicate(lambda q, k: (q.position - k.position) % 7 < 3)
    bias = BiasFunction(lambda q, k: _doubled(jnp.where(q.position % 2 == 1, 0.5, 0.0)))
    found, expected = (attention(q, k, v, mask, bias=bias, backend=name) for name in ("gpu", "dense"))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=4e-6)


def test_backends_of_equal_tiles_are_equal():
    tiles = Grains(*[Grain(16, 16, 4, 1)] * 3)
    assert gpu_backend(tiles) == gpu_backend(grains=tiles) == pickle.loads(pickle.dumps(gpu_backend(tiles)))
    assert gpu_backend() == gpu_backend(None) == gpu.GPU != gpu_backend(tiles)
    assert hash(gpu_backend(tiles)) == hash(gpu_backend(tiles))


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: Grain(48, 64, 4, 1), ValueError, "line must be a power of two and at least 16, got 48"),
        (lambda: Grain(64, 8, 4, 1), ValueError, "column must be a power of two and at least 16, got 8"),
        (lambda: Grain(64, 64, 3, 1), ValueError, "warps must be a power of two and at least 1, got 3"),
        (lambda: Grain(64, 64, 4, 0), ValueError, "stages must be at least 1, got 0"),
        (lambda: Grains(*[(64, 64, 4, 1)] * 3), TypeError, "forward must be a Grain"),
        (lambda: Grains(*[Grain(64, 64, 4, 1)] * 3, busy=0), ValueError, "busy must be at least 1, got 0"),
    ],
)
def test_tiles_that_cannot_be_are_refused(build, error, words):
    with pytest.raises(error, match=words):
        build()


@pytest.mark.parametrize(
    ("told", "capability", "backend"),
    [
        ("8.9", 8.9, "gpu"),
        ("12.1", 12.1, "gpu"),
        ("7.5", 7.5, "xla_wide"),
        ("gfx90a:sramecc+:xnack-", None, "xla_wide"),
        (None, None, "xla_wide"),
    ],
)
def test_a_card_says_what_it_is(monkeypatch, told, capability, backend):
    card = SimpleNamespace(platform="gpu", **({} if told is None else {"compute_capability": told}))
    monkeypatch.setattr(platforms, "_default_device", lambda: card)
    assert platforms.compute_capability() == capability
    assert default_backend() == backend


@pytest.mark.parametrize(("capability", "backend"), [(7.5, "xla_wide"), (8.0, "gpu"), (9.0, "gpu")])
def test_cards_from_before_ampere_keep_the_loop(monkeypatch, capability, backend):
    monkeypatch.setattr(platforms, "present_platform", lambda: "gpu")
    monkeypatch.setattr(platforms, "compute_capability", lambda: capability)
    monkeypatch.setattr(gpu, "compute_capability", lambda: capability)
    assert default_backend() == backend
    q = jnp.ones((1, 6, 1, 8)) + capability  # nothing is compiled for it yet
    if backend == "gpu":
        assert attention(q, q, q, Causal() & Window(int(capability)), backend="gpu").shape == q.shape
        return
    with pytest.raises(Unsupported, match=r"from Ampere on \(compute capability 8\.0\), got one of 7\.5"):
        attention(q, q, q, Causal(), backend="gpu")


@pytest.mark.parametrize(
    ("capability", "dtype", "table"),
    [
        (None, jnp.bfloat16, gpu_options.HOPPER),
        (9.0, jnp.float16, gpu_options.HOPPER),
        (10.0, jnp.bfloat16, gpu_options.HOPPER),
        (12.0, jnp.bfloat16, gpu_options.AMPERE),
        (8.9, jnp.bfloat16, gpu_options.AMPERE),
        (8.0, jnp.float32, gpu_options.FLOAT32),
    ],
)
def test_the_table_of_tiles_goes_by_card_head_dim_and_dtype(monkeypatch, capability, dtype, table):
    monkeypatch.setattr(gpu_options, "compute_capability", lambda: capability)
    least = 32 if table is gpu_options.FLOAT32 else 64
    for head_dim, row in ((16, least), (64, 64), (80, 128), (128, 128), (192, 256), (256, 256)):
        assert gpu_options.default_grains(head_dim, dtype) == table[row]
