"""The monoid of partial softmaxes."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dynmask_jax import merge
from dynmask_jax.online_softmax import Partial, extend, normalize


def partial(logits, values):
    nothing = Partial.empty((*logits.shape[:-1], values.shape[-1]), logits.dtype)
    return extend(nothing, logits, lambda weights: weights @ values)


def pieces(hidden):
    """Twelve keys for two queries in three pieces; a hidden piece is seen by neither."""
    logits = 5 * jax.random.normal(jax.random.key(0), (2, 12))
    values = jax.random.normal(jax.random.key(1), (12, 3))
    parts = []
    for n, hide in enumerate(hidden):
        logits = logits.at[:, 4 * n : 4 * n + 4].add(-jnp.inf if hide else 0.0)
        parts.append(partial(logits[:, 4 * n : 4 * n + 4], values[4 * n : 4 * n + 4]))
    return parts, normalize(partial(logits, values))


def same(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=3e-6, atol=1e-6)


@given(st.tuples(st.booleans(), st.booleans(), st.booleans()))
def test_merge_is_associative_commutative_and_right(hidden):
    (a, b, c), whole = pieces(hidden)
    same(normalize(merge(merge(a, b), c)), whole)
    same(normalize(merge(a, merge(b, c))), whole)
    same(normalize(merge(c, merge(b, a))), whole)


def test_nothing_is_neutral():
    (a, _, _), _ = pieces((False, False, False))
    nothing = Partial.empty((2, 3), jnp.float32)
    for merged in (merge(a, nothing), merge(nothing, a)):
        assert (merged.weighted == a.weighted).all()
        assert (merged.total == a.total).all()
        assert (merged.peak == a.peak).all()
    out, lse = normalize(merge(nothing, nothing))
    assert (out == 0).all()
    assert np.isneginf(np.asarray(lse)).all()


def test_finished_pairs_merge_too():
    (a, b, c), whole = pieces((False, True, False))
    same(merge(merge(normalize(a), normalize(b)), normalize(c)), whole)


def test_logits_far_apart_do_not_overflow():
    far = jnp.array([[3e4, -3e4]])
    out, lse = normalize(merge(partial(far[:, :1], jnp.ones((1, 1))), partial(far[:, 1:], jnp.zeros((1, 1)))))
    assert out == 1.0
    assert lse == 3e4
