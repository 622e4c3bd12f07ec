"""What a run shows: the full mask, its count of pairs, and the curriculum's masks as functions of a clock.

The clock is the global step, or the first step of a stage.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from dynmask_jax import (
    SCHEDULES,
    Causal,
    Everything,
    Mask,
    Predicate,
    Prefix,
    SameSegment,
    constant,
    growing_chunks,
    growing_window,
    maximum,
    reveal,
)
from dynmask_jax import Curriculum as MaskCurriculum
from dynmask_jax.array_typing import Array, Float
from dynmask_jax.schedules import Schedule
from train.config import sections
from train.config.run import Run
from train.config.sections import Reach
from train.data.batch import Batch
from train.data.tasks import task_of


@dataclass(frozen=True)
class Growth:
    """What a run shows at each step of a clock.

    Attributes:
      window: `clock -> tokens` of the window or chunk, which is logged.
      mask: `clock -> Mask`, by the window.
      full: the full mask, all that the task shows: the end of the growth, and the mask of evaluation.
      steps: the number of clock steps that the growth takes.
    """

    window: Schedule
    mask: MaskCurriculum
    full: Mask
    steps: int


def growth(run: Run, window: Schedule | None = None) -> Growth:
    """The growth of a run's curriculum, over `curriculum.share` of the run's steps.

    Args:
      run: the config.
      window: `clock -> tokens` in place of the config's schedule: the identity, to show any window at will.

    Of N steps, numbered from 0, it ends at step min(round(share · N), N − 1): the last step of several
    shows the full mask at any share.

    Raises:
      ValueError: `multiple_of` does not divide the start or the end.
    """
    steps = max(1, min(round(run.steps * run.curriculum.share), run.steps - 1))
    window = window or _window(run.curriculum, run.data.length, steps)
    full = full_mask(run)
    if run.curriculum.kind == "full":
        return Growth(window, lambda clock: full, full, steps)
    boundary = task_of(run).boundary(run)
    if boundary is None:
        return Growth(window, _shown(run, window, full), full, steps)
    shown = _shown(run, window, Everything())

    def revealed(clock) -> Mask:
        # Keys from the boundary on are always shown; those of the prefix as they are revealed.
        return full & (shown(clock) | ~Prefix(boundary))

    return Growth(window, revealed, full, steps)


def full_mask(run: Run) -> Mask:
    """All that the task shows: earlier tokens, and where the task reads ahead the whole prefix."""
    ahead = task_of(run).visible_ahead(run)
    mask = Causal() | Prefix(ahead) if ahead else Causal()
    return mask & SameSegment() if run.data.rows == "packed" else mask


def full_pairs(run: Run, batch: Batch) -> dict[Reach, Float[Array, ""]]:
    """Visible pairs of one layer of each reach in the pattern, at the full mask, over all rows.

    Counted from positions, without looking at a pair: each token sees itself and those before it in its
    document, at most `local_window` in a local layer. Where the task reads ahead, tokens of the prefix see
    each other both ways: each of these pairs counts twice, except a token with itself.
    """
    if run.data.rows == "chunked":
        length = batch.inputs.shape[1]
        before, real = jnp.broadcast_to(jnp.arange(length), batch.inputs.shape), jnp.asarray(True)
    else:
        before, real = batch.context, batch.segments > 0
    ahead = task_of(run).visible_ahead(run)
    both_ways = batch.positions < ahead if ahead else jnp.asarray(False)
    windows: dict[Reach, int] = {"global": run.data.length, "local": run.model.local_window}

    def pairs(window: int):
        seen = jnp.minimum(before + 1, window).astype(jnp.float32)
        return jnp.where(real, jnp.where(both_ways, 2 * seen - 1, seen), 0.0).sum()

    return {reach: pairs(windows[reach]) for reach in set(run.model.pattern)}


def _window(curriculum: sections.Curriculum, length: int, steps: int) -> Schedule:
    if curriculum.kind == "full":
        return constant(length)
    if curriculum.kind == "static":
        return constant(curriculum.chunk)
    end = length if curriculum.end is None else curriculum.end
    multiple_of = curriculum.multiple_of
    for name, value in (("start", curriculum.start), ("end", end)):
        if value % multiple_of:
            raise ValueError(
                f"curriculum.{name} must be a multiple of curriculum.multiple_of ({multiple_of}), got {value}"
            )
    options = {"stairs": curriculum.stairs} if curriculum.schedule == "staircase" else {}
    schedule = SCHEDULES[curriculum.schedule]
    return schedule(curriculum.start, end, steps, multiple_of=multiple_of, **options)


def _shown(run: Run, window: Schedule, base: Mask) -> MaskCurriculum:
    """The part of the base mask that the window shows."""
    curriculum, length = run.curriculum, run.data.length
    if curriculum.kind == "window":
        return growing_window(window, base=base)
    if curriculum.kind == "reveal":
        amount = lambda clock: jnp.asarray(window(clock)).astype(jnp.float32) / length  # noqa: E731
        return reveal(curriculum.chunk, amount, curriculum.order, base=base, seed=run.seed)
    if task_of(run).has_boundary:
        return lambda clock: base & Predicate(_same_chunk_of_the_prefix, window(clock), length - 1)
    return growing_chunks(window, base=base)


def _same_chunk_of_the_prefix(q, k, chunk, last):
    """Chunks counted back from the prefix's last position; the rest belongs to the nearest."""
    return maximum(last - q.position, 0) // chunk == (last - k.position) // chunk
