"""Bias, dropout, and values of another width: values and gradients on every backend, against the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import HEADS, MASKS, SHAPES, TOLERANCE, Shape, enable_x64
from slow import mostly

from dynmask_jax import (
    ALiBi,
    BiasFunction,
    Causal,
    Dropout,
    Everything,
    RelativeBuckets,
    SameSegment,
    Tokens,
    Unsupported,
    attention,
    bias_tensor,
    context_parallel,
    dropout_mask,
    lay_out,
    layout_order,
    plan,
    restore,
)

FLOAT32 = TOLERANCE[jnp.dtype("float32")]
KEY = jax.random.key(7)
KERNELS = "tpu", "gpu"
LOOPS = "xla", "xla_wide", *KERNELS


def waves(q, k, frequency, shift):
    return jnp.sin(frequency * (q.position - k.position - shift).astype(jnp.float32))


def direction(q, k, a, b):
    """Its numbers are a vector to it: each gradient is of both."""
    a, b = jnp.stack([a, b]) / jnp.linalg.norm(jnp.stack([a, b]))
    distance = (q.position - k.position).astype(jnp.float32)
    return a * jnp.sin(distance) + b * jnp.cos(distance)


def steep(q, k, slope):
    """Far above what an exponential holds, most of all where a block of queries is filled up."""
    return slope * (q.position - k.position + 10).astype(jnp.float32)


def table(heads: int, buckets: int):
    return jax.random.normal(jax.random.key(3), (heads, buckets))


BIASES = {
    "alibi": ALiBi.for_heads(HEADS),
    "t5": RelativeBuckets(table(HEADS, 8), max_distance=20),
    "function": BiasFunction(waves, 0.3, jnp.int32(3)),
    "direction": BiasFunction(direction, jnp.float32(3.0), jnp.float32(-4.0)),
    "steep": BiasFunction(steep, jnp.float32(2.5)),
    "sum": ALiBi(jnp.float32(0.1)) + RelativeBuckets(table(1, 6), bidirectional=False, max_distance=20),
}


TABLES = "t5", "sum"
BEYOND = {"tpu": TABLES, "gpu": (*TABLES, "direction")}
"""kernel -> the biases that it cannot compute: of tables, and in Triton of vectors, which it cannot slice."""


def arguments(shape: Shape, width: int | None = None):
    q, k, v = shape.qkv()
    if width is not None:
        v = jax.random.normal(jax.random.key(9), (*v.shape[:3], width))
    return q, k, v, plan(MASKS["same_segment"], *shape.tokens(), block_q=shape.block_q, block_k=shape.block_k)


def results(call, q, k, v, the_plan, bias=None, **options):
    """Out, lse, and the gradients of q, k, v and the bias's floating leaves, of a loss that reads both."""

    @jax.jit
    def loss(q, k, v, bias):
        out, lse = call(q, k, v, the_plan, bias=bias, return_lse=True, **options)
        waves = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        seen = jnp.where(jnp.isfinite(lse), lse, 0.0)
        return (out * waves).sum() + jnp.sin(seen).sum(), (out, lse)

    found = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True, allow_int=True)(q, k, v, bias)
    return [x for x in jax.tree.leaves(found) if x.dtype != jax.dtypes.float0]


def assert_close(actual: list, expected: list):
    assert len(actual) == len(expected)
    for x, y in zip(actual, expected, strict=True):
        # A leaf's gradient sums over all pairs, and so does its error.
        atol = FLOAT32["atol"] * max(1.0, float(jnp.abs(jnp.where(jnp.isfinite(y), y, 0)).max()))
        np.testing.assert_allclose(x, y, rtol=FLOAT32["rtol"], atol=max(atol, 1e-4 if x.ndim < 3 else 0))


CALLS = [(bias, backend) for bias in BIASES for backend in LOOPS]
REFUSED = [(bias, backend) for backend, biases in BEYOND.items() for bias in biases]
BY_DEFAULT = [
    *[("t5", "xla"), ("function", "xla"), ("sum", "xla_wide")],
    *[("direction", "tpu"), ("steep", "tpu"), ("alibi", "gpu")],
    *REFUSED,
]


