"""The train step: pure, compiled once for a whole curriculum, and it learns."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_cases import small_run

from dynmask_jax import Tokens, mask_tensor
from train.config import Curriculum
from train.data import corpus
from train.step import State, adamw, begin, causal_pairs


@pytest.fixture
def run(tmp_path):
    return small_run(tmp_path)


def trained(run, steps):
    """The state and the metrics of each step; the step may be traced once."""
    chex.clear_trace_counter()
    program, state = begin(run)
    train_step = jax.jit(chex.assert_max_traces(program.train_step, n=1))
    text, history = corpus(run.data, run.seed), []
    for step in range(steps):
        state, metrics = train_step(state, text.train[step])
        history.append(metrics)
    return program, state, history


@pytest.mark.parametrize("kind", ["window", "chunks", "reveal"])
def test_a_whole_curriculum_is_one_compilation(run, kind):
    run = replace(run, curriculum=replace(run.curriculum, kind=kind, chunk=8))
    program, state, history = trained(run, run.steps)
    windows = [int(metrics.window) for metrics in history]
    assert windows == sorted(windows)
    assert (windows[0], windows[-1], len(set(windows))) == (4, 32, 6)
    assert int(state.step) == run.steps
    for step, metrics in enumerate(history):
        visible = mask_tensor(program.growth.mask(step), Tokens.sequence(32)).sum()
        assert float(metrics.exposure) == pytest.approx(float(visible) / causal_pairs(32), rel=1e-6)
    assert float(history[-1].exposure) == 1.0


def test_the_first_loss_is_that_of_a_uniform_guess(run):
    _, _, history = trained(run, 1)
    assert float(history[0].loss) == pytest.approx(np.log(256), rel=1e-5)


def test_the_loss_falls_far_below_single_letters(run):
    # 13 letters at their frequencies have an entropy of 2.3 nats; words that repeat have less.
    run = replace(run, steps=150)
    _, _, history = trained(run, run.steps)
    assert np.mean([float(metrics.loss) for metrics in history[-10:]]) < 1.6


def test_evaluation_sees_everything_whatever_the_curriculum(run):
    _, state, _ = trained(run, 4)
    rows = corpus(run.data, run.seed).train[0]
    losses = {}
    for kind in ("full", "static", "window"):
        other = replace(run, curriculum=Curriculum(kind=kind, chunk=4, start=4))
        program, _ = begin(other)
        losses[kind] = float(jax.jit(program.evaluation_step)(state.params, rows))
        first_step = State(jnp.zeros((), jnp.int32), state.params, state.optimizer)
        _, metrics = jax.jit(program.train_step)(first_step, rows)
        assert (float(metrics.loss) == pytest.approx(losses[kind], rel=1e-5)) == (kind == "full")
    assert losses["full"] == losses["static"] == losses["window"]


@jax.numpy_dtype_promotion("standard")  # optax's own
def test_clipping_bounds_the_update_that_a_gradient_can_make(run):
    optimizer = adamw(replace(run.optimizer, clip=1e-3, weight_decay=0.0), run.steps)
    params = {"w": jnp.zeros((2, 2))}
    # Twice the gradient, both beyond the clip, is the same gradient.
    states = [
        optimizer.update({"w": jnp.full((2, 2), g)}, optimizer.init(params), params) for g in (1.0, 2.0)
    ]
    chex.assert_trees_all_close(states[0][1], states[1][1])


@jax.numpy_dtype_promotion("standard")
def test_the_rate_warms_up_from_zero_and_only_matrices_decay(run):
    optimizer = adamw(replace(run.optimizer, warmup=0.5, weight_decay=0.5), run.steps)
    params = {"matrix": jnp.ones((2, 2)), "vector": jnp.ones((2,))}
    gradients = jax.tree.map(jnp.zeros_like, params)
    updates, state = optimizer.update(gradients, optimizer.init(params), params)
    assert not updates["matrix"].any()
    updates, _ = optimizer.update(gradients, state, params)
    assert (updates["matrix"] < 0).all()
    assert not updates["vector"].any()
