"""The simulator: its counts agree with plans, and its picks are even at every stage of every curriculum."""

from dataclasses import replace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from slow import mostly

from dynmask_jax import (
    LAYOUTS,
    V5P,
    Causal,
    Everything,
    Heads,
    SameSegment,
    Tokens,
    Window,
    balance,
    balances,
    context_parallel,
    exponential,
    growing_chunks,
    growing_window,
    lay_out,
    linear,
    plan,
    reveal,
)
from dynmask_jax.context.simulator import Balance
from dynmask_jax.curricula import Order
from dynmask_jax.partitioning import STRATEGIES

DEVICES = 64
BLOCK = 8
LENGTH = DEVICES * 32 * BLOCK  # 32 blocks for each device, as of a million tokens in blocks of 512
END = 100
STAGES = (0, 1, 2, 5, 10, 20, 33, 50, 67, 80, 90, 97, 100)
CURRICULA = {
    "growing_window, linear": growing_window(linear(BLOCK // 2, LENGTH, END)),
    "growing_window, exponential": growing_window(exponential(BLOCK // 2, LENGTH, END)),
    "growing_chunks, linear": growing_chunks(linear(BLOCK // 2, LENGTH, END)),
    "growing_chunks, exponential": growing_chunks(exponential(BLOCK // 2, LENGTH, END)),
    **{
        # Chunks of a quarter of a device's share, and of one and a half, which fits no boundary.
        f"reveal, {order}, {chunk}": reveal(chunk, linear(0.0, 1.0, END), order)
        for order in get_args(Order)
        for chunk in (8 * BLOCK, 48 * BLOCK + 3)
    },
}
# Tokens 64 times as large and operations 64 times as slow: transfers take what they do at a million tokens,
# and blocks too.
AS_LARGE = {
    "block": BLOCK,
    "heads": Heads(query=32, key=8, dim=128 * 64),
    "machine": replace(V5P, flops=V5P.flops / 64),
}


def test_the_full_causal_mask_is_even():
    found = balance(Causal(), LENGTH, DEVICES, **AS_LARGE)
    assert found.pick.imbalance <= 1.05
    assert found.best("zigzag").imbalance == found.best("striped").imbalance == 1.0
    assert found.best("contiguous").imbalance > 1.9


@pytest.mark.parametrize(
    "name", mostly(CURRICULA, ["growing_window, linear", "growing_chunks, linear", "reveal, random, 64"])
)
def test_the_pick_is_even_at_every_stage(name):
    found = balances(CURRICULA[name], STAGES, LENGTH, DEVICES, **AS_LARGE, strategies=["ring"])
    imbalances = {step: each.pick.imbalance for step, each in found.items()}
    assert max(imbalances.values()) <= 1.15, imbalances


def test_no_fixed_layout_is_even_throughout():
    found = balances(CURRICULA["growing_window, linear"], STAGES, LENGTH, DEVICES, **AS_LARGE)
    for layout in ("contiguous", "zigzag"):
        assert max(each.best(layout).imbalance for each in found.values()) > 1.3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", [Causal(), Causal() & Window(20), Everything(), Causal() & SameSegment()])
def test_work_is_that_of_a_plan_of_the_laid_out_tokens(layout, mask):
    tokens = Tokens(
        *(
            jnp.stack([getattr(Tokens.packed(lengths), field) for lengths in ([64, 20, 44], [100, 28])])
            for field in ("position", "segment")
        )
    )
    for choice in balance(mask, tokens, 4, block=8, layouts=[layout], strategies=["ring"]).choices:
        laid_out = lay_out(tokens, choice.order)
        codes = np.asarray(plan(mask, laid_out, block_q=8, block_k=8).codes) != 0
        assert choice.cost.work.tolist() == codes.sum(axis=(0, 2)).reshape(4, -1).sum(axis=1).tolist()
        needed = codes.any(axis=0).reshape(4, 4, 4, 4).any(axis=(1, 3))
        distances = {int(i - j) % 4 for i, j in zip(*np.nonzero(needed), strict=True)} - {0}
        reached = {*range(1, choice.cost.ahead + 1), *(4 - n for n in range(1, choice.cost.behind + 1))}
        assert distances <= reached
        assert choice.cost.forward_bytes == choice.hops * 2 * (2 * 32) * 8 * 128 * 2, "of two rows"


def test_a_share_that_is_no_multiple_of_a_block_ends_in_a_shorter_one():
    found = balance(Causal(), 4 * 20, 4, block=8, layouts=["contiguous"], strategies=["ring"])
    assert found.pick.cost.work.tolist() == [6, 15, 24, 33], "three blocks each, a triangle on the diagonal"
    assert balance(Causal(), 12, 4, block=512).pick.cost.work.sum() > 0, "blocks no longer than a share"


def test_a_window_takes_one_hop_while_it_fits_a_neighbour():
    def hops(layout, window):
        choice = balance(Causal() & Window(window), 8 * 64, 8, block=8).best(layout)
        return choice.cost.ahead, choice.cost.behind

    assert hops("contiguous", 1) == (0, 0)
    assert [hops("contiguous", window) for window in (2, 65, 66, 512)] == [(1, 0), (1, 0), (2, 0), (7, 0)]
    assert hops("zigzag", 32) == (1, 1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_hops_and_bytes_are_those_that_context_parallel_counts(strategy):
    heads = Heads(query=16, key=8, dim=4, dtype=jnp.float32)
    q, k = (jax.ShapeDtypeStruct((1, 1024, n, heads.dim), heads.dtype) for n in (heads.query, heads.key))
    mesh = jax.make_mesh((8,), ("context",), axis_types=(AxisType.Auto,))
    attend = context_parallel(mesh=mesh, strategy=strategy)
    for window in (1, 40, 300, 1024):
        found = balance(
            Causal() & Window(jnp.int32(window)), 1024, 8, block=16, heads=heads, strategies=[strategy]
        )
        for layout in LAYOUTS:
            choice = found.best(layout, strategy)
            laid_out = lay_out(Tokens.sequence(1024), choice.order)
            the_plan = plan(Causal() & Window(jnp.int32(window)), laid_out, block_q=16, block_k=16)
            travel = attend.travel(q, k, the_plan)
            assert travel.bytes == choice.cost.forward_bytes
            assert strategy != "ring" or travel.hops == choice.hops


def test_packed_documents_of_different_lengths_are_dealt_by_what_they_cost():
    tokens = Tokens.packed([700, 100, 100, 100, 24])
    found = balance(Causal() & SameSegment(), tokens, 8, block=8, strategies=["ring"])
    assert found.best("contiguous").imbalance > 1.5
    assert found.best("zigzag").imbalance > 1.15
    assert found.best("dealt").imbalance < 1.02
    assert found.pick.imbalance <= 1.15


def test_the_pick_is_even_first_then_fast_then_light():
    found = balance(CURRICULA["growing_chunks, linear"](2), LENGTH, DEVICES, **AS_LARGE)
    even = [choice for choice in found.choices if choice.imbalance <= 1.15]
    assert 0 < len(even) < len(found.choices)
    fastest = min(choice.cost.seconds for choice in even)
    alike = [choice for choice in even if choice.cost.seconds <= 1.05 * fastest]
    assert found.pick in alike
    assert found.pick.cost.bytes + found.pick.cost.held == min(c.cost.bytes + c.cost.held for c in alike)
    uneven = tuple(choice for choice in found.choices if choice.imbalance > 1.15)
    most_even = min(choice.imbalance for choice in uneven)
    assert Balance(uneven, DEVICES, V5P).pick.imbalance == most_even, "the best there is, where none is even"
    assert found.fastest.cost.seconds == min(choice.cost.seconds for choice in found.choices)


def test_a_mask_that_shows_nothing_costs_nothing():
    pick = balance(~Everything(), 64, 4, block=8).pick
    assert (pick.layout, pick.imbalance, pick.hops, pick.cost.bytes) == ("contiguous", 1.0, 0, 0)


def test_layouts_that_do_not_fit_are_left_out_or_refused_by_name():
    assert {choice.layout for choice in balance(Causal(), 27, 3, block=2).choices} == {*LAYOUTS} - {"zigzag"}
    with pytest.raises(ValueError, match="zigzag: length must be a multiple of 2 · 3 devices, got 27"):
        balance(Causal(), 27, 3, layouts=["zigzag"])
    with pytest.raises(ValueError, match="contiguous: length must be a multiple of 3 devices, got 28"):
        balance(Causal(), 28, 3)
    with pytest.raises(ValueError, match="nothing to choose from: ulysses cannot be on 3 devices"):
        balance(Causal(), 27, 3, strategies=["ulysses"])
    with pytest.raises(ValueError, match="no choice of layout 'zigzag' and strategy 'ring'"):
        balance(Causal(), 27, 3).best("zigzag")
    with pytest.raises(ValueError, match="strategy must be one of"):
        balance(Causal(), 27, 3, strategies=["star"])
    with pytest.raises(ValueError, match="devices must be at least 1, got 0"):
        balance(Causal(), 27, 0)
    with pytest.raises(TypeError, match=r"machine must be a Machine, as dynmask_jax\.V5E, got 'V5E'"):
        balance(Causal(), 27, 3, machine="V5E")


def test_one_device_has_all_of_it():
    pick = balance(Causal(), 64, 1, block=8).pick
    assert (pick.layout, pick.imbalance, pick.cost.bytes) == ("contiguous", 1.0, 0)
    assert balance(Causal(), 64, 1, block=8, layouts=["dealt"]).pick.order.tolist() == list(range(64))


def test_the_table_marks_the_pick():
    found = balance(Causal(), 1024, 4, block=8)
    lines = str(found).splitlines()
    assert len(lines) == 2 + len(found.choices)
    marked = [line for line in lines if line.endswith(" <")]
    assert len(marked) == 1
    assert marked[0].split()[:2] == [found.pick.layout, found.pick.strategy]