@pytest.mark.parametrize("shape", mostly(["ragged", "one_kv_head", "one_query"], ["ragged"]))
@pytest.mark.parametrize(("bias", "backend"), mostly(CALLS, BY_DEFAULT))
def test_a_bias_and_dropout_with_values_of_another_width(backend, shape, bias):
    q, k, v, the_plan = arguments(SHAPES[shape], width=5)
    how = {"bias": BIASES[bias], "dropout": Dropout(0.3, KEY), "soft_cap": 3.0}
    if (bias, backend) in REFUSED:
        words = (
            r"(has a table, which a kernel cannot read|uses slice, which a kernel cannot); take backend 'xla"
        )
        with pytest.raises(Unsupported, match=words):
            attention(q, k, v, the_plan, backend=backend, **how)
        return
    expected = results(attention, q, k, v, the_plan, backend="dense", **how)
    assert_close(results(attention, q, k, v, the_plan, backend=backend, **how), expected)


@pytest.mark.parametrize("backend", mostly(["dense", *LOOPS], ["dense"]))
def test_a_bias_is_what_an_array_of_it_would_be(backend):
    q, k, v, the_plan = arguments(SHAPES["even"])

    @jax.jit
    def plain(bias):
        array = bias_tensor(bias, the_plan.q_tokens, the_plan.kv_tokens, heads=HEADS)
        mask = SameSegment() & Causal()
        logits = jnp.einsum("btkgh,bskh->bkgts", q.reshape(*q.shape[:2], 2, 2, -1), k) / np.sqrt(8)
        logits = logits.reshape(2, HEADS, *logits.shape[3:]) + array
        visible = mask.visible(the_plan.q_tokens[:, :, None], the_plan.kv_tokens[:, None, :])[:, None]
        weights = jnp.where(visible, jnp.exp(logits), 0.0)
        weights /= jnp.where(weights.sum(-1, keepdims=True) == 0, 1.0, weights.sum(-1, keepdims=True))
        return jnp.einsum("bnts,bsnh->btnh", weights, jnp.repeat(v, 2, axis=2))

    for bias in (BIASES[name] for name in BIASES if (name, backend) not in REFUSED):
        actual = attention(q, k, v, the_plan, bias=bias, backend=backend)
        np.testing.assert_allclose(actual, plain(bias), **FLOAT32)


@pytest.mark.parametrize("backend", mostly(["dense", *LOOPS], ["xla"]))
def test_gradients_of_tables_and_slopes_are_finite_differences(backend):
    q, k, v, the_plan = arguments(SHAPES["one_kv_head"])
    bias = BIASES["alibi"] if backend in KERNELS else BIASES["alibi"] + BIASES["t5"]

    @jax.jit
    def loss(bias):
        out = attention(q, k, v, the_plan, bias=bias, dropout=Dropout(0.2, KEY), backend=backend)
        return (out**2).sum()

    leaves, structure = jax.tree.flatten(bias)
    gradients = jax.tree.leaves(jax.grad(loss)(bias))
    for place, gradient in enumerate(gradients):
        direction = jax.random.normal(jax.random.key(4), gradient.shape)

        def moved(step, place=place, direction=direction):
            numbers = leaves[place] + step * direction
            return loss(jax.tree.unflatten(structure, [*leaves[:place], numbers, *leaves[place + 1 :]]))

        difference = (moved(1e-2) - moved(-1e-2)) / 2e-2
        np.testing.assert_allclose(difference, (gradient * direction).sum(), rtol=2e-2)


