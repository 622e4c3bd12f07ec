"""The grain as data: results in either grain, which lines take which, and that nothing retraces."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MASKS, SHAPES, UNREADABLE, Shape
from hypothesis import given, settings
from slow import examples, mostly
from strategies import masks

from dynmask_jax import (
    ALiBi,
    Causal,
    Chunks,
    Dropout,
    Everything,
    Prefix,
    SameSegment,
    Sinks,
    Strided,
    Tokens,
    Window,
    attention,
    context_parallel,
    growing_window,
    linear,
    plan,
    reveal,
)
from dynmask_jax.backends.grains import TILE_PAIRS, grains_of
from dynmask_jax.block_codes import FULL, SKIP, TEST
from dynmask_jax.grain_choice import FINE_COST, MOST_FINE, OVERHEAD, fine_blocks, joined
from dynmask_jax.plans import plan_in
from dynmask_jax.scores import Scores
from tests.library.context.test_parallel import mesh_of
from tests.library.test_attention import assert_same, results
from tests.library.test_plans import assert_sound

BLOCKS, SMALL = (16, 8), (4, 4)
ALWAYS, MIXED = 0.0, 0.25
"""Costs of small blocks: with the second, lines of one plan of `SHAPES["ragged"]` differ in their grain."""


SLOPES = jnp.array([0.5, 0.25, 0.125, 0.0625])


def in_grains(mask, shape: Shape, cost: float = ALWAYS):
    return plan_in(mask, *shape.tokens(), blocks=BLOCKS, fine=SMALL, cost=cost)


def assert_grains_are_dense(the_plan, shape: Shape, dtype=jnp.float32, **options):
    run = jax.jit(functools.partial(results, **options), static_argnames="backend")
    actual, expected = (run(*shape.qkv(dtype), the_plan, backend=name) for name in ("xla", "dense"))
    assert_same(actual, expected, dtype)


@pytest.mark.parametrize("mask_name", mostly(MASKS, ["same_segment", "per_head_window"]))
@pytest.mark.filterwarnings(f"ignore:.*{UNREADABLE}")
def test_every_mask_in_small_blocks(mask_name):
    assert_grains_are_dense(in_grains(MASKS[mask_name], SHAPES["ragged"]), SHAPES["ragged"])


@pytest.mark.parametrize("shape_name", mostly(SHAPES, ["one_query", "one_kv_head"]))
def test_every_shape_in_small_blocks(shape_name):
    mask = (Causal() & Window(9) | Prefix(5)) & SameSegment()
    assert_grains_are_dense(in_grains(mask, SHAPES[shape_name]), SHAPES[shape_name])


def test_lines_of_one_plan_in_both_grains():
    the_plan = in_grains(Causal() & SameSegment(), SHAPES["ragged"], MIXED)
    for by_keys in (False, True):
        assert set(np.unique(the_plan.takes_fine(by_keys=by_keys))) == {False, True}
    assert_grains_are_dense(the_plan, SHAPES["ragged"])


@pytest.mark.parametrize("cost", mostly([ALWAYS, MIXED], [MIXED]))
def test_options_of_a_call(cost):
    """Leaves and draws of heads, of which a tile may have some alone."""
    shape = dataclasses.replace(SHAPES["ragged"], kv_heads=2)
    options = {
        "bias": ALiBi(SLOPES),
        "dropout": Dropout(0.3, jax.random.key(1)),
        "soft_cap": 3.0,
    }
    mask = MASKS["per_head_window"] & SameSegment()
    assert_grains_are_dense(in_grains(mask, shape, cost), shape, **options)


SOME_HEADS = 2 * 2 * 16 * 8
TILES = [(kv_heads, most) for kv_heads in (1, 4) for most in (1, SOME_HEADS)]


@pytest.mark.parametrize(("kv_heads", "most"), mostly(TILES, [(4, SOME_HEADS)]))
def test_tiles_of_some_heads(most, kv_heads, monkeypatch):
    """With and without a per-head mask, a bias and dropout: whose leaves go with the heads."""
    monkeypatch.setattr("dynmask_jax.backends.grains.TILE_PAIRS", most)
    jax.clear_caches()  # a program made before would still hold the old number
    shape = dataclasses.replace(SHAPES["ragged"], kv_heads=kv_heads)
    options = {
        "bias": ALiBi(SLOPES),
        "dropout": Dropout(0.3, jax.random.key(1)),
    }
    assert_grains_are_dense(in_grains(MASKS["per_head_window"], shape, MIXED), shape, **options)
    assert_grains_are_dense(in_grains(MASKS["same_segment"], shape, np.inf), shape)


def test_gradients_of_a_bias_in_tiles_of_one_head(monkeypatch):
    monkeypatch.setattr("dynmask_jax.backends.grains.TILE_PAIRS", 1)
    jax.clear_caches()
    shape = SHAPES["ragged"]
    the_plan = in_grains(MASKS["same_segment"], shape, MIXED)

    def loss(slopes, backend):
        out = attention(*shape.qkv(), the_plan, bias=ALiBi(slopes), backend=backend)
        return jnp.sin(out).sum()

    gradient = jax.jit(jax.grad(loss), static_argnames="backend")
    np.testing.assert_allclose(gradient(SLOPES, "xla"), gradient(SLOPES, "dense"), rtol=1e-4)


def test_heads_in_a_tile():
    """As many as keep it within `TILE_PAIRS`: of large tiles one after the other, of small ones all."""

    def heads(block, kv_heads=8, group=1):
        the_plan = plan_in(
            Causal(), Tokens.sequence(2 * block), Tokens.sequence(2 * block), blocks=(block, block)
        )
        grains = grains_of(Scores(None, None, 1.0, None), the_plan, (kv_heads * group, kv_heads))
        assert grains.coarse.heads * grains.coarse.parts == kv_heads
        return grains.coarse.heads

    assert TILE_PAIRS == 512 * 512
    assert [heads(block) for block in (512, 256, 128, 64)] == [1, 4, 8, 8]
    assert heads(256, kv_heads=6) == 3
    assert heads(256, kv_heads=8, group=4) == 1


@given(mask=masks())
@settings(max_examples=examples(8, thorough=200), deadline=None)
def test_codes_of_both_grains_are_sound(mask):
    the_plan = in_grains(mask, SHAPES["ragged"])
    assert_sound(the_plan)
    assert_sound(the_plan.at_fine())


def test_codes_of_blocks_are_those_of_their_small_ones():
    codes = np.random.default_rng(0).choice([SKIP, TEST, FULL], (2, 7, 5), p=[0.4, 0.1, 0.5]).astype(np.int8)
    whole = np.asarray(joined(jnp.asarray(codes), (2, 2)))
    assert whole.shape == (2, 4, 3)
    for (row, i, j), code in np.ndenumerate(whole):
        parts = codes[row, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        every = parts.size == 4 and (parts == FULL).all()
        assert code == (FULL if every else TEST if parts.any() else SKIP)


TWELVE = {
    "full": Everything(),
    "causal": Causal(),
    "window 32": Causal() & Window(32),
    "window 512": Causal() & Window(512),
    "window 2,048": Causal() & Window(2048),
    "window and sinks": Causal() & (Window(128) | Sinks(4)),
    "chunks 100": Causal() & Chunks(100),
    "chunks 1,500": Causal() & Chunks(1500),
    "prefix": Causal() | Prefix(700),
    "documents": Causal() & SameSegment(),
    "strided": Causal() & Strided(64),
    "reveal": reveal(256, lambda step: step / 10, order="random")(3),
}


def documents(length: int) -> Tokens:
    lengths = np.random.default_rng(0).integers(300, 1500, length // 300)
    ends = np.minimum(np.cumsum(lengths), length)
    return Tokens.packed(np.diff(ends[: np.searchsorted(ends, length) + 1], prepend=0).tolist())


@pytest.mark.parametrize("name", TWELVE)
@pytest.mark.parametrize("length", mostly([2048, 4096, 8192], [4096]))
@pytest.mark.parametrize("by_keys", [False, True])
def test_every_line_takes_the_cheaper_grain(name, length, by_keys):
    """Counted block by block in NumPy; so no line costs more than in the better of the two fixed grains."""
    the_plan = plan(TWELVE[name], documents(length))
    assert the_plan.fine is not None
    coarse, fine = (np.asarray(x)[0] != SKIP for x in (the_plan.codes, the_plan.fine.codes))
    if by_keys:
        coarse, fine = coarse.T, fine.T
    takes = np.asarray(the_plan.takes_fine(by_keys=by_keys))[0]
    assert takes.shape == (len(coarse),)
    for line, (blocks, small) in enumerate(zip(coarse, fine.reshape(len(coarse), -1), strict=True)):
        cost_whole = blocks.sum() * (512 * 512 + OVERHEAD)
        cost_small = small.sum() * FINE_COST * (64 * 64 + OVERHEAD)
        assert takes[line] == (cost_small < cost_whole)


def test_windows_choose_small_blocks_at_first_and_whole_ones_at_last():
    tokens = Tokens.sequence(8192)
    share = [float(plan(Causal() & Window(w), tokens).takes_fine().mean()) for w in (32, 128, 4096, 8192)]
    assert share == [1, 1, 0, 0]


@pytest.mark.parametrize("by_keys", [False, True])
@pytest.mark.parametrize("length", [513, 576, 600, 1_100, 1_700])
def test_small_blocks_count_for_the_line_they_lie_in(length, by_keys):
    """Also where the last line has few of them."""
    seen = plan(Causal() & Window(32), Tokens.sequence(length))
    assert seen.fine is not None
    codes = np.asarray(seen.fine.codes[0])
    expected = np.zeros(-(-length // 512))
    for i, j in np.argwhere(codes != SKIP):
        expected[(j if by_keys else i) // 8] += 1
    found = seen.fine.active((seen.block_q, seen.block_k), by_keys=by_keys)
    np.testing.assert_array_equal(found, expected[None])


def test_pairs_that_are_computed():
    tokens = Tokens.sequence(4096)
    narrow = plan(Causal() & Window(32), tokens)
    assert int(narrow.computed_pairs()) == (2 * 64 - 1) * 64 * 64
    assert int(plan(Causal(), tokens).computed_pairs()) == 36 * 512 * 512
    # Where small blocks cost less, the first line, half of one block, is in them.
    assert int(plan(Causal(), tokens, fine_cost=1.4).computed_pairs()) == 35 * 512 * 512 + 36 * 64 * 64
    assert int(plan(Causal(), tokens, block_q=1024, block_k=512).computed_pairs()) == 20 * 1024 * 512
    assert "backend xla works 8 of 8 lines in blocks of 64 x 64, and computes 3.1% of pairs" in str(narrow)
    assert "computed" not in str(plan(Causal(), tokens, block_q=512))


def test_a_curriculum_over_both_grains_is_one_program():
    curriculum, tokens = growing_window(linear(32, 2048, 4)), Tokens.sequence(2048)
    q = k = v = jax.random.normal(jax.random.key(0), (1, 2048, 1, 4))

    @jax.jit
    @chex.assert_max_traces(1)
    def step(number, q):
        return attention(q, k, v, plan(curriculum(number), tokens), backend="xla")

    for number in (0, 1, 4):
        expected = attention(q, k, v, plan(curriculum(number), tokens), backend="dense")
        np.testing.assert_allclose(step(number, q), expected, atol=2e-6)


def test_results_are_the_same_bit_for_bit():
    shape = SHAPES["even"]
    the_plan = in_grains(Causal() & SameSegment(), shape, MIXED)
    run = jax.jit(functools.partial(results, backend="xla"))
    first = run(*shape.qkv(), the_plan)
    for again in (run(*shape.qkv(), the_plan), run(*shape.qkv(), the_plan)):
        chex.assert_trees_all_equal(first, again)


FIT, BEYOND = ((16, 8), (4, 4)), ((32, 32), (8, 8))
"""Parts of whole blocks, and of blocks that do not fit: whose plans are made on the devices."""
SPREAD = [(strategy, *blocks) for strategy in ("ring", "all_gather", "ulysses") for blocks in (FIT, BEYOND)]


@pytest.mark.parametrize(
    ("strategy", "blocks", "small"), mostly(SPREAD, [("ring", *BEYOND), ("all_gather", *FIT)])
)
def test_over_devices(strategy, blocks, small):
    shape = Shape(queries=64, keys=64, kv_heads=4)
    attend = context_parallel(attention, mesh=mesh_of(context=4), axis="context", strategy=strategy)
    the_plan = plan_in(MASKS["same_segment"], *shape.tokens(), blocks=blocks, fine=small, cost=MIXED)

    def loss(attend, q, k, v):
        return jnp.sin(attend(q, k, v, the_plan)).sum()

    found, expected = (
        jax.jit(jax.grad(functools.partial(loss, f), (0, 1, 2)))(*shape.qkv())
        for f in (attend, functools.partial(attention, backend="dense"))
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_a_narrower_plan_narrows_both_grains():
    tokens = Tokens.sequence(2048)
    narrowed, whole = plan(Causal(), tokens) & Window(100), plan(Causal() & Window(100), tokens)
    np.testing.assert_array_equal(narrowed.codes, whole.codes)
    np.testing.assert_array_equal(narrowed.fine.codes, whole.fine.codes)


@pytest.mark.parametrize(
    ("blocks", "lengths", "expected"),
    [
        ((512, 512), (4096, 4096), (64, 64)),
        ((512, 512), (512, 512), None),
        ((1, 512), (1, 4096), None),
        ((512, 300), (1000, 300), (64, 300)),
        ((512, 512), (2**18, 2**18), (128, 128)),
        ((512, 512), (2**20, 2**20), None),
    ],
)
def test_small_blocks_by_length(blocks, lengths, expected):
    assert fine_blocks((64, 64), blocks, lengths) == expected
    if expected is not None:
        assert lengths[0] * lengths[1] <= MOST_FINE * expected[0] * expected[1]


def test_rows_and_heads_count_as_readings():
    assert fine_blocks((64, 64), (512, 512), (2**16, 2**16), readings=4) == (64, 64)
    assert fine_blocks((64, 64), (512, 512), (2**16, 2**16), readings=5) == (128, 128)


def test_block_sizes_fix_the_grain():
    tokens = Tokens.sequence(2048)
    assert plan(Causal(), tokens, block_q=256).fine is None
    assert plan(Causal(), tokens, block_k=256).fine is None
    assert plan(Causal(), tokens, fine_cost=0).takes_fine().all()
    assert not plan(Causal() & Window(1), tokens, fine_cost=np.inf).takes_fine().any()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fine_cost": -1}, ValueError, "fine_cost must be at least 0, got -1"),
        ({"fine_cost": float("nan")}, ValueError, "fine_cost must be at least 0, got nan"),
        ({"fine_cost": True}, TypeError, "fine_cost must be a Python number, got True"),
        ({"fine_cost": "1"}, TypeError, "fine_cost must be a Python number, got '1'"),
        ({"fine_cost": 1, "block_q": 8}, ValueError, "block_q and block_k fix it"),
    ],
)
def test_costs_that_are_none(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        plan(Causal(), Tokens.sequence(2048), **options)
