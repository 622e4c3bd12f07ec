"""Attention over sequences that are partitioned over devices, with the signature of `attention`."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from dynmask_jax.array_typing import Array, Bool, Float, Int, pytree, sum_dtype
from dynmask_jax.backends.backend import Backend
from dynmask_jax.calls import as_plan
from dynmask_jax.context.all_gather import attend_to_gathered
from dynmask_jax.context.ring import arcs, attend_on_ring
from dynmask_jax.context.sequence_axis import SequenceAxis
from dynmask_jax.context.ulysses import attend_by_heads
from dynmask_jax.dispatch import attend, attention, checked, with_sinks
from dynmask_jax.find_partitioning import HEAD_AXES, ROW_AXES
from dynmask_jax.finite import bad_rows
from dynmask_jax.mask_algebra import head_count
from dynmask_jax.nonfinite import marked, sees
from dynmask_jax.partitioning import STRATEGIES, Partitioning, Strategy
from dynmask_jax.plans import Plan
from dynmask_jax.scores import Scores
from dynmask_jax.vma import agreed, vary_like

OPTIONS = frozenset(["scale", "soft_cap", "sinks", "bias", "dropout", "backend", "return_lse"])
WITH_OWN_QUERIES = {"ring": attend_on_ring, "all_gather": attend_to_gathered}


@pytree
class Travel:
    """What one forward pass of attention moves between the devices of a sequence.

    Attributes:
      hops: transfers, one after the other, int32: of the ring as many as the mask asks for; with
        all_gather the devices but one; with ulysses one there and one back.
      bytes: that each device sends, float32.
    """

    hops: Int[Array, ""]
    bytes: Float[Array, ""]


def context_parallel(
    attention: Callable = attention,
    *,
    mesh: Mesh | AbstractMesh,
    axis: str = "context",
    strategy: Strategy = "ring",
    batch_axes: str | tuple[str, ...] | None = None,
    head_axis: str | None = None,
) -> "ContextParallel":
    """`attention` for sequences that are partitioned over the devices of a mesh's axis.

    What it returns has the signature of `attention`, takes whole arrays, and gives what one device would,
    in values and gradients up to rounding. It works inside `jit`, and in any layout of the sequence:
    masks read positions, so a layout is a permutation of tokens.

    Args:
      attention: `dynmask_jax.attention`, or a `functools.partial` of it with options.
      mesh: the devices, its axes Auto or Explicit. All of them are used by hand in here (`jax.shard_map`), as
        kernels need it.
      axis: the mesh axis that partitions sequences, of queries and of keys.
      strategy:
        "ring": keys go from device to device as far as the mask shows them, beside the computation.
        "all_gather": each device gets all keys. Simplest, and memory for all keys of a layer.
        "ulysses": each device gets the whole sequence of some heads. Least to move for long windows, but
        query heads and key heads must be multiples of the devices: with grouped queries (K < N) no
        more devices than key heads.
      batch_axes: the mesh axes that partition rows; by default those of the usual names (`ROW_AXES` in
        `find_partitioning`: "data", "fsdp", …).
      head_axis: the mesh axis that partitions heads; by default one of the usual names (`HEAD_AXES`:
        "tensor", …).

    Raises:
      TypeError: the attention is another function, or the mesh no mesh.
      ValueError: a mesh with Manual axes, as inside `jax.shard_map`; an axis that it does not have, or one
        that is named twice; another strategy.

    >>> auto = (jax.sharding.AxisType.Auto,)
    >>> mesh = jax.make_mesh((2,), ("context",), axis_types=auto, devices=jax.devices()[:2])
    >>> q = k = v = jnp.ones((1, 8, 2, 4))
    >>> context_parallel(attention, mesh=mesh)(q, k, v, Causal() & Window(2)).shape
    (1, 8, 2, 4)
    """
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, got {type(mesh).__name__}")
    if AxisType.Manual in mesh.axis_types:
        raise ValueError(f"the mesh's axes must be Auto or Explicit, got {mesh.axis_types}")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(map(repr, STRATEGIES))}, got {strategy!r}")
    if isinstance(batch_axes, str):
        batch_axes = (batch_axes,)
    others = [name for name in mesh.axis_names if name != axis]
    if batch_axes is None:
        batch_axes = tuple(name for name in others if name in ROW_AXES)
    if head_axis is None:
        head_axis = next((name for name in others if name in HEAD_AXES), None)
    head_axes = () if head_axis is None else (head_axis,)
    named = (axis, *batch_axes, *head_axes)
    for name in named:
        if name not in mesh.axis_names:
            raise ValueError(f"the mesh has no axis {name!r}; its axes are {', '.join(mesh.axis_names)}")
        if named.count(name) > 1:
            raise ValueError(f"the mesh's axis {name!r} is named for two axes of the arrays")
    partitioning = Partitioning(mesh, tuple(batch_axes), head_axes, axis, strategy)
    return ContextParallel(partitioning, _options_of(attention))


@dataclass(frozen=True, eq=False)
class ContextParallel:
    """`attention` over a mesh. Made by `context_parallel`, which says what it takes.

    Attributes:
      partitioning: of the arrays over the mesh.
      options: of `attention`, in every call.
    """

    partitioning: Partitioning
    options: Mapping[str, Any]

    def __call__(self, q, k, v, mask_or_plan, **options):
        """As `attention(q, k, v, mask_or_plan, …)`, with its options, of arrays anywhere on the mesh.

        The mask or plan is for the whole sequences, as on one device, their tokens in any order. Of a
        plan whose blocks divide each device's part of the sequence the blocks are taken; for others, and
        masks, each call finds those of each part anew.

        Raises:
          ValueError: as `attention`; or the sequence, the batch or the heads cannot be divided evenly.
          TypeError, Unsupported: as `attention`.
        """
        options = {**self.options, **options}
        if unknown := set(options) - OPTIONS:
            raise TypeError(f"attention has no option {min(unknown)!r}; it has {', '.join(sorted(OPTIONS))}")
        return_lse, sinks = options.pop("return_lse", False), options.get("sinks")
        call = checked(q, k, v, mask_or_plan, **options)
        self.partitioning.check(q, k)
        how = {"partitioning": self.partitioning, "backend": call.backend}
        out, lse = _attend(q, k, v, sinks, call.plan, call.scores, **how)
        return (out, lse) if return_lse else out

    def placed(self, plan: Plan) -> Plan:
        """The plan laid out as calls read it; inside `jit`, and once for all layers, else each does it.

        Every device then holds the positions and segments of all keys, 8 bytes a token and row.
        """
        _check_plan(plan)
        return self.partitioning.placed(plan)

    def visible_pairs(self, plan: Plan) -> Float[Array, ""]:
        """`plan.visible_pairs()`, each device counting those of its own queries."""
        _check_plan(plan)
        return _visible_pairs(plan, partitioning=self.partitioning)

    def travel(self, q, k, plan: Plan, v=None) -> Travel:
        """What a call with such queries and keys (arrays, or their shapes and types) would move.

        Values, too, where they are given; else they are taken to be as large as the keys.

        Raises:
          ValueError: the plan is for others, or they cannot be divided evenly.
        """
        _check_plan(plan)
        as_plan(plan, q.shape[0], q.shape[1], k.shape[1])
        self.partitioning.check(q, k)
        return _travel(q, k, k if v is None else v, plan, partitioning=self.partitioning)


def _check_plan(plan):
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan, made by plan(mask, tokens), got {type(plan).__name__}")


def _options_of(function: Callable) -> dict[str, Any]:
    """The options of `attention` that a partial of it holds."""
    options: dict[str, Any] = {}
    while isinstance(function, functools.partial) and not function.args:
        function, options = function.func, {**function.keywords, **options}
    if function is not attention:
        raise TypeError(
            "attention must be dynmask_jax.attention, or a functools.partial of it with options (backend=…), "
            f"got {function!r}"
        )
    return options


@functools.partial(jax.jit, static_argnames=("partitioning", "backend"))
def _attend(q, k, v, sinks, plan: Plan, scores: Scores, *, partitioning: Partitioning, backend: Backend):
    def on_device(own: Plan, q, k, v, scores: Scores):
        q, k, v, scores = vary_like((q, k, v, scores), q, k, v, own, scores)
        if partitioning.devices == 1:
            return attend(q, k, v, None, own, scores, backend=backend)
        if partitioning.strategy == "ulysses":
            return attend_by_heads(partitioning, backend, scores, own, (q, k, v))
        axis, mesh_axes = partitioning.sequence_axis, partitioning.mesh.axis_names
        sequence = SequenceAxis(axis, partitioning.devices, backend, mesh_axes)
        out, lse = WITH_OWN_QUERIES[partitioning.strategy](sequence, scores, q, k, v, own)
        if sequence.backend.marks_bad:
            return marked(q, out, lse, jnp.isnan(lse))
        return marked(q, out, lse, _sees_bad(sequence, q, bad_rows(k) | bad_rows(v), own))

    arrays = partitioning.arrays
    out, lse = partitioning.over_devices(
        on_device,
        plan,
        (q, k, v, scores),
        (*[arrays] * 3, partitioning.of_scores(scores)),
        (arrays, arrays),
        check_vma=backend.check_vma,
    )
    return with_sinks(out, lse, sinks)


def _sees_bad(sequence: SequenceAxis, q, bad: Bool[Array, "B S K"], own: Plan) -> Bool[Array, "B T N"]:
    """Which of the device's queries see a key, of any device, that is not finite."""
    nobody = vary_like(jnp.zeros(q.shape[:3], dtype=bool), q, own)

    def somebody():
        return sees(own, lax.all_gather(bad, sequence.axis, axis=1, tiled=True), q.shape[:3])

    return lax.cond(agreed(bad.any().astype(jnp.int32), sequence.mesh_axes) > 0, somebody, lambda: nobody)


