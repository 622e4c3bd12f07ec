"""Which tokens of a row each device of the context axis holds, at each stage of the curriculum."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from dynmask_jax import Mask, Tokens
from dynmask_jax.array_typing import Int
from dynmask_jax.context.layouts import layout_order
from dynmask_jax.context.machines import Heads, machine_of
from dynmask_jax.context.simulator import balance
from dynmask_jax.plans import default_blocks
from train.config.run import Run
from train.data.batch import Batch
from train.step.program import Program

STAGES = 8
"""The number of times that a layout is chosen while a curriculum paced by steps grows."""
ROWS = 4
"""The number of held-out rows that a layout is chosen by."""

Order = Int[np.ndarray, " T"]


@dataclass(frozen=True)
class Layouts:
    """The order of a row's tokens on a mesh at each step of a run. Made by `Layouts.of`.

    An order is the token at each place of a row; None: the row stays as it is.

    Attributes:
      run: the config.
      steps: the number of clock steps that the curriculum's growth takes.
      starts: the clock at which each stage begins, from 0.
      names: the layout of each stage.
      orders: the order of each stage.
      full: the order at the full mask, for validation.
    """

    run: Run
    steps: int
    starts: tuple[int, ...]
    names: tuple[str, ...]
    orders: tuple[Order | None, ...]
    full: Order | None

    @classmethod
    def of(cls, program: Program, example: Batch) -> "Layouts":
        """The config's layout; where that is auto, the simulator's choice for each stage.

        Choices depend only on the config, the example and the kind of device, so they are the same in every
        process and after a resumption. They take seconds, even for a row of a million tokens.

        Args:
          program: of the run.
          example: NumPy rows like those of training: the first batch of held-out rows.
        """
        run, steps = program.run, program.masks.growth.steps
        if run.mesh.context == 1 or run.mesh.layout == "contiguous":
            return cls(run, steps, (0,), ("contiguous",), (None,), None)
        if run.mesh.layout != "auto":
            order = layout_order(run.mesh.layout, run.data.length, run.mesh.context)
            return cls(run, steps, (0,), (run.mesh.layout,), (order,), order)
        starts = _starts(run, steps)
        picks = [
            _pick(program, example, program.masks.growth.mask(at)) for at in _representative(run, starts)
        ]
        names, orders = zip(*picks, strict=True)
        return cls(run, steps, starts, names, orders, _pick(program, example, program.masks.full)[1])

    def order(self, step: int, stage: int = 0) -> Order | None:
        """The order of the rows of a step.

        Args:
          step: its number, from 0.
          stage: of the pace, `State.pace.stage`; read only where the loss moves the curriculum.
        """
        return self.orders[self._at(step, stage)]

    def name(self, step: int, stage: int = 0) -> str:
        """The name of a step's layout."""
        return self.names[self._at(step, stage)]

    def _at(self, step: int, stage: int) -> int:
        options = self.run.curriculum
        clock = step if options.pace == "steps" else self.steps * stage // options.stages
        return int(np.searchsorted(self.starts, clock, side="right")) - 1


def _starts(run: Run, steps: int) -> tuple[int, ...]:
    """The clock at the beginning of each stage, including the stage after the growth."""
    if run.curriculum.kind in ("full", "static"):
        return (0,)
    stages = STAGES if run.curriculum.pace == "steps" else run.curriculum.stages
    return tuple(sorted({steps * stage // stages for stage in range(stages + 1)}))


def _representative(run: Run, starts: tuple[int, ...]) -> list[int]:
    """The clock whose mask represents each stage: its middle; paced by the loss, its only one."""
    if run.curriculum.pace == "loss":
        return list(starts)
    return [(start + stop) // 2 for start, stop in zip(starts, [*starts[1:], starts[-1]], strict=True)]


def _pick(program: Program, example: Batch, mask: Mask) -> tuple[str, Order | None]:
    """The simulator's layout for a mask, for the layers that see most of it."""
    run, shape = program.run, program.run.model
    masks = program.masks.by_reach(mask)
    found = balance(
        masks.get("global", masks[shape.pattern[0]]),
        _tokens(run, example),
        run.mesh.context,
        block=run.block or default_blocks()[0],
        heads=Heads(shape.heads, shape.kv_heads, shape.head_size, jnp.dtype(shape.dtype)),
        machine=machine_of(program.placement.devices[0]),
        strategies=(run.mesh.strategy,),
    ).pick
    return found.name, None if found.layout == "contiguous" else found.order


def _tokens(run: Run, example: Batch) -> Tokens:
    if run.data.rows == "chunked":
        return Tokens.sequence(run.data.length)
    return Tokens(np.asarray(example.positions)[:ROWS], np.asarray(example.segments)[:ROWS])