def test_slopes_are_the_papers():
    np.testing.assert_allclose(ALiBi.for_heads(8).slopes, 0.5 ** np.arange(1, 9))
    twelve = ALiBi.for_heads(12).slopes
    np.testing.assert_allclose(twelve[:8], 0.5 ** np.arange(1, 9))
    np.testing.assert_allclose(twelve[8:], 0.5 ** (np.arange(1, 8, 2) / 2))


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_are_those_of_t5(bidirectional):
    tokens = Tokens.sequence(300)
    bias = RelativeBuckets(
        jnp.arange(32, dtype=jnp.float32)[None], bidirectional=bidirectional, max_distance=128
    )
    found = bias_tensor(bias, tokens, heads=1)[0]
    after = np.arange(300)[None, :] - np.arange(300)[:, None]
    buckets, expected = 32, np.zeros_like(after)
    if bidirectional:
        buckets = 16
        expected += np.where(after > 0, 16, 0)
    distance = abs(after) if bidirectional else np.maximum(-after, 0)
    exact = buckets // 2
    with np.errstate(divide="ignore"):
        steps = np.log(distance / exact) / np.log(128 / exact) * (buckets - exact)
    # In exact arithmetic, with a hair's breadth for the bound itself.
    far = np.minimum(exact + np.floor(np.maximum(steps, 0) + 1e-9), buckets - 1)
    np.testing.assert_array_equal(found, expected + np.where(distance < exact, distance, far))


def drawn(call, dropout, the_plan, batch: int = 2, heads: int = HEADS, **options):
    """What attention keeps of each weight: its output for equal logits and values that name their key."""
    t, s = the_plan.lengths
    q, k = jnp.zeros((batch, t, heads, 4)), jnp.zeros((batch, s, 2, 4))
    v = jnp.broadcast_to(jnp.eye(s)[None, :, None, :], (batch, s, 2, s))
    return call(q, k, v, the_plan, dropout=dropout, **options).swapaxes(1, 2) > 0


GRAINS = (64, 64), (128, 128), (512, 512), (100, 52)
"""Of 600 queries and keys: none of them divides it."""


@pytest.mark.parametrize("rate", mostly([0.0, 0.1, 0.5], [0.5]))
@pytest.mark.parametrize(("block_q", "block_k"), mostly(GRAINS, [(512, 512)]))
@pytest.mark.parametrize("backend", mostly(LOOPS, ["xla_wide", "tpu"]))
def test_any_rate_in_blocks_of_any_size_has_the_gradients_of_dense(backend, block_q, block_k, rate):
    shape = Shape(batch=1, queries=600, keys=600, block_q=block_q, block_k=block_k)
    q, k, v, the_plan = arguments(shape)
    dropout = Dropout(rate, KEY)
    expected = results(attention, q, k, v, the_plan, backend="dense", dropout=dropout)
    assert_close(results(attention, q, k, v, the_plan, backend=backend, dropout=dropout), expected)


@pytest.mark.parametrize("backend", mostly(LOOPS, ["xla", "gpu"]))
def test_gradients_of_sixteen_bits_under_dropout(backend):
    """Their scale is a float32, which nothing may be promoted by."""
    shape = SHAPES["even"]
    q, k, v, the_plan = arguments(shape)
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    found, expected = (
        jax.grad(lambda v, each=each: attention(q, k, v, the_plan, **each, dropout=Dropout(0.5, KEY)).sum())(
            v
        )
        for each in ({"backend": backend}, {"backend": "dense"})
    )
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (found, expected)), rtol=0.02, atol=0.02)


DOCUMENTS = jax.tree.map(lambda *rows: jnp.stack(rows), Tokens.packed([40, 24]), Tokens.packed([10, 54]))


BLOCKS = (64, 64), (16, 8), (128, 512), (13, 27)
DRAWS = [
    (backend, broadcast, *blocks)
    for backend in ("dense", *LOOPS)
    for broadcast in (False, True)
    for blocks in BLOCKS
]
DRAWS_BY_DEFAULT = [
    ("dense", False, 64, 64),
    ("xla", True, 16, 8),
    ("xla_wide", False, 13, 27),
    ("tpu", False, 13, 27),
    ("tpu", False, 128, 512),
    ("gpu", False, 16, 8),
]


@pytest.mark.parametrize(("backend", "broadcast", "block_q", "block_k"), mostly(DRAWS, DRAWS_BY_DEFAULT))
def test_every_backend_and_block_size_draws_the_same(backend, broadcast, block_q, block_k):
    dropout = Dropout(0.5, KEY, broadcast)
    expected = np.asarray(dropout_mask(dropout, DOCUMENTS, batch=2, heads=HEADS))
    assert 0.4 < expected.mean() < 0.6
    assert (expected == expected[:, :1]).all() == broadcast
    the_plan = plan(Everything(), DOCUMENTS, block_q=block_q, block_k=block_k)
    np.testing.assert_array_equal(drawn(attention, dropout, the_plan, backend=backend), expected)


