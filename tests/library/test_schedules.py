"""Schedules: exact at both ends, whole, monotone, close to their formula, refused when ill-built."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynmask_jax import constant, cubic, exponential, growing_window, linear, root, sine, staircase

FORMULAS = {
    "linear": (linear, {}, lambda a, b, x: a + (b - a) * x),
    "sine": (sine, {}, lambda a, b, x: a + (b - a) * math.sin(math.pi * x / 2)),
    "exponential": (exponential, {}, lambda a, b, x: a * (b / a) ** x),
    "root": (root, {"degree": 3.0}, lambda a, b, x: a + (b - a) * x ** (1 / 3)),
    "cubic": (cubic, {}, lambda a, b, x: a + (b - a) * (4 * x**3 - 6 * x**2 + 3 * x)),
    "staircase": (staircase, {"stairs": 4}, lambda a, b, x: a + (b - a) * math.floor(x * 4 + 1e-9) / 4),
}
ALL = pytest.mark.parametrize("name", FORMULAS)


@ALL
@given(
    start=st.integers(1, 64),
    end=st.integers(1, 64),
    multiple_of=st.integers(1, 32),
    steps=st.integers(1, 5_000),
)
def test_whole_numbers(name, start, end, multiple_of, steps):
    schedule, options, formula = FORMULAS[name]
    start, end = start * multiple_of, end * multiple_of
    values = schedule(start, end, steps, multiple_of=multiple_of, **options)
    at = np.unique(np.linspace(0, steps, 12).astype(int))
    got = np.array([int(values(int(step))) for step in at])
    exact = np.array([formula(start, end, step / steps) for step in at])
    assert got[0] == start
    assert got[-1] == end
    assert (got % multiple_of == 0).all()
    assert int(values(-1)) == start
    assert int(values(steps + 1)) == int(values(10**9)) == end
    assert (got <= exact + 2e-4 * multiple_of + 1e-5 * max(start, end)).all()
    assert (got > exact - multiple_of - 1e-5 * max(start, end)).all()
    assert (np.diff(got) * np.sign(end - start) >= 0).all()


@ALL
def test_fractions(name):
    schedule, options, formula = FORMULAS[name]
    values = jax.jit(schedule(0.25, 1.0, 80, **options))
    steps = jnp.arange(-2, 90)
    expected = [formula(0.25, 1.0, min(max(int(step), 0) / 80, 1.0)) for step in steps]
    np.testing.assert_allclose(jax.vmap(values)(steps), expected, rtol=1e-5)
    assert values(80) == values(10**9) == 1.0


def test_whole_or_not_is_the_type_of_the_ends():
    assert linear(0, 1, 10)(5).dtype == jnp.int32
    assert linear(0.0, 1, 10)(5).dtype == jnp.float32
    assert constant(3)(0).dtype == jnp.int32
    assert constant(0.5)(0).dtype == jnp.float32


def test_a_multiple_is_reached_when_it_is_due():
    """Floats that fall a hair short of a multiple must not hold it back a step."""
    window = linear(0, 300, 300, multiple_of=3)
    got = [int(window(step)) for step in range(0, 300, 3)]
    assert got == list(range(0, 300, 3))


def test_optax_schedules_will_do():
    curriculum = growing_window(optax.linear_schedule(2.0, 10.0, 8))
    assert int(curriculum(0).b.length) == 2
    assert int(jax.jit(curriculum)(3).b.length) == 5


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: linear(1, 2, 0), ValueError, "steps must be at least 1, got 0"),
        (lambda: sine(1, 2, -5), ValueError, "steps must be at least 1, got -5"),
        (lambda: linear(1, 2, 1.5), TypeError, "steps must be a whole number, got 1.5"),
        (
            lambda: linear(1, 256, 10, multiple_of=128),
            ValueError,
            "start must be a multiple of multiple_of=128, got 1",
        ),
        (
            lambda: linear(0, 200, 10, multiple_of=128),
            ValueError,
            "end must be a multiple of multiple_of=128, got 200",
        ),
        (lambda: linear(0, 1, 10, multiple_of=0), ValueError, "multiple_of must be at least 1"),
        (
            lambda: linear(0.0, 4, 10, multiple_of=2),
            TypeError,
            "multiple_of is for whole numbers, got start=0.0",
        ),
        (lambda: linear(0, math.inf, 10), ValueError, "end must be finite"),
        (lambda: linear("a", 1, 10), TypeError, "start must be a Python number"),
        (lambda: exponential(0, 8, 10), ValueError, "exponential: start must be positive, got 0"),
        (lambda: exponential(8, -1, 10), ValueError, "exponential: end must be positive, got -1"),
        (lambda: root(0, 8, 10, degree=0), ValueError, "root: degree must be positive, got 0"),
        (lambda: staircase(0, 8, 10, stairs=0), ValueError, "stairs must be at least 1, got 0"),
        (lambda: constant(2**40), ValueError, "value must fit int32"),
        (lambda: constant(None), TypeError, "value must be a Python number"),
    ],
)
def test_ill_built_schedules_are_refused(build, error, words):
    with pytest.raises(error, match=words):
        build()
