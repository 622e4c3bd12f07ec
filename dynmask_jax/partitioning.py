"""How the arrays of an attention call are partitioned over a mesh, and each device's part of the call."""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from dynmask_jax.array_typing import Array, Float
from dynmask_jax.mask_algebra import Mask
from dynmask_jax.plans import Plan, plan_like
from dynmask_jax.scores import Scores
from dynmask_jax.sharding import AnyMesh, explicit_mesh, over_devices, place, quoted
from dynmask_jax.tokens import Tokens

Strategy = Literal["ring", "all_gather", "ulysses"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


@dataclass(frozen=True)
class Partitioning:
    """Which mesh axes partition which axis of the arrays.

    Attributes:
      mesh: the devices.
      batch_axes: the mesh axes that partition the batch.
      head_axes: the mesh axes that partition heads.
      axis: the mesh axis that partitions sequences, or None.
      strategy: how keys and queries of sequences that are partitioned meet.
    """

    mesh: AnyMesh
    batch_axes: tuple[str, ...]
    head_axes: tuple[str, ...]
    axis: str | None = None
    strategy: Strategy = "ring"

    @property
    def devices(self) -> int:
        """The number of devices along the sequence axis; 1 without one."""
        return 1 if self.axis is None else self.mesh.shape[self.axis]

    @property
    def sequence_axis(self) -> str:
        """The mesh axis that partitions sequences, where one does."""
        assert self.axis is not None
        return self.axis

    @property
    def row_devices(self) -> int:
        """The number of devices along the batch axes."""
        return math.prod(self.mesh.shape[axis] for axis in self.batch_axes)

    @property
    def head_devices(self) -> int:
        """The number of devices along the head axes; 1 without any."""
        return math.prod(self.mesh.shape[axis] for axis in self.head_axes)

    @property
    def rows(self) -> PartitionSpec:
        """Of `[B, …]`."""
        return PartitionSpec(self.batch_axes or None)

    @property
    def heads(self) -> PartitionSpec:
        """Of `[N]`."""
        return PartitionSpec(self.head_axes or None)

    @property
    def arrays(self) -> PartitionSpec:
        """Of `[B, T, N, H]`."""
        return PartitionSpec(self.batch_axes or None, self.axis, self.head_axes or None)

    def of_scores(self, scores: Scores) -> Scores:
        """Of what is per head or per row of the scores."""
        return scores.specs(self.batch_axes or None, self.head_axes or None)

    def check(self, q, k):
        """Refuses arrays that cannot be divided evenly.

        Raises:
          ValueError: naming which size, by what, and the axis.
        """
        sizes = [
            ("the batch", q.shape[0], self.row_devices, self.batch_axes),
            ("query heads", q.shape[2], self.head_devices, self.head_axes),
            ("key heads", k.shape[2], self.head_devices, self.head_axes),
            ("the sequence of queries", q.shape[1], self.devices, (self.sequence_axis,)),
            ("the sequence of keys", k.shape[1], self.devices, (self.sequence_axis,)),
        ]
        for name, size, devices, axes in sizes:
            if size % devices:
                of = f"the {devices} devices of the mesh's {quoted(axes)}"
                raise ValueError(f"{name} ({size}) must be a multiple of {of}")
        if self.strategy != "ulysses":
            return
        for name, heads in (("query", q.shape[2]), ("key", k.shape[2])):
            if (own := heads // self.head_devices) % self.devices:
                each = "" if self.head_devices == 1 else f" on each device of {quoted(self.head_axes)}"
                raise ValueError(
                    f"strategy 'ulysses' spreads whole heads: {name} heads ({own}{each}) must be a "
                    f"multiple of the {self.devices} devices of {self.axis!r}; 'ring' and 'all_gather' have "
                    "no such limit"
                )

    def over_devices(
        self, function, of_plan: Plan, arrays: tuple, specs: tuple, out, *, check_vma: bool = True
    ):
        """`function(own plan, *arrays)` on every device, of arrays partitioned as `specs`, results as `out`.

        Its own plan is for its queries and all keys; with ulysses for all queries too, and its own heads.
        Blocks are the plan's where they divide the device's part of the sequence, and else found there.
        """
        queries, keys = self._tokens(of_plan)
        whole = self.axis is None or self.strategy == "ulysses"
        fits = whole or of_plan.lengths[0] // self.devices % of_plan.block_q == 0

        def on_device(mask, q_tokens, kv_tokens, codes, *arrays):
            return function(_own_plan(of_plan, mask, (q_tokens, kv_tokens), codes), *arrays)

        by_head = jax.tree.map(lambda leaf: self.heads if jnp.ndim(leaf) else PartitionSpec(), of_plan.mask)
        codes = (of_plan.codes, of_plan.fine) if fits else None
        of_tokens = of_plan.q_tokens, of_plan.kv_tokens, codes
        return over_devices(
            on_device,
            self.mesh,
            (of_plan.mask, *of_tokens, *arrays),
            (by_head, queries, keys, queries, *specs),
            out,
            check_vma=check_vma,
        )

    def placed(self, plan: Plan) -> Plan:
        """The plan as `over_devices` reads it."""
        queries, keys = self._tokens(plan)

        def at(tokens: Tokens, spec):
            if explicit_mesh(tokens) is not None:
                return jax.tree.map(lambda field: place(field, self.mesh, spec), tokens)
            return lax.with_sharding_constraint(tokens, NamedSharding(self.mesh, spec))

        return replace(plan, q_tokens=at(plan.q_tokens, queries), kv_tokens=at(plan.kv_tokens, keys))

    def _tokens(self, plan: Plan) -> tuple[PartitionSpec, PartitionSpec]:
        """Of a plan's queries `[R, T]` (and codes, `[R, Tb, Sb]`), and of its keys `[R, S]`."""
        rows = self.batch_axes or None if plan.rows > 1 else None
        return PartitionSpec(rows, None if self.strategy == "ulysses" else self.axis), PartitionSpec(rows)

    def own_key_heads(self, keys: Float[Array, "B S K H"], heads: int) -> Float[Array, "B S k H"]:
        """The key heads of this device's query heads, where there are too few to partition.

        Args:
          keys: all heads.
          heads: the number of query heads on all devices.
        """
        own, group = heads // self.head_devices, heads // keys.shape[2]
        together = math.gcd(own, group)  # so many of its query heads, one after the other, share a key head
        first = lax.axis_index(self.head_axes) * own + together * jnp.arange(own // together, dtype=jnp.int32)
        return jnp.take(keys, first // group, axis=2)

    def own_heads(self, tree):
        """Of leaves `[N, …]` for the heads of all devices of the sequence, those of this one's heads."""
        place = lax.axis_index(self.axis)

        def own(leaf):
            if not jnp.ndim(leaf):
                return leaf
            size = leaf.shape[0] // self.devices
            return lax.dynamic_slice_in_dim(leaf, place * size, size)

        return jax.tree.map(own, tree)


def _own_plan(whole: Plan, mask: Mask, tokens: tuple[Tokens, Tokens], codes: tuple | None) -> Plan:
    """A device's plan, in the blocks of the whole one; its codes are found where they are not given."""
    if codes is None:
        return plan_like(whole, mask, *tokens)
    return replace(whole, mask=mask, q_tokens=tokens[0], kv_tokens=tokens[1], codes=codes[0], fine=codes[1])