def mesh_of(**axes: int):
    auto = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=auto)


@pytest.mark.parametrize("layout", mostly(["contiguous", "zigzag", "striped"], ["zigzag"]))
@pytest.mark.parametrize("strategy", ["ring", "all_gather", "ulysses"])
def test_every_strategy_and_layout_draws_the_same(strategy, layout):
    mesh = mesh_of(data=2, context=2, tensor=1) if strategy == "ulysses" else mesh_of(data=2, context=4)
    dropout = Dropout(0.3, KEY)
    spread = context_parallel(attention, mesh=mesh, strategy=strategy)
    order = layout_order(layout, 64, mesh.shape["context"])
    tokens = jax.tree.map(lambda x: lay_out(x, order), DOCUMENTS)
    found = jax.jit(lambda: drawn(spread, dropout, plan(Everything(), tokens, block_q=8, block_k=8)))()
    found = restore(restore(found, order, axis=2), order, axis=3)
    np.testing.assert_array_equal(found, dropout_mask(dropout, DOCUMENTS, batch=2, heads=HEADS))


def test_rows_and_heads_on_several_devices_draw_the_same():
    dropout = Dropout(0.3, KEY)
    the_plan = plan(Everything(), DOCUMENTS, block_q=16, block_k=16)
    with jax.set_mesh(mesh_of(data=2, tensor=4)) if hasattr(jax, "set_mesh") else mesh_of(data=2, tensor=4):
        found = jax.jit(lambda the_plan: drawn(attention, dropout, the_plan))(the_plan)
    np.testing.assert_array_equal(found, dropout_mask(dropout, DOCUMENTS, batch=2, heads=HEADS))


@pytest.mark.parametrize("backend", mostly(["xla", *KERNELS], ["xla"]))
def test_gradients_of_rows_and_heads_on_several_devices_are_those_of_one(backend):
    q, k, v, the_plan = arguments(Shape(queries=32, keys=32), width=6)
    mesh = mesh_of(data=2, tensor=4)
    how = {"bias": BIASES["function"] + BIASES["alibi"], "dropout": Dropout(0.3, KEY)}
    expected = results(attention, q, k, v, the_plan, backend="dense", **how)
    with jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else mesh:
        found = results(attention, q, k, v, the_plan, backend=backend, **how)
    assert_close(found, expected)


@pytest.mark.parametrize("strategy", mostly(["ring", "all_gather", "ulysses"], ["ring", "ulysses"]))
def test_gradients_over_devices_are_those_of_one(strategy):
    shape = Shape(queries=32, keys=32, kv_heads=4)
    q, k, v, the_plan = arguments(shape, width=6)
    mesh = mesh_of(data=2, context=2, tensor=2)
    spread = context_parallel(attention, mesh=mesh, strategy=strategy)
    how = {"bias": BIASES["sum"] + BIASES["alibi"], "dropout": Dropout(0.3, KEY)}
    expected = results(attention, q, k, v, the_plan, backend="dense", **how)
    assert_close(results(spread, q, k, v, the_plan, backend="xla", **how), expected)


@pytest.mark.parametrize("rate", mostly([0.1, 0.3, 0.5], [0.3]))
def test_the_draw_is_uniform_and_independent(rate):
    """Chi-square tests of one degree of freedom each, on 10⁷ draws: 15.1 is passed once in 10,000."""
    tokens = Tokens.sequence(1024)
    kept = np.asarray(dropout_mask(Dropout(rate, KEY), tokens, batch=2, heads=5))
    n = kept.size
    assert n > 10**7
    dropped = n - kept.sum()
    assert (dropped - n * rate) ** 2 / (n * rate * (1 - rate)) < 15.1
    for axis in range(4):
        for step in (1, 2, 3, 64):
            if step >= kept.shape[axis]:
                continue
            ahead, behind = (
                np.take(kept, np.arange(kept.shape[axis] - step) + start, axis) for start in (0, step)
            )
            both = (~ahead & ~behind).sum()
            p, m = rate**2, ahead.size
            assert (both - m * p) ** 2 / (m * p * (1 - p)) < 25, (axis, step)
            # 2 × 2: whether one draw says anything of the other.
            observed = np.array([[(x & y).sum() for y in (behind, ~behind)] for x in (ahead, ~ahead)], float)
            expected = observed.sum(1, keepdims=True) * observed.sum(0, keepdims=True) / m
            assert ((observed - expected) ** 2 / expected).sum() < 15.1, (axis, step)
    for axes in ((0, 1, 2), (0, 1, 3)):  # of each key, and of each query
        shares = (~kept).sum(axis=axes)
        trials = n / len(shares)
        chi = ((shares - trials * rate) ** 2 / (trials * rate * (1 - rate))).sum()
        assert abs(chi - len(shares)) < 4 * np.sqrt(2 * len(shares))


