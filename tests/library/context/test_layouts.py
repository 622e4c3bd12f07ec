"""Layouts: permutations that give each device what they say, and refuse what does not divide."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynmask_jax import LAYOUTS, Tokens, lay_out, layout_order, restore
from dynmask_jax.context.layouts import default_stripe


def shares(layout, length, devices, **options):
    return layout_order(layout, length, devices, **options).reshape(devices, -1)


@given(layout=st.sampled_from(LAYOUTS), devices=st.integers(1, 9), each=st.integers(1, 40), data=st.data())
def test_every_layout_is_a_permutation_that_is_undone(layout, devices, each, data):
    length, options = 2 * devices * each, {}
    if layout == "dealt":
        stripe = default_stripe(length, devices)
        numbers = st.lists(st.integers(0, 5), min_size=length // stripe, max_size=length // stripe)
        options["work"] = data.draw(numbers)
    order = layout_order(layout, length, devices, **options)
    assert order.dtype == np.int32
    assert sorted(order.tolist()) == list(range(length))
    row = np.arange(100, 100 + length)
    assert np.array_equal(lay_out(row, order), row[order])
    assert np.array_equal(restore(lay_out(row, order), order), row)


def test_contiguous_devices_hold_runs():
    assert shares("contiguous", 12, 3).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_zigzag_devices_hold_a_chunk_and_its_mirror_image():
    assert shares("zigzag", 12, 3).tolist() == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]


def test_stripes_are_dealt_back_and_forth():
    assert shares("striped", 12, 3, stripe=1).tolist() == [[0, 5, 6, 11], [1, 4, 7, 10], [2, 3, 8, 9]]
    assert shares("striped", 12, 3, stripe=2).tolist() == shares("zigzag", 12, 3).tolist()
    assert np.array_equal(layout_order("striped", 12, 3), layout_order("striped", 12, 3, stripe=2))


@pytest.mark.parametrize("layout", ["zigzag", "striped"])
def test_a_causal_row_is_level(layout):
    """The sum of positions is the causal work."""
    sums = shares(layout, 4096, 8).sum(axis=1)
    assert (sums == sums[0]).all()


def test_the_dearest_stripes_go_one_to_each_device_and_the_next_to_the_least_laden():
    work = [5, 9, 1, 7, 3, 2, 8, 4]
    held = shares("dealt", 8, 2, work=work)
    # 9 | 8; 7 to the one with 8, 5 to the other: 14 | 15; 4 and 3, the dearer to 14: 18 | 18; 2 and 1.
    assert held.tolist() == [[0, 1, 5, 7], [2, 3, 4, 6]]
    assert [sum(work[token] for token in device) for device in held.tolist()] == [20, 19]


def test_a_group_deals_within_its_own_run():
    held = shares("dealt", 16, 4, work=list(range(16)), group=2)
    assert set(held[:2].reshape(-1)) == set(range(8))
    assert set(held[2:].reshape(-1)) == set(range(8, 16))
    assert (
        shares("dealt", 16, 4, work=list(range(16)), group=1).tolist() == np.arange(16).reshape(4, 4).tolist()
    )


def test_tokens_and_arrays_are_laid_out_alike():
    tokens, order = Tokens.packed([3, 4], length=8), layout_order("zigzag", 8, 2)
    placed = lay_out(tokens, order)
    assert placed.position.tolist() == [0, 1, 3, 0, 2, 0, 1, 2]
    assert placed.segment.tolist() == [1, 1, 2, 0, 1, 2, 2, 2]
    q = jnp.arange(16.0).reshape(1, 8, 2, 1)
    assert np.array_equal(lay_out(q, order, axis=1)[0, :, 0, 0], 2.0 * order)
    assert np.array_equal(restore(lay_out(q, jnp.asarray(order), axis=1), jnp.asarray(order), axis=1), q)
    batch = {"tokens": np.arange(16).reshape(2, 8)}
    assert isinstance(lay_out(batch, order)["tokens"], np.ndarray)


def test_a_default_stripe_is_at_most_a_block_and_an_even_number_of_them_fit():
    for share in (2, 6, 64, 1_000, 1_500, 16_384):
        stripe = default_stripe(8 * share, 8)
        assert stripe <= 512
        assert share // stripe % 2 == 0
    assert default_stripe(8 * 1_024, 8, most=64) == 64


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("spiral", 8, 2), {}, ValueError, "layout must be one of 'contiguous', .* got 'spiral'"),
        (("contiguous", 9, 2), {}, ValueError, "contiguous: length must be a multiple of 2 devices, got 9"),
        (("zigzag", 6, 2), {}, ValueError, "zigzag: length must be a multiple of 2 · 2 devices, got 6"),
        (("striped", 9, 2), {}, ValueError, "striped: length must be a multiple of 2 devices, got 9"),
        (("contiguous", 8, 0), {}, ValueError, "at least 1, got 8 and 0"),
        (("striped", 8, 2), {"stripe": 3}, ValueError, "stripe must divide the 4 tokens of a device, got 3"),
        (("zigzag", 8, 2), {"stripe": 2}, TypeError, "stripe is for 'striped' alone, got it for 'zigzag'"),
        (("striped", 8, 2), {"group": 2}, TypeError, "group is for 'dealt' alone, got it for 'striped'"),
        (("dealt", 8, 2), {}, ValueError, "work must say what each stripe of the row costs"),
        (("dealt", 8, 2), {"work": [1, 2, 3]}, ValueError, r"work must hold one number a stripe.*\(3,\)"),
        (
            ("dealt", 8, 4),
            {"work": [1] * 4, "group": 3},
            ValueError,
            "group must divide the 4 devices, got 3",
        ),
    ],
)
def test_misuse_is_refused_by_name(arguments, options, error, message):
    with pytest.raises(error, match=message):
        layout_order(*arguments, **options)


def test_arrays_of_another_length_are_refused():
    order, q = layout_order("zigzag", 8, 2), np.zeros((2, 8, 4, 16))
    for move in (lay_out, restore):
        with pytest.raises(ValueError, match=r"order is of 8 tokens, and axis -1 of \(2, 8, 4, 16\) is not"):
            move(q, order)
        with pytest.raises(ValueError, match="order is of 8 tokens, and axis 1"):
            move(np.zeros((2, 16, 4, 16)), order, axis=1)
