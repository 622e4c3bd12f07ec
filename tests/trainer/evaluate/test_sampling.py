"""Sampling: which tokens may be drawn, and how often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.config.operation import Generation
from train.evaluate import sampling
from train.evaluate.sampling import next_tokens

SHARES = np.array([0.06, 0.34, 0.0, 0.25, 0.2, 0.15], np.float32)
DRAWS = 20_000


def frequencies(shares=SHARES, **options) -> np.ndarray:
    """How often each token is drawn, of `DRAWS` independent rows."""
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(shares)), (DRAWS, len(shares)))
    tokens = next_tokens(logits, jax.random.split(jax.random.key(1), DRAWS), Generation(**options))
    assert tokens.dtype == jnp.int32
    return np.bincount(tokens, minlength=len(shares)) / DRAWS


def share_of(kept, temperature=1.0) -> np.ndarray:
    """The distribution that is expected: the kept tokens' alone."""
    weights = np.where(np.isin(np.arange(len(SHARES)), kept), SHARES, 0) ** (1 / temperature)
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 1.0}, share_of([0, 1, 3, 4, 5])),
        ({"temperature": 0.5}, share_of([0, 1, 3, 4, 5], 0.5)),
        ({"temperature": 3.0}, share_of([0, 1, 3, 4, 5], 3.0)),
        ({"temperature": 1.0, "top_k": 1}, share_of([1])),
        ({"temperature": 1.0, "top_k": 3}, share_of([1, 3, 4])),
        ({"temperature": 2.0, "top_k": 2}, share_of([1, 3], 2.0)),
        ({"temperature": 1.0, "top_k": 99}, share_of([0, 1, 3, 4, 5])),
        ({"temperature": 1.0, "top_p": 1.0}, share_of([0, 1, 3, 4, 5])),
        # 0.34, 0.59, 0.79, 0.94, 1: each p is reached by the token that carries the sum past it.
        ({"temperature": 1.0, "top_p": 0.01}, share_of([1])),
        ({"temperature": 1.0, "top_p": 0.33}, share_of([1])),
        ({"temperature": 1.0, "top_p": 0.35}, share_of([1, 3])),
        ({"temperature": 1.0, "top_p": 0.60}, share_of([1, 3, 4])),
        ({"temperature": 1.0, "top_p": 0.93}, share_of([1, 3, 4, 5])),
        # The nucleus is that of the tempered distribution: at 0.5 the first has 0.1156 / 0.2442 = 0.473.
        ({"temperature": 0.5, "top_p": 0.46}, share_of([1])),
        ({"temperature": 0.5, "top_p": 0.48}, share_of([1, 3], 0.5)),
        # And of what top_k left: the first has 0.34 / 0.59 = 0.576.
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.57}, share_of([1])),
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.58}, share_of([1, 3])),
    ],
)
def test_tokens_are_drawn_as_often_as_they_should(options, expected):
    drawn = frequencies(**options)
    assert (drawn[expected == 0] == 0).all()
    np.testing.assert_allclose(drawn, expected, atol=4 * np.sqrt(0.25 / DRAWS))


@pytest.mark.parametrize(("candidates", "top_p"), [(1, 0.6), (2, 0.6), (3, 0.6), (4, 0.99), (6, 0.99)])
def test_a_nucleus_of_more_tokens_than_are_looked_at_first(candidates, top_p, monkeypatch):
    monkeypatch.setattr(sampling, "CANDIDATES", candidates)
    expected = share_of([1, 3, 4] if top_p == 0.6 else [0, 1, 3, 4, 5])
    drawn = frequencies(temperature=1.0, top_p=top_p)
    assert (drawn[expected == 0] == 0).all()
    np.testing.assert_allclose(drawn, expected, atol=4 * np.sqrt(0.25 / DRAWS))


def test_a_flat_row_does_not_change_the_token_of_another(monkeypatch):
    """Its nucleus has more tokens than are looked at first; that of the other has few."""
    monkeypatch.setattr(sampling, "CANDIDATES", 8)
    logits = jnp.stack([jnp.zeros(64), 3.0 * jax.random.normal(jax.random.key(5), (64,))])
    drawn = jax.jit(lambda x, keys: next_tokens(x, keys, Generation(temperature=1.0, top_p=0.8)))
    for seed in range(20):
        keys = jax.random.split(jax.random.key(seed), 2)
        alone = [drawn(logits[i : i + 1], keys[i : i + 1])[0] for i in range(2)]
        assert drawn(logits, keys).tolist() == np.array(alone).tolist()


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 50}])
def test_a_large_vocabulary_is_not_sorted(options):
    keys = jax.random.split(jax.random.key(0), 2)
    traced = jax.make_jaxpr(lambda x: next_tokens(x, keys, Generation(**options)))(jnp.zeros((2, 262_144)))
    assert "sort[" not in str(traced)


def test_of_equals_as_many_are_kept_as_asked_for():
    alike = np.full(4, 0.25, np.float32)
    np.testing.assert_allclose(frequencies(alike, temperature=1.0, top_k=2), [0.5, 0.5, 0, 0], atol=0.015)
    # Each p is the exact sum of the first tokens' shares: they suffice.
    np.testing.assert_allclose(frequencies(alike, temperature=1.0, top_p=0.5), [0.5, 0.5, 0, 0], atol=0.015)
    np.testing.assert_allclose(frequencies(alike, temperature=1.0, top_p=0.75)[3], 0)


def test_greedy_takes_the_likeliest_and_needs_no_key():
    logits = jax.random.normal(jax.random.key(2), (5, 33))
    assert next_tokens(logits).tolist() == np.argmax(logits, axis=-1).tolist()
    assert next_tokens(jnp.zeros((1, 4))).tolist() == [0]


def test_a_row_is_drawn_alone():
    logits = jax.random.normal(jax.random.key(3), (6, 50))
    keys = jax.random.split(jax.random.key(4), 6)
    options = Generation(temperature=1.0, top_k=20, top_p=0.9)
    together = next_tokens(logits, keys, options)
    alone = [next_tokens(logits[i : i + 1], keys[i : i + 1], options)[0] for i in (4, 0, 2)]
    assert together[np.array([4, 0, 2])].tolist() == np.array(alone).tolist()


def test_it_is_traced_and_takes_bfloat16():
    logits = jnp.log(jnp.asarray(SHARES)).astype(jnp.bfloat16)[None, :]
    keys = jax.random.split(jax.random.key(0), 1)
    drawn = jax.jit(lambda x: next_tokens(x, keys, Generation(temperature=0.7, top_p=0.5)))(logits)
    assert drawn[0] in (1, 3)


def test_drawing_without_keys_is_refused():
    with pytest.raises(ValueError, match=r"keys must be given to draw at temperature 0\.5"):
        next_tokens(jnp.zeros((1, 4)), None, Generation(temperature=0.5))