def test_keys_of_any_kind_and_traced_rates():
    tokens = Tokens.sequence(32)
    mask = dropout_mask(Dropout(0.5, jax.random.key_data(KEY)), tokens)
    np.testing.assert_array_equal(mask, dropout_mask(Dropout(0.5, KEY), tokens))
    assert (mask != dropout_mask(Dropout(0.5, jax.random.key(8)), tokens)).any()
    assert dropout_mask(Dropout(0.5, jax.random.key(0, impl="rbg")), tokens).any()
    traced = jax.jit(lambda rate: dropout_mask(Dropout(rate, KEY), tokens))
    np.testing.assert_array_equal(traced(0.5), mask)
    assert traced(0.0).all()
    # What a greater rate keeps, a lesser one keeps too.
    assert (traced(0.25) >= mask).all()


@pytest.mark.parametrize("backend", mostly(["dense", *LOOPS], ["dense", "xla"]))
def test_attention_has_no_gradient_in_the_rate(backend):
    q, k, v, the_plan = arguments(SHAPES["even"])

    def loss(rate):
        return attention(q, k, v, the_plan, dropout=Dropout(rate, KEY), backend=backend).sum()

    assert jax.grad(loss)(0.3) == 0


def test_float64():
    with enable_x64(True):
        q, k, v = SHAPES["even"].qkv(jnp.float64)
        how = {"bias": ALiBi.for_heads(HEADS) + ALiBi(np.float64(0.3)), "dropout": Dropout(0.3, KEY)}
        found = [attention(q, k, v, Causal(), backend=name, **how) for name in ("dense", "xla", "xla_wide")]
        for each in found[1:]:
            assert each.dtype == jnp.float64
            np.testing.assert_allclose(each, found[0], rtol=1e-6, atol=1e-7)


def test_without_a_rate_the_program_is_that_without_dropout():
    q, k, v, the_plan = arguments(SHAPES["even"])

    def lowered(**options):
        loss = functools.partial(attention, mask_or_plan=the_plan, **options)
        return jax.jit(jax.grad(lambda *x: loss(*x).sum(), (0, 1, 2))).lower(q, k, v).as_text()

    assert lowered(dropout=Dropout(0.0, KEY)) == lowered()
    assert lowered(dropout=Dropout(0.1, KEY)) != lowered()


WIDTHS = [(*widths, backend) for widths in ((192, 128), (128, 192)) for backend in LOOPS]


@pytest.mark.parametrize(
    ("width_qk", "width_v", "backend"),
    mostly(WIDTHS, [(192, 128, "tpu")]),
)
def test_shapes_of_multi_head_latent_attention(backend, width_qk, width_v):
    shape = Shape(batch=1, queries=24, keys=24, head_dim=width_qk)
    q, k, v, the_plan = arguments(shape, width=width_v)
    expected = results(attention, q, k, v, the_plan, backend="dense")
    assert_close(results(attention, q, k, v, the_plan, backend=backend), expected)