@functools.partial(jax.jit, static_argnames="partitioning")
def _visible_pairs(plan: Plan, *, partitioning: Partitioning):
    by_heads = head_count(plan.mask) is not None and partitioning.head_axes

    def on_device(own: Plan):
        pairs = own.visible_pairs()
        if by_heads:
            pairs = lax.pmean(pairs, partitioning.head_axes)
        return lax.psum(pairs, (partitioning.axis, *(partitioning.batch_axes if plan.rows > 1 else ())))

    # Each device counts the pairs of its own queries, whatever the strategy of attention.
    own_queries = replace(partitioning, strategy="ring")
    return own_queries.over_devices(on_device, plan, (), (), PartitionSpec())


@functools.partial(jax.jit, static_argnames="partitioning")
def _travel(q, k, v, plan: Plan, *, partitioning: Partitioning) -> Travel:
    n = partitioning.devices
    shards = n * partitioning.row_devices * partitioning.head_devices
    queries, keys, values = (x.size * x.dtype.itemsize / shards for x in (q, k, v))
    if n == 1:
        return Travel(jnp.int32(0), jnp.float32(0))
    if partitioning.strategy == "all_gather":
        return Travel(jnp.int32(n - 1), jnp.float32((n - 1) * (keys + values)))
    if partitioning.strategy == "ulysses":
        lse = sum_dtype(q.dtype).itemsize * q.size / q.shape[3] / shards
        out = queries * v.shape[3] / q.shape[3]
        return Travel(jnp.int32(2), jnp.float32((n - 1) / n * (queries + keys + values + out + lse)))

    def on_device(own: Plan):
        ahead, behind = arcs(own, partitioning.sequence_axis, partitioning.mesh.axis_names, n)
        return ahead + behind

    hops = partitioning.over_devices(on_device, plan, (), (), PartitionSpec())
    return Travel(hops, hops.astype(jnp.float32) * (keys + values))
