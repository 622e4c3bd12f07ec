"""A run's train step, compiled for devices that are not there: what it needs of each, and what travels."""

import dataclasses
import json
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from train.aot import topology
from train.aot.cards import in_compiler_process
from train.aot.collectives import Transfer, summarize_transfers, transfers
from train.aot.hlo import parse
from train.aot.target import cards_of, present, target_of
from train.config.run import Run
from train.config.sections import Reach
from train.data.batch import Batch
from train.metrics import mfu
from train.parallel.mesh import AXES, ROWS, TOKENS, sharding_over
from train.parallel.sharding import Placement
from train.step.program import program_of, state_like
from train.step.state import State
from train.step.trainable import WeightCounts


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      limit: what programs have of it.
      state: weights, the optimizer's state, and what else the step overwrites.
      rows: a batch's.
      temporaries: at their most, during a step.
      results: those that overwrite nothing.
      program: the instructions themselves.
    """

    limit: int
    state: int
    rows: int
    temporaries: int
    results: int
    program: int

    @property
    def total(self) -> int:
        """All that is there at once."""
        return self.state + self.rows + self.temporaries + self.results + self.program

    @property
    def left(self) -> int:
        """What remains of the limit; below 0 where it does not fit."""
        return self.limit - self.total


@dataclass(frozen=True)
class Compiled:
    """A train step for TPUs or cards. Made by `compile_step`.

    Attributes:
      name: of the run.
      topology: of TPUs as libtpu names it; of cards "h100:8".
      device: JAX's `device_kind`.
      mesh: the devices on each axis.
      weights: their number.
      trained: the number of those that train.
      vocabulary: different tokens.
      rows, length: of a step.
      operations: floating-point, of a step at the full mask: what the model needs (`train.metrics.mfu`).
      memory: of each device. Where the compiler refuses for lack of it, it names the sum alone, and what
        is not state or rows counts as temporaries.
      transfers: between devices, in the program's order; none where the compiler refused.
      lowering, compiling: seconds, of JAX and of the compiler.
    """

    name: str
    topology: str
    device: str
    mesh: dict[str, int]
    weights: int
    trained: int
    vocabulary: int
    rows: int
    length: int
    operations: float
    memory: Memory
    transfers: tuple[Transfer, ...]
    lowering: float
    compiling: float

    @property
    def fits(self) -> bool:
        """Whether the devices' memory suffices."""
        return self.memory.left >= 0

    @property
    def devices(self) -> int:
        """How many there are."""
        return int(np.prod(list(self.mesh.values())))

    def to_json(self) -> str:
        """All of it, and the transfers by kind, as JSON."""
        every = {
            **dataclasses.asdict(self),
            "kinds": [*map(dataclasses.asdict, summarize_transfers(self.transfers))],
        }
        return json.dumps(every, indent=1) + "\n"


def compile_step(run: Run, topology_name: str, vocabulary: int) -> Compiled:
    """Compiles a run's train step as `train.loop.training` does, for devices that need not be there.

    Nothing of the run's size is made in memory: the state and the rows are shapes.

    Args:
      run: the config; a `model.backend` of None is that of the devices' kind.
      topology_name: "v5p:8x8x4" or "h100:8", say.
      vocabulary: how many different tokens there are.

    Raises:
      ImportError: the devices' compiler is not installed.
      ValueError: there are no such devices, or the run's mesh has others.
    """
    if cards_of(topology_name):
        return in_compiler_process(_compile_step, run, topology_name, vocabulary)
    return _compile_step(run, topology_name, vocabulary)


def _compile_step(run: Run, topology_name: str, vocabulary: int) -> Compiled:
    """As `compile_step`, in this process."""
    target = target_of(topology_name)
    devices = target.devices
    _check_mesh(run, topology_name, devices)
    model = dataclasses.replace(run.model, backend=run.model.backend or target.backend)
    run = dataclasses.replace(run, model=model)
    placement = Placement.of(run.mesh, devices)
    program, mesh = program_of(run, vocabulary, placement), placement.mesh
    state, batch = state_like(program, vocabulary), batch_like(run, mesh)
    counts, begun = WeightCounts.of(state), perf_counter()
    with present(mesh):  # as the loop jits it
        lowered = jax.jit(program.train_step, donate_argnums=0).lower(state, batch)
    lowering = perf_counter() - begun
    memory = Memory(target.memory, _share(state), _share(batch), 0, 0, 0)
    begun = perf_counter()
    try:
        compiled = topology.compiled(lowered)
    except topology.OutOfMemory as error:
        rest = error.used - memory.state - memory.rows
        memory, found = dataclasses.replace(memory, temporaries=rest), ()
    else:
        memory = _measured(compiled, memory)
        found = tuple(transfers(parse(compiled.as_text() or "")))
    return Compiled(
        name=run.name,
        topology=topology_name,
        device=devices[0].device_kind,
        mesh={axis: getattr(run.mesh, axis) for axis in AXES},
        weights=counts.weights,
        trained=counts.trained,
        vocabulary=vocabulary,
        rows=run.data.batch,
        length=run.data.length,
        operations=_operations(run, vocabulary, state),
        memory=memory,
        transfers=found,
        lowering=lowering,
        compiling=perf_counter() - begun,
    )


def _check_mesh(run: Run, name: str, devices: list[Any]):
    """Refuses what training refuses: devices that are in no mesh, where there are several hosts of them."""
    size, hosts = run.mesh.size, len({device.process_index for device in devices})
    if size > len(devices) or (hosts > 1 and size < len(devices)):
        axes = " × ".join(str(getattr(run.mesh, axis)) for axis in AXES)
        raise ValueError(
            f"mesh: {axes} ({' × '.join(AXES)}) is of {size} devices, and {name} has {len(devices)}, of "
            f"{hosts} hosts: all must be in it, --mesh.context {len(devices)} say"
        )


def batch_like(run: Run, mesh: Mesh) -> Batch:
    """The shapes of a step's rows, as they lie on a mesh."""
    shape, on = (run.data.batch, run.data.length), sharding_over(mesh, ROWS, TOKENS)
    whole: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=on)
    real: Any = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=on)
    return Batch(whole, whole, real, whole, whole, whole, whole)


def _share(tree: Any) -> int:
    """Bytes of arrays' shapes on one device, without the padding of their layout."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _measured(compiled: jax.stages.Compiled, memory: Memory) -> Memory:
    """The compiler's own figures, padding of layouts included."""
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return dataclasses.replace(
        memory,
        state=analysis.argument_size_in_bytes - memory.rows,
        temporaries=analysis.temp_size_in_bytes,
        results=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        program=analysis.generated_code_size_in_bytes,
    )


def _operations(run: Run, vocabulary: int, state: State) -> float:
    """Of a step whose rows are each one document, under the full mask."""
    rows, length = run.data.batch, run.data.length
    window = min(run.model.local_window, length)
    pairs: dict[Reach, float] = {
        "global": rows * length * (length + 1) / 2,
        "local": rows * (length * window - window * (window - 1) / 2),
    }
    shown: dict[Reach, float] = {reach: pairs[reach] for reach in set(run.model.pattern)}
    return mfu.work(run.model, vocabulary, state).of(rows * length, shown)
