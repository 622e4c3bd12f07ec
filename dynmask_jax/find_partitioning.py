"""How plain `attention` is partitioned: read from types, from what it is told, or from the mesh around it."""

import warnings

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dynmask_jax.partitioning import Partitioning
from dynmask_jax.plans import Plan
from dynmask_jax.sharding import AnyMesh, axes_of, axis_names, explicit_mesh, free_axes

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
    if sharding is not None:
        return _told(q, mesh, sharding)
    rows, heads = _typed(q, k, v) if mesh is not None else ((), ())
    if mesh is None:
        mesh = jax.sharding.get_abstract_mesh()
    if all(mesh.shape[axis] == 1 for axis in _auto(mesh)) and not _explicit(mesh):
        return None
    rows += _dividing(mesh, ROW_AXES, q.shape[0], rows)
    heads += _dividing(mesh, HEAD_AXES, q.shape[2], heads)
    _warn_of_names(mesh)
    return Partitioning(mesh, rows, heads)


def _told(q, mesh: AnyMesh | None, sharding: Sharding) -> Partitioning:
    if not isinstance(sharding, Sharding):
        raise TypeError(
            "sharding must be a PartitionSpec or a NamedSharding of q, [batch, tokens, heads, head_dim], got "
            f"{type(sharding).__name__}"
        )
    if isinstance(sharding, NamedSharding):
        mesh, spec = sharding.mesh, sharding.spec
    else:
        spec = sharding
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    rows, tokens, heads, head_dim = (*map(axis_names, spec), (), (), (), ())[:4]
    if len(spec) > 4:
        raise ValueError(f"sharding must be of [batch, tokens, heads, head_dim], got {spec}")
    _refuse_tokens("sharding", tokens, head_dim)
    for name in (*rows, *heads):
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


def _typed(q, k, v) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The mesh axes of rows and of query heads: the first type that names any says it for all."""
    all_rows, all_heads = [], []
    for name, array in (("q", q), ("k", k), ("v", v)):
        rows, tokens, heads, head_dim = axes_of(array)
        _refuse_tokens(name, tokens, head_dim)
        all_rows.append(rows)
        all_heads.append(heads)
    return next(filter(None, all_rows), ()), next(filter(None, all_heads), ())


def _refuse_tokens(name: str, tokens: tuple[str, ...], head_dim: tuple[str, ...]):
    if tokens:
        raise ValueError(
            f"{name} partitions tokens over the mesh axis {', '.join(map(repr, tokens))}: attention over a "
            f"sequence on several devices is context_parallel(attention, mesh=mesh, axis={tokens[0]!r})"
        )
    if head_dim:
        raise ValueError(
            f"{name} partitions the head dim over the mesh axis {', '.join(map(repr, head_dim))}: partition "
            "heads, or jax.sharding.reshard it"
        )


def _auto(mesh: AnyMesh) -> list[str]:
    return _of_kind(mesh, AxisType.Auto)


def _explicit(mesh: AnyMesh) -> list[str]:
    return _of_kind(mesh, AxisType.Explicit)


def _of_kind(mesh: AnyMesh, kind) -> list[str]:
    return [name for name, each in zip(mesh.axis_names, mesh.axis_types, strict=True) if each == kind]


def _dividing(mesh: AnyMesh, known: tuple[str, ...], size: int, taken: tuple[str, ...]) -> tuple[str, ...]:
    """Of the mesh's Auto axes those with a known name whose devices divide what is left of the size."""
    for name in taken:
        size //= mesh.shape[name]
    chosen = []
    for name in _auto(mesh):
        if name in known and size % mesh.shape[name] == 0:
            size //= mesh.shape[name]
            chosen.append(name)
    return tuple(chosen)


def _warn_of_names(mesh: AnyMesh):
    """Says that every device computes the whole, where no axis has a name that tells what it partitions."""
    axes = [name for name in _auto(mesh) if mesh.shape[name] > 1]
    if axes and not _explicit(mesh) and not set(axes) & {*ROW_AXES, *HEAD_AXES}:
        warnings.warn(
            "every device computes the whole batch, as it is not said what the mesh axes "
            f"{', '.join(map(repr, axes))} partition: give the sharding of q, [batch, tokens, heads], as "
            f"sharding=PartitionSpec({axes[0]!r}, None, None)",
            stacklevel=4,
        )
