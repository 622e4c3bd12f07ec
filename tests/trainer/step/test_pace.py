"""The pace by validation loss: whatever the losses, the full mask is reached, in time."""

from dataclasses import replace

import chex
import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.config.sections import Curriculum
from train.step.pace import advance, clock, first_stage

LOSS = Curriculum(pace="loss", stages=4, tolerance=0.1, patience=3)


def stages(losses, options=LOSS):
    pace, seen = first_stage(), []
    for loss in losses:
        pace = advance(pace, loss, options)
        seen.append(int(pace.stage))
    return seen


def test_a_stage_lasts_while_the_loss_falls_by_more_than_the_tolerance():
    assert stages([5.0, 4.0, 3.7]) == [0, 0, 1]
    assert stages([5.0, 4.0, 3.5]) == [0, 0, 1], "or until patience runs out"
    assert stages([5.0, 4.5, 5.0, 9.0, 8.0, 7.9, 7.0, 6.9]) == [0, 0, 1, 1, 1, 2, 2, 3]


def test_the_best_of_a_stage_is_forgotten_in_the_next():
    assert stages([1.0, 1.0, 5.0, 4.0, 3.99]) == [0, 1, 1, 1, 2]


def test_a_stage_lasts_as_long_as_patience_allows():
    patient = replace(LOSS, patience=9)
    assert stages([5.0, 4.0, 3.65, 3.6], patient) == [0, 0, 1, 1]
    assert stages([5.0, 4.0, 3.5, 3.1, 2.7], patient) == [0, 0, 0, 0, 0]


def test_nan_is_no_improvement():
    assert stages([5.0, np.nan, np.nan, np.nan]) == [0, 1, 1, 2]
    assert stages([np.nan, 5.0, 4.0, 3.5]) == [0, 1, 1, 1], "nor can one be told after it"


@given(
    losses=st.lists(st.floats(width=32), min_size=24, max_size=24),
    count=st.integers(1, 6),
    patience=st.integers(1, 4),
    tolerance=st.sampled_from([0.0, 0.01, 0.5, 1.0, 3.0]),
)
def test_any_losses_reach_the_last_stage_in_time_and_stay(losses, count, patience, tolerance):
    options = Curriculum(pace="loss", stages=count, patience=patience, tolerance=tolerance)
    seen = stages(losses, options)
    steps = np.diff([0, *seen])
    assert ((steps == 0) | (steps == 1)).all()
    assert seen[count * patience - 1] == count == seen[-1]


def test_the_clock_goes_from_the_first_step_to_the_end_of_the_growth():
    pace, clocks = first_stage(), []
    for _ in range(12):
        clocks.append(int(clock(pace, 777, 100, LOSS)))
        pace = advance(pace, np.nan, replace(LOSS, patience=1))
    assert clocks[:6] == [0, 25, 50, 75, 100, 100]
    assert clocks[-1] == 100


def test_the_pace_by_steps_is_the_step():
    assert int(clock(first_stage(), 777, 100, Curriculum())) == 777


def test_all_of_it_is_one_compilation():
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def move(pace, loss):
        pace = advance(pace, loss, LOSS)
        return pace, clock(pace, 0, 100, LOSS)

    pace, clocks = first_stage(), []
    for loss in np.float32([5, 4.9, 4, 3.9, 3, 2.9, 2, 1.9, 1.8]):
        pace, now = move(pace, loss)
        clocks.append(int(now))
    assert clocks == [0, 25, 25, 50, 50, 75, 75, 100, 100]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(pace)} == {"int32", "float32"}


@pytest.mark.parametrize("field", ["stage", "best", "waited"])
def test_nothing_changes_after_the_last_stage(field):
    pace = first_stage()
    for loss in [np.nan] * 12:
        pace = advance(pace, loss, LOSS)
    assert int(pace.stage) == 4
    np.testing.assert_array_equal(getattr(advance(pace, 0.5, LOSS), field), getattr(pace, field))
