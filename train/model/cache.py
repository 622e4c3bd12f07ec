"""Keys and values of the tokens so far, that generation keeps.

Slots of the cache count the columns of a batch: prompts of width P have the slots up to P, and the tokens
that follow them those from P on. Global layers have a slot for each, and prompts begin at slot 0. In
local layers the slots are a ring of `model.local_window` at most, in which slot s is at s modulo its size:
what a window no longer reaches is overwritten. There prompts end at slot P − 1, whatever their length, so
that the newest tokens of all rows lie side by side.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dynmask_jax import Tokens
from dynmask_jax.array_typing import Array, Float, Int, pytree
from train.config.sections import Model, Reach

LayerKeys = dict[Reach, Float[Array, "layers B S K H"]]


@pytree
class Cache:
    """Keys and values of the layers of each reach in the model's pattern.

    Attributes:
      keys, values: `[layers of the reach, B, S, K, H]`, S slots.
    """

    keys: LayerKeys
    values: LayerKeys

    @classmethod
    def empty(cls, model: Model, batch: int, slots: Mapping[Reach, int]) -> "Cache":
        """For `batch` sequences, with so many slots in the layers of each reach."""

        def zeros(reach: Reach) -> Array:
            size = (model.reaches.count(reach), batch, slots[reach], model.kv_heads, model.head_size)
            return jnp.zeros(size, model.dtype)

        keys: LayerKeys = {reach: zeros(reach) for reach in sorted(set(model.pattern))}
        return cls(keys, jax.tree.map(jnp.copy, keys))

    def of_layer(self, reach: Reach, layer) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Keys and values of a layer, counted among those of its reach."""
        return self.keys[reach][layer], self.values[reach][layer]

    def write(
        self, reach: Reach, layer, slot, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]
    ) -> "Cache":
        """The cache with a layer's keys and values from `slot` on."""
        return self._with(reach, layer, jnp.asarray(slot, jnp.int32) % self.keys[reach].shape[2], k, v)

    def write_prompts(
        self,
        reach: Reach,
        layer,
        lengths: Int[Array, " B"],
        k: Float[Array, "B P K H"],
        v: Float[Array, "B P K H"],
    ) -> "Cache":
        """The cache with a layer's keys and values of prompts, each at its row's beginning in k and v."""
        if reach == "local":
            places = ring_places(self.keys[reach].shape[2], lengths, k.shape[1], 0)
            kept = jnp.maximum(places, 0)[:, :, None, None]
            k, v = (jnp.take_along_axis(x, kept, axis=1) for x in (k, v))
        return self._with(reach, layer, 0, k, v)

    def _with(self, reach: Reach, layer, slot, k, v) -> "Cache":
        at = (layer, 0, slot, 0, 0)
        keys: LayerKeys = {**self.keys, reach: jax.lax.dynamic_update_slice(self.keys[reach], k[None], at)}
        values: LayerKeys = {
            **self.values,
            reach: jax.lax.dynamic_update_slice(self.values[reach], v[None], at),
        }
        return Cache(keys, values)


def slots_of(model: Model, slots: int) -> dict[Reach, int]:
    """The slots that layers of each reach keep of so many."""
    return {"global": slots, "local": min(model.local_window, slots)}


def ring_places(
    slots: int, lengths: Int[Array, " B"], width: int, made: int | Int[Array, ""]
) -> Int[Array, "B S"]:
    """The number, in its text, of the newest token in each slot of a ring; below 0: there is none.

    Args:
      slots: in the ring.
      lengths: tokens in each prompt.
      width: P, the slot of the first token after the prompts.
      made: tokens after each prompt.

    >>> ring_places(4, jnp.array([6, 2]), width=6, made=0).tolist()
    [[4, 5, 2, 3], [0, 1, -2, -1]]
    >>> ring_places(4, jnp.array([6, 2]), width=6, made=1).tolist()
    [[4, 5, 6, 3], [0, 1, 2, -1]]
    """
    last = jnp.asarray(width + made - 1, jnp.int32)
    newest = last - (last - jnp.arange(slots, dtype=jnp.int32)) % slots
    return newest[None, :] - width + lengths[:, None]


def slot_tokens(
    reach: Reach,
    slots: int,
    starts: Int[Array, " B"],
    lengths: Int[Array, " B"],
    width: int,
    made: int | Int[Array, ""],
) -> Tokens:
    """What masks read of the slots of a reach; one without a token is of segment 0.

    Args:
      reach: of the layers.
      slots: that they have.
      starts: the position of each prompt's first token.
      lengths, width, made: as for `ring_places`; a row of length 0 has no tokens.
    """
    there = lengths[:, None] > 0
    if reach == "local":
        place = ring_places(slots, lengths, width, made)
        full = (place >= 0) & there
    else:
        slot = jnp.arange(slots, dtype=jnp.int32)[None, :]
        after = slot - width
        place = jnp.where(after >= 0, lengths[:, None] + after, slot)
        full = (slot < lengths[:, None]) | ((after >= 0) & (after < made) & there)
    return Tokens(starts[:, None] + place, full.astype(jnp.int32))