@pytest.mark.parametrize("backend", mostly(LOOPS, ["xla", "gpu"]))
def test_a_key_that_is_not_finite_reaches_who_sees_it_at_another_width(backend):
    q, k, v, the_plan = arguments(SHAPES["even"], width=5)
    v = v.at[0, 3, 0, 2].set(jnp.nan)
    found = attention(q, k, v, the_plan, backend=backend, dropout=Dropout(0.5, KEY))
    expected = np.zeros((2, 48, HEADS), bool)
    expected[0, 3:15, :2] = True  # the rest of its document, of the heads that read its key head
    np.testing.assert_array_equal(np.isnan(found), np.broadcast_to(expected[..., None], found.shape))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"bias": jnp.zeros((48, 48))}, TypeError, r"bias must be a Bias, got an array \(48, 48\): .*ALiBi"),
        ({"bias": ALiBi}, TypeError, r"an instance, ALiBi\(…\)"),
        ({"bias": waves}, TypeError, r"BiasFunction\(function\)"),
        ({"bias": BiasFunction(lambda q, k: q.position == k.position)}, TypeError, "real numbers, got bool"),
        (
            {"bias": BiasFunction(lambda q, k: q.position == k.position) + ALiBi(0.0)},
            TypeError,
            "real numbers, got bool",
        ),
        (
            {"bias": BiasFunction(lambda q, k: 1.0 if q.position > k.position else 0.0)},
            TypeError,
            "BiasFunction.*truth of a condition on tokens",
        ),
        (
            {"bias": BiasFunction(lambda q, k: np.arange(48.0)[q.position])},
            TypeError,
            r"BiasFunction.*make it jnp.asarray\(table\)",
        ),
        ({"bias": BiasFunction(lambda q, k: None)}, TypeError, "real numbers, got NoneType"),
        (
            {"bias": BiasFunction(lambda q, k: jnp.ones((3, 3)))},
            ValueError,
            r"BiasFunction.*broadcast to the pairs .*, got \(3, 3\)",
        ),
        ({"bias": ALiBi(jnp.ones(3))}, ValueError, r"has a leaf \(3,\), got 4 query heads"),
        ({"dropout": 0.1}, TypeError, r"dropout must be a Dropout\(rate, key\), got 0.1"),
    ],
)
def test_what_is_no_bias_or_dropout_is_refused(options, error, words):
    q, k, v, the_plan = arguments(SHAPES["even"])
    with pytest.raises(error, match=words):
        attention(q, k, v, the_plan, **options)


def test_a_bias_that_reads_tokens_needs_them_as_a_mask_does():
    q, k, v, _ = arguments(SHAPES["even"])
    same = BiasFunction(lambda q, k: jnp.where(q.segment == k.segment, 0.5, 0.0))
    with pytest.raises(ValueError, match=r"BiasFunction.* reads the segments of tokens"):
        attention(q, k, v, Causal(), bias=same)
    with pytest.raises(ValueError, match=r"ALiBi.* reads positions"):
        attention(q[:, :4], k, v, Everything(), bias=ALiBi(0.5))
    a_plan = plan(Everything(), Tokens.sequence(4, start=44), Tokens.sequence(48))
    assert attention(q[:, :4], k, v, a_plan, bias=ALiBi(0.5)).shape == (2, 4, HEADS, 8)


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: Dropout(1.0, KEY), ValueError, r"rate must lie in 0…1 \(1 excluded\), got 1.0"),
        (lambda: Dropout(True, KEY), TypeError, "rate must be a number, got True"),
        (lambda: Dropout(0.1, 3), TypeError, "key must be a key of jax.random, got 3"),
        (lambda: Dropout(0.1, jax.random.split(KEY)), ValueError, r"one key, got keys of shape \(2,\)"),
        (lambda: ALiBi(3), TypeError, "slopes must be floating, got int"),
        (lambda: ALiBi.for_heads(0), ValueError, "heads must be at least 1, got 0"),
        (lambda: RelativeBuckets(jnp.ones(8)), ValueError, r"table must be \[heads, buckets\], got \(8,\)"),
        (lambda: RelativeBuckets(jnp.ones((4, 7))), ValueError, "a multiple of 2 and at least 4, got 7"),
        (lambda: RelativeBuckets(jnp.ones((4, 32)), max_distance=8), ValueError, "max_distance must be at"),
        (lambda: BiasFunction(3), TypeError, "function must be callable, got 3"),
        (lambda: ALiBi(0.5) + 1.0, TypeError, "bias must be a Bias, got float"),
    ],
)
def test_what_cannot_be_is_refused_when_built(build, error, words):
    with pytest.raises(error, match=words):
        build()
