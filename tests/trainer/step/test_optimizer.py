"""AdamW as configured: warm-up, decay of matrices alone, clipping, and steps that are not finite."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.config.sections import Optimizer
from train.step.optimizer import learning_rate, make_optimizer

pytestmark = pytest.mark.usefixtures("optax_promotion")
PARAMS = {"layer": {"kernel": jnp.ones((2, 2)), "scale": jnp.ones((3, 2))}, "embedding": jnp.ones((4, 2))}


@pytest.fixture
def optax_promotion():
    """optax raises floats to whole-number counts."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_clipping_bounds_the_update_that_a_gradient_can_make():
    optimizer = make_optimizer(Optimizer(clip=1e-3, weight_decay=0.0), 8)
    # Twice the gradient, both beyond the clip, is the same gradient.
    states = [
        optimizer.update(jax.tree.map(lambda x, g=g: g * x, PARAMS), optimizer.init(PARAMS), PARAMS)
        for g in (1.0, 2.0)
    ]
    chex.assert_trees_all_close(states[0][1], states[1][1])


def test_only_matrices_decay_and_stacked_scales_are_none():
    optimizer = make_optimizer(Optimizer(warmup=0.5, weight_decay=0.5), 8)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = optimizer.update(zeros, optimizer.init(PARAMS), PARAMS)
    assert (updates["layer"]["kernel"] < 0).all()
    assert (updates["embedding"] < 0).all()
    assert not updates["layer"]["scale"].any()


def test_the_rate_rises_to_its_peak_and_falls_to_its_final_share():
    rate = learning_rate(Optimizer(learning_rate=2.0, warmup=0.25, final=0.1), 8)
    assert [float(rate(step)) for step in (0, 1)] == [1.0, 2.0]
    assert float(rate(7)) == pytest.approx(0.2), "of the last step, whose number is 7"
    assert np.all(np.diff([float(rate(step)) for step in range(1, 8)]) < 0)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 40, 1_000])
@pytest.mark.parametrize("warmup", [0.0, 0.01, 0.05, 0.5, 0.99])
def test_the_rate_is_the_formula_that_the_docstring_states(steps, warmup):
    options = Optimizer(learning_rate=3.0, warmup=warmup, final=0.1)
    rate, rising = learning_rate(options, steps), min(max(1, round(steps * warmup)), max(1, steps - 1))
    numbers = np.arange(steps)
    falling = (1 + np.cos(np.pi * (numbers - rising + 1) / max(1, steps - rising))) / 2
    expected = np.where(numbers < rising, (numbers + 1) / rising, 0.1 + 0.9 * falling)
    found = np.array([float(rate(step)) for step in numbers])
    np.testing.assert_allclose(found, 3.0 * expected, rtol=1e-5, atol=1e-6)
    assert found[0] > 0, "the first step changes something"
    assert steps == 1 or found[-1] == pytest.approx(0.3)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_have_a_rate(steps):
    rate = learning_rate(Optimizer(warmup=0.9), steps)
    assert np.isfinite([float(rate(step)) for step in range(steps + 1)]).all()


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_gradients_that_are_not_finite_change_only_the_counts(value):
    optimizer = make_optimizer(Optimizer(warmup=0.0), 8)
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    broken = {**ones, "embedding": ones["embedding"].at[1, 1].set(value)}
    _, before = optimizer.update(ones, optimizer.init(PARAMS), PARAMS)
    state = before
    for skipped in range(1, 4):
        updates, state = optimizer.update(broken, state, PARAMS)
        assert not any(leaf.any() for leaf in jax.tree.leaves(updates))
        assert (state.notfinite_count, state.total_notfinite) == (skipped, skipped)
    chex.assert_trees_all_equal(state.inner_state, before.inner_state)
    updates, state = optimizer.update(ones, state, PARAMS)
    assert (state.notfinite_count, state.total_notfinite) == (0, 3)
    expected, _ = optimizer.update(ones, before, PARAMS)
    chex.assert_trees_all_equal(updates, expected)
    assert float(optax.tree.norm(updates)) > 0
