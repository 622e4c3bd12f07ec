"""Over which mesh axes arrays are partitioned, and functions run on each device's part of them.

On a mesh with Explicit axes the types of arrays say how they are partitioned, also inside `jit`. On one with
Auto axes they say nothing: the compiler decides, and a loop over blocks of the whole batch makes it gather
the batch on every device. So what loops or calls a kernel runs here, on each device's own part.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import core  # of a vmap around a call JAX tells in no public place
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AnyMesh = Mesh | AbstractMesh


def explicit_mesh(tree) -> AbstractMesh | None:
    """The mesh in the types of a tree's arrays, if any of its axes is Explicit."""
    meshes = (jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(tree))
    return next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)


def free_axes(mesh: AnyMesh) -> tuple[str, ...]:
    """The mesh's axes that no `jax.shard_map` around this call uses already."""
    manual = axes_of_kind(mesh, AxisType.Manual)
    return tuple(name for name in mesh.axis_names if name not in manual)


def axes_of_kind(mesh: AnyMesh, kind: AxisType) -> tuple[str, ...]:
    """The mesh's axes that are Auto, Explicit or Manual."""
    return tuple(name for name, each in zip(mesh.axis_names, mesh.axis_types, strict=True) if each == kind)


def quoted(names: Iterable[str]) -> str:
    """Mesh axes as messages name them."""
    return ", ".join(map(repr, names))


def vmapped_axes(*, explicit: bool = False) -> frozenset[str]:
    """The mesh axes over which a `jax.vmap` around this call partitions the axis that it maps.

    Told by its `spmd_axis_name`, or with `explicit` read from the types on an Explicit mesh.
    """
    names = "explicit_mesh_axis_names" if explicit else "spmd_axis_names"
    return frozenset(getattr(core.get_axis_env(), names, None) or ())


def axes_of(array) -> tuple[tuple[str, ...], ...]:
    """The mesh axes that partition each axis of an array, from its type."""
    entries = tuple(map(axis_names, jax.typeof(array).sharding.spec))
    return entries + ((),) * (jnp.ndim(array) - len(entries))


def axis_names(entry) -> tuple[str, ...]:
    """The mesh axes that one entry of a `PartitionSpec` names."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def place(array, mesh: AnyMesh, spec: PartitionSpec):
    """The array, partitioned as `spec` over the Explicit axes of the mesh."""
    explicit = axes_of_kind(mesh, AxisType.Explicit)
    if not explicit:
        return array
    named = (tuple(name for name in axis_names(entry) if name in explicit) for entry in spec)
    return jax.sharding.reshard(
        array, NamedSharding(mesh, PartitionSpec(*(names or None for names in named)))
    )


def over_devices(
    function: Callable, mesh: AnyMesh, args: tuple, in_specs: tuple, out_specs: Any, *, check_vma: bool = True
):
    """`function(*args)` on every device of a mesh, each with its part of the arguments.

    `jax.shard_map`, over all axes that are free: a kernel can be partitioned by hand alone.

    Args:
      function: takes and gives a device's parts.
      mesh: the devices.
      args: whole arrays, or trees of them, partitioned in any way.
      in_specs: how each is partitioned; a `PartitionSpec` for a tree is one for all its arrays.
      out_specs: how the results are.
      check_vma: as `jax.shard_map`'s.
    """

    def placed(spec, tree):
        return jax.tree.map(lambda leaf: place(leaf, mesh, spec), tree)

    args = jax.tree.map(placed, in_specs, args, is_leaf=lambda spec: isinstance(spec, PartitionSpec))
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=frozenset(free_axes(mesh)),
        check_vma=check_vma,
    )(*args)


def over_rows(function: Callable, whole, *rows):
    """`function(whole, *rows)`, of trees of arrays `[R, …]`, where what comes back is `[R, …]` too.

    If types say that any of the arrays is partitioned, each device of their mesh computes the rows that are
    its own. `whole` goes to all.
    """
    arrays = jax.tree.leaves(rows)
    mesh = explicit_mesh((whole, arrays))
    if mesh is None or not any(map(any, map(axes_of, jax.tree.leaves((whole, arrays))))):
        return function(whole, *rows)
    own = row_spec(arrays)
    return over_devices(function, mesh, (whole, *rows), (PartitionSpec(), *[own] * len(rows)), own)


def row_spec(arrays) -> PartitionSpec:
    """How the first axis of arrays `[R, …]` is partitioned, by the first type that says so."""
    names = (axes_of(array)[0] for array in arrays)
    return PartitionSpec(next(filter(None, names), None))
