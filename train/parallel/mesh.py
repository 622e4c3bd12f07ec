"""The mesh of a run's devices, and how an array is partitioned over its axes.

There is always a mesh: of one device where a run takes one. On a mesh of one device `constrain` and what is
built on it leave arrays as they are; `is_sharded` decides that here.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dynmask_jax.context.torus import in_rings
from train.config import operation

Tree = TypeVar("Tree")
Axes = str | tuple[str, ...] | None

AXES = ("data", "fsdp", "context", "tensor")
ROWS, TOKENS, WIDTH, FEATURES = ("data", "fsdp"), "context", ("fsdp", "context"), "tensor"
"""What rows of a batch, tokens of a row, the model's width and its heads, hidden features and vocabulary are
partitioned over."""


def make_mesh(options: operation.Mesh, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that a config asks for, with the axes `AXES`, all Auto.

    Args:
      options: the section `mesh` of the config.
      devices: at least as many as its axes have, of which the first are taken; all of JAX's by default.
        Those of a topology description will do. Along the context axis they are neighbours on a TPU's
        torus (`dynmask_jax.context.torus`).

    Raises:
      ValueError: there are too few devices; or too many in several processes, each of which must take part.
    """
    devices = jax.devices() if devices is None else list(devices)
    if options.size > len(devices):
        raise ValueError(f"mesh: {_shape(options)} devices are needed, got {len(devices)}")
    if jax.process_count() > 1 and options.size < len(devices):
        raise ValueError(
            f"mesh: with {jax.process_count()} processes all their {len(devices)} devices must be in it, "
            f"got {_shape(options)}"
        )
    if options.size == 1:
        return one_device_mesh(devices[0])
    shape = [getattr(options, axis) for axis in AXES]
    grid = mesh_utils.create_device_mesh(shape, devices[: options.size], allow_split_physical_axes=True)
    return _mesh_of(in_rings(grid, AXES.index(TOKENS)))


def one_device_mesh(device: Any = None) -> Mesh:
    """A mesh of one device, by default the first of this process."""
    device = jax.local_devices()[0] if device is None else device
    return _mesh_of(np.array([device]).reshape([1] * len(AXES)))


def is_sharded(mesh: Mesh) -> bool:
    """Whether there are several devices.

    On one device a program without sharding constraints and `shard_map` is compiled. With them, 20 steps of
    the demo took the same time on two CPU cores (5.1 and 4.9 s to compile, 0.33 s a step at the full mask),
    and gave gradient norms that differ by rounding, 1e-7 of them.
    """
    return mesh.size > 1


def parts_of(mesh: Mesh, *axes: str) -> int:
    """The number of parts that an array is divided in along these axes of the mesh."""
    return int(np.prod([mesh.shape[axis] for axis in axes]))


def sharding_over(mesh: Mesh, *axes: Axes) -> NamedSharding:
    """The sharding whose array axes are partitioned over these axes of the mesh; without any, replicated.

    Axes of size 1 and trailing Nones are dropped, as JAX itself writes it: JAX compares shardings literally.
    """
    spec = [_several(mesh, axis) for axis in axes]
    while spec and spec[-1] is None:
        spec.pop()
    return NamedSharding(mesh, PartitionSpec(*spec))


def constrain(mesh: Mesh, tree: Tree, shardings: Any) -> Tree:
    """Inside `jit`: the same arrays, constrained to a sharding, or to a tree of one for each."""
    return jax.lax.with_sharding_constraint(tree, shardings) if is_sharded(mesh) else tree


def replicate(mesh: Mesh, tree: Tree) -> Tree:
    """Inside `jit`: the same arrays, whole on every device, so that every process can read them."""
    return constrain(mesh, tree, sharding_over(mesh))


def to_one_device(mesh: Mesh, tree: Tree) -> Tree:
    """The same arrays on one device of each process, for what is computed without the mesh."""
    if not is_sharded(mesh):
        return tree
    whole = jax.jit(lambda tree: tree, out_shardings=sharding_over(mesh))(tree)
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), whole)


def _mesh_of(grid: np.ndarray) -> Mesh:
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _several(mesh: Mesh, axis: Axes) -> Axes:
    """The axis, or those of a tuple, that have several devices."""
    names = (axis,) if isinstance(axis, str) else axis or ()
    several = tuple(name for name in names if mesh.shape[name] > 1)
    return several[0] if len(several) == 1 else several or None


def _shape(options: operation.Mesh) -> str:
    """`2 × 1 × 4 × 1 (data × fsdp × context × tensor) = 8`."""
    sizes = " × ".join(str(getattr(options, axis)) for axis in AXES)
    return f"{sizes} ({' × '.join(AXES)}) = {options.size}"
