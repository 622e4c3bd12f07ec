"""How plain `attention` is partitioned: read from types, from what it is told, or from the mesh around it."""

import warnings

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dynmask_jax.partitioning import Partitioning
from dynmask_jax.plans import Plan
from dynmask_jax.sharding import (
    AnyMesh,
    axes_of,
    axes_of_kind,
    axis_names,
    explicit_mesh,
    free_axes,
    quoted,
    vmapped_axes,
)

ROW_AXES = "replica", "data", "dp", "batch", "fsdp"
HEAD_AXES = "tensor", "tp", "model"
"""What the axes of a mesh are called that partition rows, and heads, where nothing else says it."""

Sharding = PartitionSpec | NamedSharding


def find_partitioning(q, k, v, plan: Plan, sharding: Sharding | None) -> Partitioning | None:
    """How a call of `attention` is partitioned over devices; None: it is not.

    Raises:
      TypeError: the sharding is something else.
      ValueError: it, or the types of arrays, partition tokens or the head dim, or the mesh lacks an axis, or
        its devices do not divide the batch or the heads.
    """
    mesh = explicit_mesh((q, k, v, plan))
    rows, heads = _from_types(q, k, v) if mesh is not None else ((), ())
    around = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if len(free_axes(around)) < len(around.axis_names):
        _refuse_inside_shard_map(sharding, (*rows, *heads))
        return None
    if vmapped := vmapped_axes(explicit=True):
        raise ValueError(
            f"jax.vmap maps an axis that the mesh partitions over {quoted(sorted(vmapped))}: make it a part "
            "of the batch of one call"
        )
    if sharding is not None:
        return _from_sharding(q, around, sharding)
    if vmapped_axes():  # JAX cannot type the shard_map inside; the compiler partitions what vmap maps
        return None
    auto, explicit = (axes_of_kind(around, kind) for kind in (AxisType.Auto, AxisType.Explicit))
    if all(around.shape[axis] == 1 for axis in auto) and not explicit:
        return None
    rows += _dividing(around, ROW_AXES, q.shape[0], rows)
    heads += _dividing(around, HEAD_AXES, q.shape[2], heads)
    _warn_of_axes_left_out(around, {*rows, *heads}, q.shape[0])
    return Partitioning(around, rows, heads)


def _refuse_inside_shard_map(sharding: Sharding | None, typed: tuple[str, ...]):
    """JAX differentiates no `jax.shard_map` inside another, so there attention is one device's."""
    if sharding is not None or typed:
        named = "sharding" if sharding is not None else f"the axes {quoted(typed)} of their types"
        raise ValueError(
            f"inside jax.shard_map attention is one device's, and cannot be partitioned by {named}: let "
            "shard_map take all axes of the mesh, or call attention outside it"
        )


def _from_sharding(q, mesh: AnyMesh, sharding: Sharding) -> Partitioning | None:
    if not isinstance(sharding, Sharding):
        raise TypeError(
            "sharding must be a PartitionSpec or a NamedSharding of q, [batch, tokens, heads, head_dim], got "
            f"{type(sharding).__name__}"
        )
    if isinstance(sharding, NamedSharding):
        mesh, spec = sharding.mesh, sharding.spec
    else:
        spec = sharding
    if PartitionSpec.UNCONSTRAINED in tuple(spec):
        raise ValueError(f"sharding must name mesh axes or None for each axis of q, got {spec}")
    rows, tokens, heads, head_dim = (*map(axis_names, spec), (), (), (), ())[:4]
    if len(spec) > 4:
        raise ValueError(f"sharding must be of [batch, tokens, heads, head_dim], got {spec}")
    _refuse_tokens("sharding", tokens, head_dim)
    if mesh.empty and not (*rows, *heads):
        return None
    for name in (*rows, *heads):
        if (*rows, *heads).count(name) > 1:
            raise ValueError(f"sharding names the mesh axis {name!r} twice, got {spec}")
        if name not in free_axes(mesh):
            axes = ", ".join(free_axes(mesh))
            known = f"its axes are {axes}" if axes else "there is no mesh: jax.set_mesh, or a NamedSharding"
            raise ValueError(f"sharding names the mesh axis {name!r}; {known}")
    partitioning = Partitioning(mesh, rows, heads)
    for what, size, devices in (
        ("the batch", q.shape[0], partitioning.row_devices),
        ("query heads", q.shape[2], partitioning.head_devices),
    ):
        if size % devices:
            raise ValueError(
                f"{what} ({size}) must be a multiple of the {devices} devices of sharding {spec}"
            )
    return partitioning


def _from_types(q, k, v) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The mesh axes of rows and of heads, each from the first array of q, k and v that is partitioned so."""
    all_rows, all_heads = [], []
    for name, array in (("q", q), ("k", k), ("v", v)):
        rows, tokens, heads, head_dim = axes_of(array)
        _refuse_tokens(name, tokens, head_dim)
        all_rows.append(rows)
        all_heads.append(heads)
    rows, heads = next(filter(None, all_rows), ()), next(filter(None, all_heads), ())
    if both := set(rows) & set(heads):
        raise ValueError(
            f"one of q, k and v partitions rows, another heads, over the mesh axis {quoted(sorted(both))}: "
            "reshard one of them, jax.sharding.reshard"
        )
    return rows, heads


def _refuse_tokens(name: str, tokens: tuple[str, ...], head_dim: tuple[str, ...]):
    if tokens:
        raise ValueError(
            f"{name} partitions tokens over the mesh axis {quoted(tokens)}: attention over a "
            f"sequence on several devices is context_parallel(attention, mesh=mesh, axis={tokens[0]!r})"
        )
    if head_dim:
        raise ValueError(
            f"{name} partitions the head dim over the mesh axis {quoted(head_dim)}: partition "
            "heads, or jax.sharding.reshard it"
        )


def _dividing(mesh: AnyMesh, known: tuple[str, ...], size: int, taken: tuple[str, ...]) -> tuple[str, ...]:
    """Of the mesh's Auto axes those with a known name whose devices divide what is left of the size."""
    for name in taken:
        size //= mesh.shape[name]
    chosen = []
    for name in axes_of_kind(mesh, AxisType.Auto):
        if name in known and size % mesh.shape[name] == 0:
            size //= mesh.shape[name]
            chosen.append(name)
    return tuple(chosen)


def _warn_of_axes_left_out(mesh: AnyMesh, taken: set[str], batch: int):
    """Says that devices compute the same, where a mesh axis partitions neither rows nor heads."""
    left = [name for name in axes_of_kind(mesh, AxisType.Auto) if mesh.shape[name] > 1 and name not in taken]
    if left and not axes_of_kind(mesh, AxisType.Explicit) and batch > 1:
        warnings.warn(
            f"devices along the mesh axes {quoted(left)} compute the same: their names are none of "
            f"{quoted(sorted((*ROW_AXES, *HEAD_AXES)))}, or their number does not divide the batch or the "
            "heads. Give the sharding of q, [batch, tokens, heads], as sharding=PartitionSpec(…); tokens "
            "over several devices are context_parallel's",
            stacklevel=4,
        )
