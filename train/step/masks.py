"""The masks of a run as its layers and devices see them."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from dynmask_jax import Mask, Tokens, Window, plan
from dynmask_jax.array_typing import Array, Float
from dynmask_jax.context.parallel import Travel
from dynmask_jax.plans import default_blocks
from train.config.run import Run
from train.config.sections import Reach
from train.data.batch import Batch
from train.model.transformer import Plans
from train.parallel.sharding import Placement
from train.step.curriculum import Growth, full_pairs
from train.step.pace import clock
from train.step.state import State

LEAST_BLOCK = 128
"""Tokens in the least block that is chosen to divide a device's; smaller ones cost more than they save."""
SECOND_BUCKET = 64  # tokens of context at which the second bucket of validation losses begins

OfReach = dict[Reach, Float[Array, ""]]
"""A number of one layer of each reach in the model's pattern."""


@dataclass(frozen=True)
class Masks:
    """The masks of a run.

    Attributes:
      run: the config.
      growth: what the curriculum shows at each step of its clock.
      placement: the devices that plans are made for.
    """

    run: Run
    growth: Growth
    placement: Placement

    @property
    def full(self) -> Mask:
        """All that the task shows."""
        return self.growth.full

    def clock(self, state: State) -> Array:
        """The step that the curriculum is at: `train.step.pace.clock`."""
        return clock(state.pace, state.step, self.growth.steps, self.run.curriculum)

    def at(self, state: State) -> Mask:
        """What the curriculum shows at a state's clock."""
        return self.growth.mask(self.clock(state))

    def by_reach(self, mask: Mask) -> dict[Reach, Mask]:
        """What layers of each reach in the model's pattern see of a mask."""
        # As many keys ahead, where the mask shows those: in a prefix whose tokens see each other both ways.
        window = self.run.model.local_window
        masks: dict[Reach, Mask] = {"global": mask, "local": mask & Window(window, ahead=window - 1)}
        return {reach: masks[reach] for reach in sorted(set(self.run.model.pattern))}

    def plans(self, mask: Mask, tokens: Tokens, kv_tokens: Tokens | None = None) -> Plans:
        """The plan of each reach in the model's pattern; by default the keys' tokens are the queries'."""
        block = self._block()
        return {
            reach: self.placement.place_plan(plan(shown, tokens, kv_tokens, block_q=block, block_k=block))
            for reach, shown in self.by_reach(mask).items()
        }

    def _block(self) -> int | None:
        """Tokens in a block: as the config says, within a device's; None: as `plan` chooses."""
        part, largest = self.run.data.length // self.placement.token_parts, max(default_blocks())
        if self.run.block is not None:
            return min(part, self.run.block)
        if part % largest == 0 or self.placement.token_parts == 1:
            return None
        # Blocks that divide a device's tokens, so that devices take their codes from one plan of all.
        divisor = math.gcd(part, largest)
        return divisor if divisor >= LEAST_BLOCK else min(part, largest)

    def tokens(self, batch: Batch) -> Tokens:
        """What masks read of the rows; chunked rows have all the same."""
        if self.run.data.rows == "chunked":
            return Tokens(jnp.asarray(batch.positions)[0])
        return Tokens(batch.positions, batch.segments)

    def visible_pairs(self, plans: Plans, rows: int) -> OfReach:
        """Visible pairs of one layer of each reach (the mean over its heads), over so many rows."""
        count = self.placement.visible_pairs
        return {reach: count(seen) * (rows / seen.rows) for reach, seen in plans.items()}

    def exposure(self, pairs: OfReach, batch: Batch) -> Float[Array, ""]:
        """The visible pairs of all layers, divided by those at the full mask: 0…1."""
        return self.over_layers(pairs) / self.over_layers(full_pairs(self.run, batch))

    def travel(self, plans: Plans, rows: int) -> Travel:
        """The hops of the layers whose keys go farthest, and the bytes that a device sends for all layers."""
        shape = self.run.model
        queries, keys = (
            jax.ShapeDtypeStruct((rows, self.run.data.length, heads, shape.head_size), jnp.dtype(shape.dtype))
            for heads in (shape.heads, shape.kv_heads)
        )
        travels: dict[Reach, Travel] = {
            reach: self.placement.travel(seen, queries, keys) for reach, seen in plans.items()
        }
        return Travel(
            hops=jnp.stack([travel.hops for travel in travels.values()]).max(),
            bytes=self.over_layers({reach: travels[reach].bytes for reach in plans}),
        )

    def over_layers(self, values: OfReach) -> Float[Array, ""]:
        """The sum over all layers of one layer's numbers."""
        return jnp.stack([values[reach] for reach in self.run.model.reaches]).sum()

    @property
    def bucket_starts(self) -> tuple[int, ...]:
        """The least tokens of context in each bucket: 0, 64, 128, 256, … below data.length."""
        starts = [0, SECOND_BUCKET]
        while starts[-1] < self.run.data.length:
            starts.append(2 * starts[-1])
        return tuple(start for start in starts if start < self.run.data.length)
