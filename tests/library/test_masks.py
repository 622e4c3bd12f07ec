"""Masks: what each shows, how they combine, and that their reading over blocks is never wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MASKS
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import blocks, masks, spans_of

from dynmask_jax import (
    Causal,
    Chunks,
    Everything,
    Mask,
    Predicate,
    Prefix,
    RandomChunks,
    SameSegment,
    Select,
    Sinks,
    Span,
    Strided,
    Tokens,
    Window,
    mask_tensor,
)
from dynmask_jax.mask_algebra import evaluate, head_count, visible_pairs


def row(mask, query, length=8):
    """What one query sees of the keys 0 … length − 1, as a string of 0 and 1."""
    return "".join("1" if seen else "0" for seen in mask_tensor(mask, Tokens.sequence(length))[query])


@pytest.mark.parametrize(
    ("mask", "query", "expected"),
    [
        (Everything(), 2, "11111111"),
        (Causal(), 3, "11110000"),
        (Causal() & Window(1), 3, "00010000"),
        (Causal() & Window(3), 4, "00111000"),
        (Causal() & Window(0), 4, "00000000"),
        (Window(2), 4, "00011111"),
        (Window(2, ahead=1), 4, "00011100"),
        (Chunks(3), 4, "00011100"),
        (Chunks(3), 3, "00011100"),
        (Causal() & Chunks(4), 5, "00001100"),
        (Prefix(3), 1, "11100000"),
        (Causal() | Prefix(3), 4, "11111000"),
        (Sinks(2), 7, "11000000"),
        (Strided(3), 4, "01001001"),
        (Causal() & Window(7) & Strided(3), 6, "10010010"),
        (RandomChunks(2, 0.0), 4, "00000000"),
        (RandomChunks(2, 1.0), 4, "11111111"),
        (RandomChunks(2, 0.5), 4, "00110000"),
        (~Causal(), 3, "00001111"),
        (Causal() & ~Sinks(2), 4, "00111000"),
        (Select(True, Causal(), Everything()), 1, "11000000"),
        (Select(False, Causal(), Everything()), 1, "11111111"),
        (Predicate(lambda q, k: (q.position - k.position) % 4 < 2), 5, "11001100"),
        (Predicate(lambda q, k, n: k.position < n, 2), 5, "11000000"),
        (Predicate(lambda q, k: True), 5, "11111111"),
    ],
    ids=repr,
)
def test_a_pinned_row_of_each_mask(mask, query, expected):
    assert row(mask, query) == expected


def test_padding_sees_nothing_and_is_never_seen():
    tokens = Tokens.packed([2, 3], length=7)
    shown = mask_tensor(SameSegment(), tokens).astype(int)
    assert shown.tolist() == [
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ]


def test_the_methods_worked_example_and_the_leak_of_its_multiplicative_mask():
    """Five tokens, T = 2: row i sees columns 0 … 4 − i (design, section 2).

    The method multiplies the scores by the mask before the softmax. A masked score is then 0, not
    −∞, and still takes weight; ours takes exactly none.
    """
    staircase = Predicate(lambda q, k: q.position + k.position <= 4)
    visible = mask_tensor(staircase, Tokens.sequence(5))
    assert visible.astype(int).tolist() == [
        [1, 1, 1, 1, 1],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 0, 0, 0],
    ]
    embedded = jnp.arange(1.0, 6.0)[:, None] * jnp.array([[0.3, -0.2]])
    scores = embedded @ embedded.T / np.sqrt(2)
    multiplied = jax.nn.softmax(scores * visible.astype(jnp.float32), axis=-1)
    hidden = ~np.asarray(visible)
    assert (np.asarray(multiplied)[hidden] > 0.05).all(), "the multiplicative mask leaks"

    from dynmask_jax import attention

    q = k = embedded[None, :, None, :]
    values = jnp.eye(5)[None, :, None, :]
    for backend in ("dense", "xla"):
        padded = [jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, 3))) for x in (q, k)]
        weights = attention(*padded, values, staircase, scale=2**-0.5, backend=backend)[0, :, 0]
        assert (np.asarray(weights)[hidden] == 0.0).all()
        np.testing.assert_allclose(weights.sum(axis=-1), 1.0, rtol=1e-6)
        expected = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        np.testing.assert_allclose(weights, expected, rtol=1e-5, atol=1e-7)


@given(st.floats(0, 1, width=32), st.floats(0, 1, width=32))
def test_random_chunks_are_nested_in_their_fraction(a, b):
    few, many = (mask_tensor(RandomChunks(2, f, seed=1), Tokens.sequence(30)) for f in sorted((a, b)))
    assert not (few & ~many).any()


def test_random_chunks_show_their_fraction_anew_for_each_seed():
    tokens = Tokens.sequence(200)
    shown = [mask_tensor(RandomChunks(1, 0.3, seed=seed), tokens) for seed in (0, 1)]
    for each in shown:
        assert abs(each.mean() - 0.3) < 0.01
    assert abs((shown[0] & shown[1]).mean() - 0.09) < 0.01


@settings(max_examples=100)
@given(mask=masks(), queries=blocks(), keys=blocks())
def test_the_verdict_is_sound(mask, queries, keys):
    with jax.numpy_dtype_promotion("standard"):
        pairs = np.asarray(visible_pairs(mask, queries, keys))
        verdict = evaluate(mask, spans_of(queries), spans_of(keys))
    assert not verdict.every or pairs.all()
    assert verdict.some or not pairs.any()


def test_mask_tensor_shapes():
    tokens, batch = Tokens.sequence(5), Tokens(jnp.zeros((2, 5), jnp.int32))
    assert mask_tensor(Causal(), tokens).shape == (5, 5)
    assert mask_tensor(Causal(), tokens, Tokens.sequence(3)).shape == (5, 3)
    assert mask_tensor(Causal(), batch).shape == (2, 5, 5)
    assert mask_tensor(Causal(), tokens, batch).shape == (2, 5, 5)
    assert mask_tensor(MASKS["per_head_window"], tokens).shape == (4, 5, 5)
    assert mask_tensor(MASKS["per_head_window"], batch).shape == (2, 4, 5, 5)
    assert mask_tensor(Everything(), batch).dtype == jnp.bool_


def test_per_head_leaves_give_each_head_its_own_mask():
    lengths = [1, 4, 16, 64]
    together = mask_tensor(Causal() & Window(jnp.array(lengths)), Tokens.sequence(20))
    for head, length in enumerate(lengths):
        assert (together[head] == mask_tensor(Causal() & Window(length), Tokens.sequence(20))).all()


def test_a_mask_is_a_pytree_of_its_numbers():
    mask = Causal() & (Window(3) | ~Sinks(2)) & Predicate(lambda q, k, n: k.position < n, 5)
    assert jax.tree.leaves(mask) == [3, 2, 5]
    doubled = jax.tree.map(lambda leaf: 2 * leaf, mask)
    assert row(doubled, 7, 12) == row(Causal() & (Window(6) | ~Sinks(4)) & Prefix(10), 7, 12)


def test_a_mask_prints_as_it_is_written():
    assert repr(Causal() & (Window(3) | ~Chunks(2))) == (
        "(Causal() & (Window(length=3, ahead=None) | ~Chunks(length=2)))"
    )


def test_a_predicate_may_use_what_spans_cannot_follow():
    mask = Predicate(lambda q, k: jnp.bitwise_and(q.position, k.position) == 0)
    block = Tokens(Span(jnp.array(0), jnp.array(3)), Span(jnp.array(1), jnp.array(1)))
    with pytest.warns(UserWarning, match="cannot be read over blocks .* it is right, but skips no block"):
        verdict = evaluate(Causal() & mask, block, block)
    assert verdict.some
    assert not verdict.every
    with pytest.warns(UserWarning, match="cannot be read over blocks"):
        assert not evaluate(~Causal() & mask, block, Tokens(Span(-9, -5), Span(1, 1))).some, (
            "others still skip"
        )


def test_a_verdict_is_not_a_number():
    """A flag of 0 or 1 compares with booleans pair by pair; over blocks that must not pass for False."""
    mask = Predicate(lambda q, k, flag: (k.position <= q.position) == flag, 1)
    block = Tokens(Span(jnp.array(4), jnp.array(7)), Span(jnp.array(1), jnp.array(1)))
    warns = pytest.warns(UserWarning, match="cannot be read over blocks")
    with jax.numpy_dtype_promotion("standard"), warns:
        verdict = evaluate(mask, block, block)
    assert verdict.some
    assert not verdict.every


def test_a_predicate_that_is_wrong_raises_its_own_error():
    mask = Predicate(lambda q, k: q.place < k.place)
    block = Tokens(Span(0, 3), Span(1, 1))
    with pytest.raises(AttributeError, match="place"):
        evaluate(mask, block, block)


def test_a_new_mask_is_one_class():
    from dynmask_jax.array_typing import Number, pytree

    @pytree
    class Far(Mask):
        distance: Number

        def visible(self, q, k):
            return q.position - k.position >= self.distance

    assert row(Far(3), 5) == "11100000"
    assert head_count(Far(jnp.array([1, 2]))) == 2


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: Window(-1), ValueError, "Window: length must be at least 0, got -1"),
        (lambda: Window(jnp.array([3, -2])), ValueError, "Window: length must be at least 0"),
        (lambda: Window(3, ahead=-1), ValueError, "Window: ahead must be at least 0, got -1"),
        (lambda: Window(2.5), TypeError, "Window: length must be a whole number, got 2.5"),
        (lambda: Window(True), TypeError, "Window: length must be a whole number, got True"),
        (lambda: Chunks(0), ValueError, "Chunks: length must be at least 1, got 0"),
        (lambda: Strided(0), ValueError, "Strided: stride must be at least 1, got 0"),
        (lambda: Sinks(-1), ValueError, "Sinks: count must be at least 0, got -1"),
        (lambda: Prefix("all"), TypeError, "Prefix: length must be a whole number, got 'all'"),
        (lambda: RandomChunks(4, 1.5), ValueError, "RandomChunks: fraction must lie in 0…1, got 1.5"),
        (lambda: Select(1, Causal(), Everything()), TypeError, "Select: flag must be boolean, got 1"),
        (lambda: Window(2**40), ValueError, "Window: length must fit int32"),
        (lambda: RandomChunks(4, "half"), TypeError, "RandomChunks: fraction must be a number, got 'half'"),
        (lambda: Select(True, Causal, Everything()), TypeError, r"got Causal: an instance, Causal\("),
        (lambda: mask_tensor(Causal(), 16), TypeError, r"q_tokens must be Tokens \(Tokens.sequence"),
        (
            lambda: mask_tensor(lambda step: Causal(), Tokens.sequence(3)),
            TypeError,
            r"mask must be a Mask, got function; .* curriculum\(step\)",
        ),
        (
            lambda: jax.eval_shape(lambda n: Predicate(lambda q, k: q.position < n).function and n, 3),
            ValueError,
            r"closes over n, which is traced; .* Predicate\(lambda q, k, n: …, n\)",
        ),
        (lambda: Predicate(3), TypeError, "Predicate: function must be callable, got 3"),
        (lambda: bool(Causal()), TypeError, "combine masks with & | ~"),
        (lambda: Causal() and Window(3), TypeError, "no single truth value"),
        (lambda: Causal() & True, TypeError, "mask must be a Mask, got bool"),
        (
            lambda: head_count(Window(jnp.ones((2, 2), jnp.int32))),
            ValueError,
            "must be scalars or share one shape",
        ),
    ],
)
def test_wrong_masks_are_refused(build, error, words):
    with pytest.raises(error, match=words):
        build()
