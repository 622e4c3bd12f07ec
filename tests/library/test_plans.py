"""Plans: codes that agree with the mask, lists that hold each active block once, counts that are exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MASKS, SHAPES, UNREADABLE
from hypothesis import given, settings
from slow import examples
from strategies import masks

from dynmask_jax import (
    Causal,
    Everything,
    SameSegment,
    Tokens,
    Window,
    growing_window,
    linear,
    mask_tensor,
    plan,
)
from dynmask_jax.block_codes import FULL, SKIP, TEST, over_blocks
from dynmask_jax.plans import default_blocks

SHAPE = SHAPES["ragged"]


def pairs_of(the_plan):
    """The mask as `[R, N, T, S]`."""
    pairs = np.asarray(mask_tensor(the_plan.mask, the_plan.q_tokens, the_plan.kv_tokens))
    return pairs if pairs.ndim == 4 else pairs[:, None]


def block_of(the_plan, pairs, i, j):
    (bq, bk) = the_plan.block_q, the_plan.block_k
    return pairs[..., i * bq : (i + 1) * bq, j * bk : (j + 1) * bk]


def assert_sound(the_plan):
    pairs = pairs_of(the_plan)
    for (row, i, j), code in np.ndenumerate(the_plan.codes):
        block = block_of(the_plan, pairs[row], i, j)
        assert code != SKIP or not block.any(), "a skipped block hides nothing"
        assert code != FULL or block.all(), "a full block needs no test"
        if block.shape[-2:] != (the_plan.block_q, the_plan.block_k):
            assert code != FULL, "a ragged block has padding to hide"


@pytest.mark.parametrize("name", [name for name in MASKS if name != "unreadable"])
def test_codes_are_sound(name):
    assert_sound(plan(MASKS[name], *SHAPE.tokens(), block_q=SHAPE.block_q, block_k=SHAPE.block_k))


@settings(max_examples=examples(8, thorough=100))
@given(mask=masks())
def test_codes_of_random_compositions_are_sound(mask):
    with jax.numpy_dtype_promotion("standard"):
        assert_sound(plan(mask, *SHAPE.tokens(), block_q=SHAPE.block_q, block_k=SHAPE.block_k))


@pytest.mark.parametrize("name", ["causal", "window", "chunks", "prefix", "sinks", "everything", "nothing"])
def test_codes_are_exact_where_positions_run_in_order(name):
    the_plan = plan(MASKS[name], Tokens.sequence(48), block_q=8, block_k=16)
    pairs = pairs_of(the_plan)
    for (_, i, j), code in np.ndenumerate(the_plan.codes):
        block = block_of(the_plan, pairs, i, j)
        expected = SKIP if not block.any() else FULL if block.all() else TEST
        if name == "sinks" and expected == FULL:
            continue  # the union of two partial masks may fill a block: "test" is right, only slower
        assert code == expected, (i, j)


@pytest.mark.parametrize("code", [SKIP, TEST, FULL])
@pytest.mark.parametrize("line", [[], [0], [2], [1, 0, 2, 0, 1, 1, 0], [0, 0, 1], [2, 0, 0]], ids=str)
def test_a_line_is_folded_over_the_blocks_of_one_code_in_order(line, code):
    padded = jnp.array([*line, 1 - min(code, 1)], jnp.int8)
    expected = [place for place, each in enumerate(padded.tolist()) if each == code]
    # Digits of a number tell the order as well as the members.
    folded = over_blocks(padded, (code,), lambda block, total: total * 10 + block + 1, jnp.int32(0))
    assert folded == int("".join(str(place + 1) for place in expected) or "0")


@pytest.mark.parametrize("name", MASKS)
def test_visible_pairs_are_counted_exactly(name):
    warns = name == "unreadable"
    with pytest.warns(UserWarning, match=UNREADABLE) if warns else np.errstate():
        the_plan = plan(MASKS[name], *SHAPE.tokens(), block_q=8, block_k=8)
    pairs = pairs_of(the_plan)
    expected = pairs.sum() / pairs.shape[1]
    np.testing.assert_allclose(the_plan.visible_pairs(), expected, rtol=1e-6)
    np.testing.assert_allclose(the_plan.exposure(), expected / (2 * 37 * 53), rtol=1e-6)


def test_exposure_is_against_the_end_of_the_curriculum():
    curriculum = growing_window(linear(1, 64, 10))
    plans = [plan(curriculum(step), Tokens.sequence(64), block_q=16, block_k=16) for step in (0, 10)]
    np.testing.assert_allclose(plans[0].exposure(plans[1]), 64 / (64 * 65 / 2), rtol=1e-6)
    assert plans[1].exposure(plans[1]) == 1.0


def test_skipping_follows_the_mask():
    """A window of 1/8 in blocks of 1/16 leaves 3 of 16 blocks a row, minus those before the start."""
    the_plan = plan(Causal() & Window(128), Tokens.sequence(1024), block_q=64, block_k=64)
    assert int(the_plan.active) == 16 + 15 + 14
    assert int((the_plan.codes == FULL).sum()) == 15


def test_positions_not_slices_decide():
    """The same tokens in another order give the same pairs, permuted."""
    order = np.random.default_rng(0).permutation(48)
    shuffled = Tokens(jnp.arange(48)[order], 1 + jnp.arange(48)[order] // 20)
    the_plan = plan(Causal() & SameSegment(), shuffled, block_q=8, block_k=8)
    assert_sound(the_plan)
    straight = plan(Causal() & SameSegment(), Tokens(jnp.arange(48), 1 + jnp.arange(48) // 20))
    assert (pairs_of(the_plan) == pairs_of(straight)[:, :, order][:, :, :, order]).all()


def test_one_plan_serves_a_batch_or_each_row_has_its_own():
    assert plan(Causal(), Tokens.sequence(16)).rows == 1
    assert plan(SameSegment(), *SHAPE.tokens()).rows == 2
    assert plan(Causal(), Tokens.sequence(16), Tokens(jnp.zeros((3, 8), jnp.int32))).rows == 3


def test_blocks_by_default_and_at_most_the_sequence():
    the_plan = plan(Causal(), Tokens.sequence(1000), Tokens.sequence(100))
    assert (the_plan.block_q, the_plan.block_k) == (512, 100)
    assert plan(Causal(), Tokens.sequence(1000)).block_k == 512 == default_blocks("tpu")[1]
    assert default_blocks("gpu") == (128, 128)
    assert the_plan.codes.shape == (1, 2, 1)


def test_a_plan_prints_its_blocks():
    text = str(plan(Causal() & Window(8), Tokens.sequence(20), block_q=4, block_k=4))
    assert text.splitlines() == [
        "20 queries x 20 keys in blocks of 4 x 4: 33.0% of pairs visible, 52.0% of blocks skipped",
        "+....",
        "#+...",
        "+#+..",
        ".+#+.",
        "..+#+",
    ]
    large = str(plan(Causal(), Tokens.sequence(4096), block_q=16, block_k=16)).splitlines()
    assert len(large) == 65
    assert max(map(len, large[1:])) == 64
    traced = []
    jax.eval_shape(lambda: traced.append(str(plan(Causal(), Tokens.sequence(20)))))
    assert traced == ["Plan(20 queries x 20 keys, traced)"]


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (
            lambda: plan(jnp.ones((4, 4), bool), Tokens.sequence(4)),
            TypeError,
            "mask must be a Mask, got an array of bool",
        ),
        (
            lambda: plan(Causal(), 4),
            TypeError,
            r"q_tokens must be Tokens \(Tokens.sequence\(T\), say\), got int",
        ),
        (lambda: plan(Causal(), Tokens.sequence(4), jnp.arange(4)), TypeError, "kv_tokens must be Tokens"),
        (
            lambda: plan(Causal(), Tokens.sequence(4), block_q=0),
            ValueError,
            "block_q must be at least 1, got 0",
        ),
        (
            lambda: plan(Causal(), Tokens.sequence(4), block_q=8.0),
            TypeError,
            "block_q must be a Python int, got 8.0",
        ),
        (lambda: plan(Causal, Tokens.sequence(4)), TypeError, "mask must be a Mask, got Causal: an instance"),
        (lambda: plan(Causal(), Tokens.sequence(0)), ValueError, r"q_tokens must have shape .* got \(0,\)"),
        (
            lambda: plan(
                Causal(), Tokens(jnp.zeros((2, 4), jnp.int32)), Tokens(jnp.zeros((3, 4), jnp.int32))
            ),
            ValueError,
            r"one batch size, got \(2, 4\) and \(3, 4\)",
        ),
        (
            lambda: plan(Window(jnp.array([1, 2])) & Window(jnp.array([1, 2, 3])), Tokens.sequence(4)),
            ValueError,
            "must be scalars or share one shape",
        ),
    ],
)
def test_wrong_plans_are_refused(build, error, words):
    with pytest.raises(error, match=words):
        build()


def test_everything_is_one_list_of_full_blocks():
    the_plan = plan(Everything(), Tokens.sequence(32), block_q=8, block_k=8)
    assert (the_plan.codes == FULL).all()
    assert the_plan.exposure() == 1.0
