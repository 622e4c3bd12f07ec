"""Schedules: a step counter in, a number out. Any `optax.Schedule` will do in their place.

Each takes the value from `start`, at step 0 and before, to `end`, at step `steps` and ever after,
exactly. Where both are ints the values are whole numbers (int32), rounded down to a multiple of
`multiple_of`; where either is a float they are float32. The step may be a Python int or traced.

The shapes are those of SkyLadder (Zhu et al. 2025, arXiv:2503.15450), with x = step / steps. Its
advice: linear is the safe default, start at 8 to 32 tokens, grow over about 60% of training.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal

import jax.numpy as jnp

from dynmask_jax.array_typing import Array, Float, Int, fits_int32

Step = int | Int[Array, ""]
Schedule = Callable[[Step], Array]
Shape = Callable[[Float[Array, ""]], Float[Array, ""]]
ScheduleName = Literal["linear", "exponential", "sine", "root", "cubic", "staircase"]
"""The keys of `SCHEDULES`."""


def constant(value: int | float) -> Schedule:
    """The same value at every step.

    >>> int(constant(256)(1_000))
    256
    """
    _check_number("value", value)
    return lambda step: jnp.asarray(value, jnp.int32 if isinstance(value, int) else jnp.float32)


def linear(start: int | float, end: int | float, steps: int, *, multiple_of: int = 1) -> Schedule:
    """start + (end − start)·x.

    Args:
      start, end: the values at steps 0 and `steps`.
      steps: how many steps it takes; at least 1.
      multiple_of: round whole numbers down to a multiple of this, which must divide both ends: a
        block size, say, so that no block is half visible.

    Raises:
      ValueError: steps or multiple_of below 1, or an end that is no multiple, or not finite.
      TypeError: an argument of another type; multiple_of beside float ends.

    >>> window = linear(128, 512, steps=100, multiple_of=128)
    >>> [int(window(step)) for step in (0, 50, 99, 100, 10_000)]
    [128, 256, 384, 512, 512]
    """
    return _between(lambda x: x, start, end, steps, multiple_of)


def sine(start: int | float, end: int | float, steps: int, *, multiple_of: int = 1) -> Schedule:
    """start + (end − start)·sin(πx/2): fast at first. Arguments and errors are those of `linear`.

    >>> window = sine(0, 1_000, steps=100)
    >>> [int(window(step)) for step in (0, 50, 99, 100, 10_000)]
    [0, 707, 999, 1000, 1000]
    """
    return _between(lambda x: jnp.sin(x * (math.pi / 2)), start, end, steps, multiple_of)


def exponential(start: int | float, end: int | float, steps: int, *, multiple_of: int = 1) -> Schedule:
    """start·(end / start)^x: slow at first, by a constant factor each step.

    Arguments and errors are those of `linear`, and both ends must be positive.

    >>> window = exponential(32, 512, steps=100)
    >>> [int(window(step)) for step in (0, 50, 90, 100, 10_000)]
    [32, 128, 388, 512, 512]
    """
    for name, value in (("start", start), ("end", end)):
        _check_number(name, value)
        if value <= 0:
            raise ValueError(f"exponential: {name} must be positive, got {value}")
    if start == end:
        return _between(lambda x: x, start, end, steps, multiple_of)
    ratio = end / start
    return _between(lambda x: (ratio**x - 1) / (ratio - 1), start, end, steps, multiple_of)


def root(
    start: int | float, end: int | float, steps: int, *, degree: float = 2.0, multiple_of: int = 1
) -> Schedule:
    """start + (end − start)·x^(1 / degree): fast at first. Arguments and errors are those of `linear`.

    Raises:
      ValueError: also where degree is not positive.

    >>> window = root(0, 1_000, steps=100)
    >>> [int(window(step)) for step in (0, 25, 99, 100, 10_000)]
    [0, 500, 994, 1000, 1000]
    """
    _check_number("degree", degree)
    if degree <= 0:
        raise ValueError(f"root: degree must be positive, got {degree}")
    return _between(lambda x: x ** (1 / degree), start, end, steps, multiple_of)


def cubic(start: int | float, end: int | float, steps: int, *, multiple_of: int = 1) -> Schedule:
    """start + (end − start)·(4x³ − 6x² + 3x): slow in the middle. Arguments and errors as `linear`.

    >>> window = cubic(0, 1_000, steps=100)
    >>> [int(window(step)) for step in (0, 25, 50, 99, 100, 10_000)]
    [0, 437, 500, 970, 1000, 1000]
    """
    return _between(lambda x: ((4 * x - 6) * x + 3) * x, start, end, steps, multiple_of)


def staircase(
    start: int | float, end: int | float, steps: int, *, stairs: int, multiple_of: int = 1
) -> Schedule:
    """start + (end − start)·⌊x·stairs⌋ / stairs: equal jumps, equally far apart, the last at `steps`.

    Arguments and errors are those of `linear`, and stairs must be at least 1.

    >>> window = staircase(128, 512, steps=90, stairs=3)
    >>> [int(window(step)) for step in (0, 29, 30, 60, 89, 90, 10_000)]
    [128, 128, 256, 384, 384, 512, 512]
    """
    _check_count("stairs", stairs)
    return _between(lambda x: jnp.floor(x * stairs + 1e-5) / stairs, start, end, steps, multiple_of)


SCHEDULES: Mapping[ScheduleName, Callable[..., Schedule]] = {
    "linear": linear,
    "exponential": exponential,
    "sine": sine,
    "root": root,
    "cubic": cubic,
    "staircase": staircase,
}
"""name -> `(start, end, steps, *, multiple_of=1) -> Schedule`; staircase needs `stairs` too."""


def _between(shape: Shape, start, end, steps, multiple_of) -> Schedule:
    _check_ends(start, end, steps, multiple_of)
    whole = isinstance(start, int) and isinstance(end, int)
    dtype = jnp.int32 if whole else jnp.float32

    def schedule(step: Step) -> Array:
        step = jnp.asarray(step)
        x = jnp.clip(step.astype(jnp.float32) / steps, 0.0, 1.0)
        value = start + (end - start) * shape(x)
        if whole:
            # float32 leaves a value that is a multiple just below it at times: 1e-4 of one is forgiven.
            value = jnp.floor(value / multiple_of + 1e-4) * multiple_of
        inner = value.astype(dtype)
        ends = jnp.where(step <= 0, jnp.asarray(start, dtype), jnp.asarray(end, dtype))
        return jnp.where((step > 0) & (step < steps), inner, ends)

    return schedule


def _check_ends(start, end, steps, multiple_of):
    _check_count("steps", steps)
    _check_count("multiple_of", multiple_of)
    for name, value in (("start", start), ("end", end)):
        _check_number(name, value)
        if multiple_of > 1 and not isinstance(value, int):
            raise TypeError(f"multiple_of is for whole numbers, got {name}={value!r}")
        if multiple_of > 1 and value % multiple_of:
            raise ValueError(f"{name} must be a multiple of multiple_of={multiple_of}, got {value}")


def _check_count(name: str, value):
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _check_number(name: str, value):
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a Python number, got {value!r}")
    if isinstance(value, int) and not fits_int32(value):
        raise ValueError(f"{name} must fit int32, got {value}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
