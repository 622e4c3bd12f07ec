"""The pace of the curriculum: by steps, or by the validation loss."""

import jax
import jax.numpy as jnp

from dynmask_jax.array_typing import Array, Float, Int, pytree
from train.config import sections


@pytree
class Pace:
    """The progress of a curriculum paced by the loss. Part of the training state.

    Attributes:
      stage: from 0 to `curriculum.stages`, at which everything is shown. int32.
      best: the least validation loss in this stage; infinite before the first. float32.
      waited: the number of validations in this stage. int32.
    """

    stage: Int[Array, ""]
    best: Float[Array, ""]
    waited: Int[Array, ""]


def first_stage() -> Pace:
    """The pace before the first validation."""
    return _stage(jnp.zeros((), jnp.int32))


def advance(pace: Pace, validation_loss: Float[Array, ""] | float, options: sections.Curriculum) -> Pace:
    """The pace after one more validation under the mask of the stage.

    A stage ends once a validation improves on the stage's best by less than `tolerance` of it, or after
    `patience` validations. So the last stage begins after at most stages · patience validations. NaN is no
    improvement. In the last stage nothing changes.

    >>> from train.config.sections import Curriculum
    >>> pace, stages = first_stage(), []
    >>> for loss in (5.0, 4.0, 3.99, 3.98, 3.97):
    ...     pace = advance(pace, loss, Curriculum(tolerance=0.01))
    ...     stages.append(int(pace.stage))
    >>> stages
    [0, 0, 1, 1, 2]
    """
    loss = jnp.asarray(validation_loss, jnp.float32)
    improved = (pace.waited == 0) | (pace.best - loss >= options.tolerance * pace.best)
    over = ~improved | (pace.waited + 1 >= options.patience)
    here = Pace(pace.stage, loss, pace.waited + 1)  # the loss is the best so far: otherwise the stage is over
    last = pace.stage >= options.stages
    return _choose(last, pace, _choose(over, _stage(pace.stage + 1), here))


def clock(pace: Pace, step: Int[Array, ""] | int, growing: int, options: sections.Curriculum) -> Array:
    """The step at which a curriculum that grows over `growing` steps is evaluated.

    It is the training step; or, paced by the loss, the step at which the stage begins: 0 in the first,
    `growing` in the last.
    """
    if options.pace == "steps":
        return jnp.asarray(step)
    return growing * pace.stage // options.stages


def _stage(number: Int[Array, ""]) -> Pace:
    return Pace(number, jnp.asarray(jnp.inf, jnp.float32), jnp.zeros((), jnp.int32))


def _choose(flag, a: Pace, b: Pace) -> Pace:
    return jax.tree.map(lambda x, y: jnp.where(flag, x, y), a, b)
