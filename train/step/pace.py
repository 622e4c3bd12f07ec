"""What moves the curriculum: the steps themselves, or the validation loss."""

import jax
import jax.numpy as jnp

from dynmask_jax.array_typing import Array, Float, Int, pytree
from train.config import sections


@pytree
class Pace:
    """How far a curriculum paced by the loss has come. Part of the training state.

    Attributes:
      stage: of `curriculum.stages`, which is also the last: everything is shown. int32.
      best: the least validation loss of this stage; infinite before its first. float32.
      waited: validations in this stage. int32.
    """

    stage: Int[Array, ""]
    best: Float[Array, ""]
    waited: Int[Array, ""]


def first_stage() -> Pace:
    """The pace before the first validation."""
    return _stage(jnp.zeros((), jnp.int32))


def advance(pace: Pace, validation_loss: Float[Array, ""] | float, options: sections.Curriculum) -> Pace:
    """The pace after one more validation under the mask of the stage.

    A stage is over once a validation improves on the stage's best by less than `tolerance` of it, or
    after `patience` validations, whatever they gave: so the last stage comes after at most
    stages · patience validations. NaN is no improvement. In the last stage nothing changes.

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
    here = Pace(pace.stage, loss, pace.waited + 1)  # the best so far, or the stage were over
    last = pace.stage >= options.stages
    return _choose(last, pace, _choose(over, _stage(pace.stage + 1), here))


def clock(pace: Pace, step: Int[Array, ""] | int, growing: int, options: sections.Curriculum) -> Array:
    """The step that a curriculum which grows over `growing` steps is read at.

    The training step itself; or, paced by the loss, the step at which the stage begins: 0 in the
    first, `growing` in the last.
    """
    if options.pace == "steps":
        return jnp.asarray(step)
    return growing * pace.stage // options.stages


def _stage(number: Int[Array, ""]) -> Pace:
    return Pace(number, jnp.asarray(jnp.inf, jnp.float32), jnp.zeros((), jnp.int32))


def _choose(flag, a: Pace, b: Pace) -> Pace:
    return jax.tree.map(lambda x, y: jnp.where(flag, x, y), a, b)
