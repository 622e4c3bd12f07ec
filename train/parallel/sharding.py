"""The placement of a run: its mesh, and attention over it.

How arrays lie on the mesh is in files beside this one: `mesh` (axes and constraints), `weights` (the table of
rules), `gather_weights`, `activations` and `feed` (batches).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dynmask_jax import Plan, attention
from dynmask_jax.array_typing import Array, Float
from dynmask_jax.context.parallel import ContextParallel, Travel, context_parallel
from dynmask_jax.partitioning import Strategy
from train.config import operation
from train.parallel.mesh import ROWS, TOKENS, is_sharded, make_mesh, one_device_mesh, parts_of


@dataclass(frozen=True)
class Placement:
    """The devices of a run. `Placement()` is of one device, the first of this process.

    Attributes:
      mesh: the devices, with the axes `train.parallel.mesh.AXES`.
      strategy: how attention goes over the context axis.
    """

    mesh: Mesh = field(default_factory=one_device_mesh)
    strategy: Strategy = "ring"

    @classmethod
    def of(cls, options: operation.Mesh, devices: Sequence[Any] | None = None) -> "Placement":
        """The placement that a config asks for. Arguments and errors are those of `make_mesh`."""
        mesh = make_mesh(options, devices)
        return cls(mesh, options.strategy) if is_sharded(mesh) else cls(mesh)

    @property
    def devices(self) -> list[Any]:
        """The devices of the run."""
        return list(self.mesh.devices.flat)

    @property
    def sharded(self) -> bool:
        """Whether the run takes several devices."""
        return is_sharded(self.mesh)

    @property
    def row_parts(self) -> int:
        """The number of parts that the rows of a batch are divided in."""
        return parts_of(self.mesh, *ROWS)

    @property
    def token_parts(self) -> int:
        """The number of parts that the tokens of a row are divided in."""
        return parts_of(self.mesh, TOKENS)

    def attention(self, **options: Any) -> Callable:
        """Attention over the mesh, with the signature of `dynmask_jax.attention` and these options of it.

        An option that is None has its default.
        """
        given = {name: value for name, value in options.items() if value is not None}
        attend = partial(attention, **given) if given else attention
        return self._over_mesh(attend) if self.sharded else attend

    def place_plan(self, plan: Plan) -> Plan:
        """Inside `jit`: the plan in the layout that attention reads, made once for all layers."""
        return self._over_mesh().placed(plan) if self.sharded else plan

    def visible_pairs(self, plan: Plan) -> Float[Array, ""]:
        """As `plan.visible_pairs()`, each device counting those of its queries."""
        return self._over_mesh().visible_pairs(plan) if self.sharded else plan.visible_pairs()

    def travel(self, plan: Plan, queries: jax.ShapeDtypeStruct, keys: jax.ShapeDtypeStruct) -> Travel:
        """What one layer's forward pass sends, for queries and keys of these shapes."""
        if self.sharded:
            return self._over_mesh().travel(queries, keys, plan)
        return Travel(hops=jnp.zeros((), jnp.int32), bytes=jnp.zeros((), jnp.float32))

    def _over_mesh(self, attend: Callable | None = None) -> ContextParallel:
        return context_parallel(attend or attention, mesh=self.mesh, axis=TOKENS, strategy=self.strategy)
