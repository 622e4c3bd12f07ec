"""Traces of chosen steps, and none left running."""

import jax
import jax.numpy as jnp
import pytest

from train.config.operation import Watch
from train.metrics.profile import Profile


@pytest.fixture
def calls(monkeypatch):
    """The profiler's starts and stops, and the steps done, in order; nothing is traced."""
    seen = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: seen.append(f"start {folder.name}"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append("stop"))
    monkeypatch.setattr(jax, "block_until_ready", lambda result: seen.append("wait"))
    return seen


def run(calls, tmp_path, steps, **watch):
    with Profile(tmp_path / "profile", Watch(**watch)) as profile:
        for step in steps:
            profile.step(step, calls.append, step)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (range(5), [0, "start profile", 1, 2, "wait", "stop", 3, 4]),
        (range(2, 5), ["start profile", 2, "wait", "stop", 3, 4]),  # goes on within
        (range(3, 5), [3, 4]),  # and after
        (range(2), [0, "start profile", 1, "stop"]),  # stops within
    ],
)
def test_the_chosen_steps_are_traced(calls, tmp_path, steps, expected):
    run(calls, tmp_path, steps, profile=1, profile_steps=2)
    assert calls == expected


def test_without_a_choice_nothing_is_traced(calls, tmp_path):
    run(calls, tmp_path, range(3))
    assert calls == [0, 1, 2]


def test_a_failure_stops_the_trace(calls, tmp_path):
    def fail(step):
        raise FloatingPointError(step)

    profile = Profile(tmp_path / "profile", Watch(profile=1))
    with pytest.raises(FloatingPointError), profile:
        profile.step(1, fail, 1)
    assert calls == ["start profile", "stop"]


def test_a_trace_has_the_steps_by_their_numbers(tmp_path):
    @jax.jit
    def train_step(x):
        return jax.lax.fori_loop(0, 3, lambda _, x: x @ x / 200, x)

    x = jnp.ones((200, 200))
    train_step(x)
    with Profile(tmp_path / "profile", Watch(profile=3, profile_steps=2)) as profile:
        for step in range(6):
            x = profile.step(step, train_step, x)
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(trace))
    steps = {
        value
        for plane in data.planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
        for name, value in event.stats
        if name == "step_num"
    }
    assert steps == {3, 4}
