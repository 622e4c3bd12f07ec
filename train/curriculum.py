"""The curriculum that a config asks for, as functions of the global step."""

from dataclasses import dataclass

import jax.numpy as jnp

from dynmask_jax import (
    Causal,
    constant,
    cubic,
    exponential,
    growing_chunks,
    growing_window,
    linear,
    reveal,
    root,
    sine,
    staircase,
)
from dynmask_jax import Curriculum as MaskCurriculum
from dynmask_jax.schedules import Schedule
from train import config

SCHEDULES = {
    "linear": linear,
    "exponential": exponential,
    "sine": sine,
    "root": root,
    "cubic": cubic,
}


@dataclass(frozen=True)
class Growth:
    """What a run shows at each step.

    Attributes:
      window: `step -> tokens`, what is logged: the tokens of the window or chunk.
      mask: `step -> Mask`, which the window drives.
    """

    window: Schedule
    mask: MaskCurriculum


def growth(run: config.Run) -> Growth:
    """The growth of a run's curriculum, over its own share of the run's steps.

    Raises:
      ValueError: `multiple_of` does not divide the start or the end.
    """
    window = _window(run.curriculum, run.data.length, run.steps)
    return Growth(window, _mask(run.curriculum, run.data.length, window))


def _window(curriculum: config.Curriculum, length: int, steps: int) -> Schedule:
    if curriculum.kind == "full":
        return constant(length)
    if curriculum.kind == "static":
        return constant(curriculum.chunk)
    end = length if curriculum.end is None else curriculum.end
    growing = max(1, round(steps * curriculum.share))
    multiple_of = curriculum.multiple_of
    for name, value in (("start", curriculum.start), ("end", end)):
        if value % multiple_of:
            raise ValueError(
                f"curriculum.{name} must be a multiple of curriculum.multiple_of ({multiple_of}), got {value}"
            )
    if curriculum.schedule == "staircase":
        return staircase(curriculum.start, end, growing, stairs=curriculum.stairs, multiple_of=multiple_of)
    return SCHEDULES[curriculum.schedule](curriculum.start, end, growing, multiple_of=multiple_of)


def _mask(curriculum: config.Curriculum, length: int, window: Schedule) -> MaskCurriculum:
    match curriculum.kind:
        case "full":
            return lambda step: Causal()
        case "static" | "chunks":
            return growing_chunks(window)
        case "window":
            return growing_window(window)
        case "reveal":
            amount = lambda step: jnp.asarray(window(step)).astype(jnp.float32) / length  # noqa: E731
            return reveal(curriculum.chunk, amount, curriculum.order)
