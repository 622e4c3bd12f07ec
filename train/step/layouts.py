"""Which tokens of a row each device of the context axis holds, at each stage of the curriculum."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from dynmask_jax import Mask, Tokens
from dynmask_jax.array_typing import Int
from dynmask_jax.context.layouts import layout_order
from dynmask_jax.context.machines import H100, V5E, V5P, V6E, Heads, Machine
from dynmask_jax.context.simulator import balance
from train.config.run import Run
from train.data.batch import Batch
from train.step.program import Program

STAGES = 8
"""Of a curriculum that steps move: how often a layout is chosen while it grows."""
ROWS = 4
"""Held-out rows that a layout is chosen by."""
MACHINES = {"TPU v5 lite": V5E, "TPU v5e": V5E, "TPU v6 lite": V6E, "TPU v6e": V6E}
"""By JAX's `device_kind`; other GPUs are taken for one with NVLink, all else for a TPU v5p."""

Order = Int[np.ndarray, " T"]


@dataclass(frozen=True)
class Layouts:
    """The order of a row's tokens on a mesh at each step of a run. Made by `Layouts.of`.

    An order holds which token goes to each place; None: the row stays as it is.

    Attributes:
      run: the config.
      steps: of the curriculum's clock, that its growth takes.
      starts: the clock at which each stage begins, from 0.
      names: of each stage's layout.
      orders: of each stage.
      full: at the full mask, which validation takes place under.
    """

    run: Run
    steps: int
    starts: tuple[int, ...]
    names: tuple[str, ...]
    orders: tuple[Order | None, ...]
    full: Order | None

    @classmethod
    def of(cls, program: Program, example: Batch) -> "Layouts":
        """The config's layout; or, where that is auto, what the simulator picks for each stage.

        Picks follow from the config, the example and the kind of device alone, so they are the same in
        every process, and again when a run goes on. They take seconds, of a row of a million tokens too.

        Args:
          program: of the run.
          example: NumPy rows like those of training: the first held-out ones.
        """
        run, steps = program.run, program.masks.growth.steps
        if run.mesh.context == 1 or run.mesh.layout == "contiguous":
            return cls(run, steps, (0,), ("contiguous",), (None,), None)
        if run.mesh.layout != "auto":
            order = layout_order(run.mesh.layout, run.data.length, run.mesh.context)
            return cls(run, steps, (0,), (run.mesh.layout,), (order,), order)
        starts = _starts(run, steps)
        picks = [_pick(program, example, program.masks.growth.mask(at)) for at in _typical(run, starts)]
        names, orders = zip(*picks, strict=True)
        return cls(run, steps, starts, names, orders, _pick(program, example, program.masks.full)[1])

    def order(self, step: int, stage: int = 0) -> Order | None:
        """The order of the rows of a step.

        Args:
          step: its number, from 0.
          stage: of the pace, `State.pace.stage`, which counts where the loss moves the curriculum.
        """
        return self.orders[self._at(step, stage)]

    def name(self, step: int, stage: int = 0) -> str:
        """The layout of a step, in words."""
        return self.names[self._at(step, stage)]

    def _at(self, step: int, stage: int) -> int:
        options = self.run.curriculum
        clock = step if options.pace == "steps" else self.steps * stage // options.stages
        return int(np.searchsorted(self.starts, clock, side="right")) - 1


def _starts(run: Run, steps: int) -> tuple[int, ...]:
    """The clock at the beginning of each stage, the one after the growth included."""
    if run.curriculum.kind in ("full", "static"):
        return (0,)
    stages = STAGES if run.curriculum.pace == "steps" else run.curriculum.stages
    return tuple(sorted({steps * stage // stages for stage in range(stages + 1)}))


def _typical(run: Run, starts: tuple[int, ...]) -> list[int]:
    """Of each stage the clock whose mask stands for it: its middle, or, paced by the loss, all there is."""
    if run.curriculum.pace == "loss":
        return list(starts)
    return [(start + stop) // 2 for start, stop in zip(starts, [*starts[1:], starts[-1]], strict=True)]


def _pick(program: Program, example: Batch, mask: Mask) -> tuple[str, Order | None]:
    """The simulator's layout for a mask, of the layers that see most."""
    run, shape = program.run, program.run.model
    masks = program.masks.by_reach(mask)
    found = balance(
        masks.get("global", masks[shape.pattern[0]]),
        _tokens(run, example),
        run.mesh.context,
        block=run.block,
        heads=Heads(shape.heads, shape.kv_heads, shape.width // shape.heads, jnp.dtype(shape.dtype)),
        machine=_machine(program),
        strategies=(run.mesh.strategy,),
    ).pick
    return found.name, None if found.layout == "contiguous" else found.order


def _tokens(run: Run, example: Batch) -> Tokens:
    if run.data.rows == "chunked":
        return Tokens.sequence(run.data.length)
    return Tokens(np.asarray(example.positions)[:ROWS], np.asarray(example.segments)[:ROWS])


def _machine(program: Program) -> Machine:
    device = program.placement.devices[0]
    return MACHINES.get(device.device_kind, H100 if device.platform == "gpu" else V5P)
