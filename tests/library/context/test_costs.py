"""Costs: hops that bring all that is needed and no more, bytes by hand, and what waiting does to time."""

from itertools import product

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynmask_jax import H100, V5P, Heads, Machine
from dynmask_jax.context.costs import Attended, arcs, cost
from dynmask_jax.partitioning import STRATEGIES

HEADS = Heads(query=8, key=4, dim=16, dtype=jnp.bfloat16)
TOKENS = 10
SHARD = 2 * TOKENS * 4 * 16 * 2
GRADIENTS = 2 * SHARD


def attended(work, machine=V5P, heads=HEADS):
    return Attended(np.asarray(work), pairs=64, tokens=TOKENS, heads=heads, machine=machine)


def seen_at(devices, distances):
    """Work of one block at each of these distances, for every device."""
    i, j = np.indices((devices, devices))
    return np.isin((i - j) % devices, list(distances)).astype(int)


@given(devices=st.integers(1, 7), data=st.data())
def test_the_arcs_are_the_least_that_bring_all(devices, data):
    distances = data.draw(st.sets(st.integers(0, devices - 1)))
    ahead, behind = arcs(seen_at(devices, distances) > 0)
    every = product(range(devices), repeat=2)
    enough = [(a, b) for a, b in every if all(d <= a or devices - d <= b for d in distances)]
    assert (ahead, behind) in enough
    assert ahead + behind == min(map(sum, enough))


def test_one_device_that_needs_a_shard_is_reason_to_send_it():
    needed = np.eye(6, dtype=bool)
    assert arcs(needed) == (0, 0)
    needed[3, 1] = True
    assert arcs(needed) == (2, 0)
    needed[2, 3] = True
    assert arcs(needed) == (2, 1)
    assert arcs(np.ones((6, 6), bool)) == (5, 0)


def test_a_ring_sends_keys_out_and_their_gradients_home():
    found = cost("ring", attended(seen_at(8, {0, 1, 2, 3, 7})))
    assert (found.ahead, found.behind) == (3, 1)
    assert found.forward_bytes == 4 * SHARD
    # The arc of one hop moves no keys: those that came are where the backward pass begins.
    assert found.backward_bytes == 3 * SHARD + 4 * GRADIENTS
    assert cost("ring", attended(np.eye(8, dtype=int))).bytes == 0


def test_the_others_send_the_same_whatever_the_mask():
    for work in (np.eye(4, dtype=int), np.ones((4, 4), int)):
        gathered = cost("all_gather", attended(work))
        assert gathered.forward_bytes == 3 * SHARD
        assert gathered.backward_bytes == 3 * (SHARD + GRADIENTS)
        by_heads = cost("ulysses", attended(work))
        queries, lse = TOKENS * 8 * 16 * 2, TOKENS * 8 * 4
        assert by_heads.forward_bytes == by_heads.backward_bytes == 3 * (2 * queries + SHARD + lse) // 4
        assert by_heads.work.max() == by_heads.work.mean() == work.sum() / 4, "whole heads cost alike"


def test_values_of_another_width_travel_and_cost_as_they_are_wide():
    wide = Heads(query=8, key=4, dim=16, value_dim=48, dtype=jnp.bfloat16)
    work, shard = np.ones((4, 4), int), 2 * SHARD
    assert cost("all_gather", attended(work, heads=wide)).forward_bytes == 3 * shard
    out, queries, lse = TOKENS * 8 * 48 * 2, TOKENS * 8 * 16 * 2, TOKENS * 8 * 4
    assert cost("ulysses", attended(work, heads=wide)).forward_bytes == 3 * (queries + out + shard + lse) // 4
    free = Machine("no transfer to wait for", flops=V5P.flops, link=1e30)
    block = 64 * 8 * (8 * 16 + 6 * 48) / (V5P.flops * V5P.share)
    assert cost("ring", attended(work, free, wide)).seconds == pytest.approx(4 * block)
    with pytest.raises(ValueError, match=r"heads\.value_dim must be at least 1, got 0"):
        Heads(value_dim=0)


def test_ulysses_needs_heads_for_every_device():
    assert cost("ulysses", attended(np.ones((8, 8)))) is None, "4 key heads on 8 devices"
    assert cost("ulysses", attended(np.ones((3, 3)))) is None
    with pytest.raises(ValueError, match=r"strategy must be one of 'ring', .* got 'star'"):
        cost("star", attended(np.ones((2, 2))))


def test_a_device_runs_ahead_of_its_neighbours_by_one_visit_and_no_more():
    free = Machine("no transfer to wait for", flops=V5P.flops, link=1e30)
    at_once = cost("ring", attended(4 * np.eye(3, dtype=int), free))
    assert at_once.critical == 4
    # Device d is laden at distance d. 0 and 1 work at the same time, since 1 may begin its second visit
    # while 0 is in its first; 2 may not begin its third before 0 begins its second.
    in_turn = np.zeros((3, 3), int)
    in_turn[:, 0] = 4
    found = cost("ring", attended(in_turn, free))
    assert found.work.tolist() == [4, 4, 4]
    assert found.critical == 8
    assert cost("all_gather", attended(in_turn, free)).critical == 4, "nobody waits"


def test_time_is_that_of_the_blocks_or_of_the_transfer_whichever_is_longer():
    work = seen_at(4, {0, 1})
    block = 64 * 8 * 16 * 14 / (V5P.flops * V5P.share)
    slow_link, fast_link = (Machine("x", flops=V5P.flops, link=link) for link in (1e3, 1e30))
    assert cost("ring", attended(work, fast_link)).seconds == pytest.approx(2 * block)
    # Out and home. A block's time is nothing beside it.
    near, far = (cost("ring", attended(seen_at(4, at), slow_link)).seconds for at in ({0, 1}, {0, 1, 2, 3}))
    assert near == pytest.approx((SHARD + GRADIENTS) / 1e3, rel=1e-6)
    assert far == pytest.approx(3 * (SHARD + SHARD + GRADIENTS) / 1e3, rel=1e-6)
    gathered = cost("all_gather", attended(work, fast_link))
    assert gathered.seconds == pytest.approx(2 * block)


def test_a_switch_reaches_all_devices_over_one_port():
    torus = Machine("torus", flops=1e30, link=1e9)
    switch = Machine("switch", flops=1e30, link=1e9, switched=True)
    work = np.ones((16, 16), int)
    heads = Heads(query=16, key=16, dim=16)
    for strategy, times in {"all_gather": 2.0, "ulysses": 0.5}.items():
        on_torus, on_switch = (cost(strategy, attended(work, machine, heads)) for machine in (torus, switch))
        assert on_switch.seconds == pytest.approx(times * on_torus.seconds)
        assert on_switch.bytes == on_torus.bytes
    assert H100.switched
    assert not V5P.switched


def test_every_strategy_counts_the_same_blocks():
    work = np.arange(16).reshape(4, 4)
    assert {cost(name, attended(work)).work.sum() for name in STRATEGIES} == {work.sum()}
    assert cost("ring", attended(work)).work.tolist() == work.sum(axis=1).tolist()


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"query heads \(6\) must be a multiple of key heads \(4\)"):
        Heads(query=6, key=4)
    with pytest.raises(ValueError, match=r"heads\.dim must be at least 1, got 0"):
        Heads(dim=0)
