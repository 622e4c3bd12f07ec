"""Tokens and the packing of documents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmask_jax import Tokens


def test_a_sequence_counts_from_its_start():
    tokens = Tokens.sequence(4, start=10)
    assert tokens.position.tolist() == [10, 11, 12, 13]
    assert tokens.segment.tolist() == [1, 1, 1, 1]
    assert tokens.position.dtype == tokens.segment.dtype == jnp.int32


def test_packed_documents():
    tokens = Tokens.packed([3, 1, 2], length=8)
    assert tokens.segment.tolist() == [1, 1, 1, 2, 3, 3, 0, 0]
    assert tokens.position.tolist() == [0, 1, 2, 0, 0, 1, 0, 1]
    assert Tokens.packed([2, 2]).segment.tolist() == [1, 1, 2, 2]


def test_tokens_index_like_arrays_and_go_through_jit():
    tokens = Tokens(np.arange(6).reshape(2, 3))
    assert tokens[:, None].shape == (2, 1, 3)
    assert jax.jit(lambda t: t[1])(tokens).position.tolist() == [3, 4, 5]


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (
            lambda: Tokens(jnp.arange(4), jnp.ones(3, jnp.int32)),
            ValueError,
            r"position and segment must have one shape, got \(4,\) and \(3,\)",
        ),
        (lambda: Tokens(jnp.arange(4.0)), TypeError, "position must hold integers, got float32"),
        (lambda: Tokens([0, 1], [True, False]), TypeError, "segment must hold integers, got bool"),
        (lambda: Tokens(np.array([2**32 + 5])), ValueError, "position must fit int32, got 4294967301"),
        (lambda: list(Tokens.sequence(3)), TypeError, "not iterable"),
        (lambda: Tokens.packed([3, 0]), ValueError, r"lengths must each be at least 1, got \[3, 0\]"),
        (
            lambda: Tokens.packed([3, 2], length=4),
            ValueError,
            "lengths sum to 5, more than the row's length 4",
        ),
    ],
)
def test_wrong_tokens_are_refused(build, error, words):
    with pytest.raises(error, match=words):
        build()
