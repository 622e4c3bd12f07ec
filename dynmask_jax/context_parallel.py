"""A stand-in, until the library's own is there: every device gathers all keys."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from dynmask_jax.array_typing import Array, Float, Int, pytree
from dynmask_jax.plans import Plan, plan


@pytree
class Travel:
    hops: Int[Array, ""]
    bytes: Float[Array, ""]


@dataclass(frozen=True)
class ContextParallel:
    attention: Callable
    mesh: Any
    axis: str
    strategy: str

    def __call__(self, q, k, v, mask_or_plan, **options):
        the_plan = mask_or_plan
        rows = ("data", "fsdp")
        tokens_spec = P(rows if the_plan.rows > 1 else None, None)
        spec = P(rows, self.axis, "tensor", None)

        def local(q, k, v, mask, tokens):
            k, v = (jax.lax.all_gather(x, self.axis, axis=1, tiled=True) for x in (k, v))
            n = q.shape[1]
            at = jax.lax.axis_index(self.axis) * n
            mine = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, at, n, 1), tokens)
            here = plan(mask, mine, tokens, block_q=the_plan.block_q, block_k=the_plan.block_k)
            return self.attention(q, k, v, here, **options)

        return jax.shard_map(
            local, mesh=self.mesh, in_specs=(spec, spec, spec, P(), tokens_spec), out_specs=spec
        )(q, k, v, the_plan.mask, the_plan.q_tokens)

    def visible_pairs(self, the_plan: Plan):
        return the_plan.visible_pairs()

    def travel(self, q, k, the_plan: Plan) -> Travel:
        return Travel(hops=jnp.zeros((), jnp.int32), bytes=jnp.zeros((), jnp.float32))


def context_parallel(attention, *, mesh, axis="context", strategy="ring", batch_axes=None, head_axis=None):
    return ContextParallel(attention, mesh, axis, strategy)
