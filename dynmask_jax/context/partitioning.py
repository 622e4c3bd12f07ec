"""How the arrays of an attention call are partitioned over a mesh, and each device's part of the call."""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from dynmask_jax.array_typing import Array
from dynmask_jax.mask_algebra import Mask
from dynmask_jax.plans import Plan, plan
from dynmask_jax.tokens import Tokens

Strategy = Literal["ring", "all_gather", "ulysses"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


@dataclass(frozen=True)
class Partitioning:
    """Which mesh axis partitions which axis of the arrays.

    Attributes:
      mesh: the devices.
      axis: the mesh axis that partitions sequences.
      strategy: how keys and queries meet.
      batch_axes: the mesh axes that partition the batch.
      head_axis: the mesh axis that partitions heads, or None.
    """

    mesh: Mesh | AbstractMesh
    axis: str
    strategy: Strategy
    batch_axes: tuple[str, ...]
    head_axis: str | None

    @property
    def devices(self) -> int:
        """The number of devices along the sequence axis."""
        return self.mesh.shape[self.axis]

    @property
    def row_devices(self) -> int:
        """The number of devices along the batch axes."""
        return math.prod(self.mesh.shape[axis] for axis in self.batch_axes)

    @property
    def head_devices(self) -> int:
        """The number of devices along the head axis; 1 without one."""
        return 1 if self.head_axis is None else self.mesh.shape[self.head_axis]

    @property
    def arrays(self) -> PartitionSpec:
        """Of `[B, T, N, H]`."""
        return PartitionSpec(self.batch_axes or None, self.axis, self.head_axis)

    def check(self, q, k):
        """Refuses arrays that cannot be divided evenly.

        Raises:
          ValueError: naming which size, by what, and the axis.
        """
        sizes = [
            ("the batch", q.shape[0], self.row_devices, self.batch_axes),
            ("query heads", q.shape[2], self.head_devices, self.head_axis),
            ("key heads", k.shape[2], self.head_devices, self.head_axis),
            ("the sequence of queries", q.shape[1], self.devices, self.axis),
            ("the sequence of keys", k.shape[1], self.devices, self.axis),
        ]
        for name, size, devices, axis in sizes:
            if size % devices:
                raise ValueError(
                    f"{name} ({size}) must be a multiple of the {devices} devices of the mesh's {axis!r}"
                )
        if self.strategy != "ulysses":
            return
        for name, heads in (("query", q.shape[2]), ("key", k.shape[2])):
            if (own := heads // self.head_devices) % self.devices:
                each = "" if self.head_devices == 1 else f" on each device of {self.head_axis!r}"
                raise ValueError(
                    f"strategy 'ulysses' spreads whole heads: {name} heads ({own}{each}) must be a "
                    f"multiple of the {self.devices} devices of {self.axis!r}; 'ring' and 'all_gather' have "
                    "no such limit"
                )

    def over_devices(
        self, function, of_plan: Plan, arrays: tuple, out: PartitionSpec | tuple, *, check_vma: bool = True
    ):
        """`function(own plan, *arrays)` on every device, its results laid out as `out`.

        Its own plan is for its queries and all keys; with ulysses for all queries too, and its own heads.
        Blocks are the plan's where they divide the device's part of the sequence, and else found there.
        """
        queries, keys = self._tokens(of_plan)
        fits = self.strategy == "ulysses" or of_plan.lengths[0] // self.devices % of_plan.block_q == 0
        blocks = of_plan.block_q, of_plan.block_k

        def on_device(mask, q_tokens, kv_tokens, codes, arrays):
            own = _own_plan(mask, q_tokens, kv_tokens, codes, blocks)
            return function(own, *arrays)

        by_head = jax.tree.map(lambda leaf: PartitionSpec(*[self.head_axis] * jnp.ndim(leaf)), of_plan.mask)
        specs = by_head, queries, keys, queries if fits else None, self.arrays
        codes = of_plan.codes if fits else None
        sharded = jax.shard_map(on_device, mesh=self.mesh, in_specs=specs, out_specs=out, check_vma=check_vma)
        return sharded(of_plan.mask, of_plan.q_tokens, of_plan.kv_tokens, codes, arrays)

    def placed(self, plan: Plan) -> Plan:
        """The plan as `over_devices` reads it."""
        queries, keys = (NamedSharding(self.mesh, spec) for spec in self._tokens(plan))
        place = jax.lax.with_sharding_constraint
        q_tokens, kv_tokens = place(plan.q_tokens, queries), place(plan.kv_tokens, keys)
        return replace(plan, q_tokens=q_tokens, kv_tokens=kv_tokens)

    def _tokens(self, plan: Plan) -> tuple[PartitionSpec, PartitionSpec]:
        """Of a plan's queries `[R, T]` (and codes, `[R, Tb, Sb]`), and of its keys `[R, S]`."""
        rows = self.batch_axes or None if plan.rows > 1 else None
        return PartitionSpec(rows, None if self.strategy == "ulysses" else self.axis), PartitionSpec(rows)

    def own_heads(self, mask: Mask) -> Mask:
        """Of a mask's leaves for the heads of all devices of the sequence, those of this one's heads."""
        place = lax.axis_index(self.axis)

        def own(leaf):
            if not jnp.ndim(leaf):
                return leaf
            size = leaf.shape[0] // self.devices
            return lax.dynamic_slice_in_dim(leaf, place * size, size)

        return jax.tree.map(own, mask)


def _own_plan(
    mask: Mask, q_tokens: Tokens, kv_tokens: Tokens, codes: Array | None, blocks: tuple[int, int]
) -> Plan:
    if codes is None:
        return plan(mask, q_tokens, kv_tokens, block_q=blocks[0], block_k=blocks[1])
    return Plan(mask, q_tokens, kv_tokens, codes, *blocks)
