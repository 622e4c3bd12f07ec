"""Curricula: nested, ending in the full mask, each order as its formula says."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dynmask_jax import (
    Causal,
    Everything,
    Predicate,
    Prefix,
    SameSegment,
    Tokens,
    constant,
    growing_chunks,
    growing_window,
    linear,
    mask_tensor,
    plan,
    reveal,
    staircase,
)

ORDERS = ("nearest", "oldest", "random", "strided", "partial")
BASES = {
    "causal": Causal(),
    "everything": Everything(),
    "prefix": Causal() | Prefix(10),
    "packed": Causal() & SameSegment(),
}
STEPS, LENGTH, CHUNK = 12, 36, 5
TOKENS = Tokens(jnp.arange(LENGTH), 1 + jnp.arange(LENGTH) // 20)
NESTED = {
    "growing_window": lambda base: growing_window(linear(1, LENGTH, STEPS), base=base),
    **{
        f"reveal_{order}": lambda base, order=order: reveal(CHUNK, linear(0.0, 1.0, STEPS), order, base=base)
        for order in ORDERS
    },
}


def shown_at(curriculum, step, tokens=TOKENS):
    return np.asarray(mask_tensor(curriculum(step), tokens))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", NESTED)
def test_nested_over_all_steps_and_ending_in_the_base(name, base):
    curriculum = NESTED[name](BASES[base])
    shown = [shown_at(curriculum, step) for step in range(STEPS + 3)]
    for earlier, later in itertools.pairwise(shown):
        assert not (earlier & ~later).any()
    full = np.asarray(mask_tensor(BASES[base], TOKENS))
    assert (shown[STEPS] == full).all()
    assert (shown[-1] == full).all()
    assert shown[0].sum() < full.sum() / 2
    assert len({each.sum() for each in shown}) >= 4, "it moves"


@pytest.mark.parametrize("order", ORDERS)
def test_reveal_shows_the_own_chunk_always_and_at_first_nothing_else(order):
    shown = shown_at(reveal(CHUNK, constant(0.0), order), 0)
    chunk = np.arange(LENGTH) // CHUNK
    assert (shown == np.tril(chunk[:, None] == chunk[None, :])).all()


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        # What a query of chunk 4 sees of chunks 0 … 3, whose 4 tokens stand side by side, at amount 1/2.
        ("nearest", "0000 0000 1111 1111"),
        ("oldest", "1111 1111 0000 0000"),
        ("strided", "1111 0000 1111 0000"),
        ("partial", "0011 0011 0011 0011"),
    ],
)
def test_half_revealed_in_each_order(order, expected):
    row = mask_tensor(reveal(4, constant(0.5), order)(0), Tokens.sequence(20))[17]
    assert "".join(map(str, row[:16].astype(int).tolist())) == expected.replace(" ", "")


def test_random_order_shows_its_share_and_depends_on_the_seed():
    shown = [shown_at(reveal(1, constant(0.3), "random", seed=s), 0, Tokens.sequence(150)) for s in (0, 1)]
    below = np.tril_indices(150, -1)
    assert abs(shown[0][below].mean() - 0.3) < 0.02
    assert (shown[0] != shown[1]).any()


def test_strided_skips_blocks_of_several_chunks():
    """Every eighth chunk of 16 tokens, in blocks of 32: most of what is hidden needs no look."""
    seen = plan(reveal(16, constant(0.125), "strided")(0), Tokens.sequence(1024), block_q=32, block_k=32)
    shown = mask_tensor(seen.mask, Tokens.sequence(1024)).reshape(32, 32, 32, 32).any((1, 3))
    computed = np.asarray(seen.codes[0]) > 0
    assert not (shown & ~computed).any()
    assert computed.sum() <= 1.5 * int(shown.sum())


def test_strided_goes_from_coarse_to_fine():
    row = mask_tensor(reveal(1, constant(0.25), "strided")(0), Tokens.sequence(17))[16]
    assert np.flatnonzero(row).tolist() == [0, 4, 8, 12, 16]


@pytest.mark.parametrize("order", ORDERS[:-1])
def test_an_encoder_sees_a_pair_of_chunks_from_both_sides(order):
    shown = shown_at(reveal(CHUNK, constant(0.4), order, base=Everything()), 0)
    assert (shown == shown.T).all()
    assert (np.tril(shown) == shown_at(reveal(CHUNK, constant(0.4), order), 0)).all()


def test_an_encoders_window_looks_both_ways():
    row = shown_at(growing_window(constant(3), base=Everything()), 0)[10]
    assert np.flatnonzero(row).tolist() == [8, 9, 10, 11, 12]


def test_growing_chunks_are_not_nested_unless_lengths_divide():
    grows = growing_chunks(linear(3, 4, 1))
    assert (shown_at(grows, 0) & ~shown_at(grows, 1)).any()
    doubles = growing_chunks(staircase(4, 12, 10, stairs=1))
    assert not (shown_at(doubles, 0) & ~shown_at(doubles, 10)).any()
    chunk = np.arange(LENGTH) // 4
    assert (shown_at(grows, 1) == np.tril(chunk[:, None] == chunk[None, :])).all()


def test_optax_schedules_and_traced_steps():
    curriculum = reveal(CHUNK, optax.linear_schedule(0.0, 1.0, STEPS), "nearest")
    traced = jax.jit(lambda step: mask_tensor(curriculum(step), TOKENS))
    ours = reveal(CHUNK, linear(0.0, 1.0, STEPS), "nearest")
    for step in (0, 5, STEPS):
        assert (np.asarray(traced(step)) == shown_at(ours, step)).all()


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_are_skipped_in_every_order(order):
    the_plan = plan(reveal(16, constant(0.25), order)(0), Tokens.sequence(128), block_q=16, block_k=16)
    skipped = (np.asarray(the_plan.codes[0]) == 0).mean()
    pairs = np.asarray(mask_tensor(the_plan.mask, Tokens.sequence(128))).reshape(8, 16, 8, 16)
    assert skipped == (~pairs.any(axis=(1, 3))).mean(), "chunks aligned with blocks: every empty one"


def test_a_window_of_nothing_is_the_same_inside_jit_and_outside():
    curriculum = growing_window(linear(0, 8, 8))
    assert not shown_at(curriculum, 0).any()
    assert not jax.jit(lambda step: mask_tensor(curriculum(step), TOKENS))(0).any()


def test_reveal_may_differ_by_head():
    shown = shown_at(reveal(CHUNK, lambda step: jnp.array([0.0, 0.5, 1.0])), 0)
    assert shown.shape == (3, LENGTH, LENGTH)
    assert shown[0].sum() < shown[1].sum() < shown[2].sum() == LENGTH * (LENGTH + 1) // 2


def test_a_curriculum_is_any_function_of_the_step():
    def of_my_own(step):
        return Causal() & Predicate(lambda q, k, n: abs(q.position - k.position) < n, step + 1)

    assert shown_at(of_my_own, 2).sum() == 3 * LENGTH - 3


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: growing_window(128), TypeError, r"length must be a schedule \(step -> number\), got 128"),
        (lambda: growing_window(constant(3), base=3), TypeError, "base must be a Mask, got int"),
        (lambda: growing_chunks(8), TypeError, "length must be a schedule"),
        (lambda: growing_window(constant(-3))(0), ValueError, "Window: length must be at least 0"),
        (lambda: reveal(0, constant(0.5)), ValueError, "Chunks: length must be at least 1, got 0"),
        (lambda: growing_chunks(linear(0, 8, 8))(0), ValueError, "Chunks: length must be at least 1"),
        (lambda: reveal(8, constant(0.5), seed=1.5), TypeError, "seed must be a whole number, got 1.5"),
        (lambda: reveal(8, 0.5), TypeError, "amount must be a schedule"),
        (
            lambda: reveal(8, constant(0.5), "newest"),
            ValueError,
            "order must be one of 'nearest', .*, got 'newest'",
        ),
        (lambda: reveal(8, linear(0, 1, 9))(7), TypeError, "amount must give fractions, .* got int32"),
        (lambda: reveal(8, constant(1.5))(7), ValueError, "amount must lie in 0…1, got 1.5 at step 7"),
    ],
)
def test_wrong_curricula_are_refused(build, error, words):
    with pytest.raises(error, match=words):
        build()
