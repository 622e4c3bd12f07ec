"""Attention along an axis of devices on which each keeps its queries: what its ways of meeting keys share."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
from jax import lax

from dynmask_jax.array_typing import Array
from dynmask_jax.backends.backend import Backend, without_bad
from dynmask_jax.scores import Scores


@dataclass(frozen=True)
class Along:
    """What is fixed when compiled.

    Attributes:
      axis: the mesh's axis that the sequence lies along.
      devices: its size.
      backend: what computes on one device.
      scores: how products become logits.
      mesh_axes: all of the mesh's.
    """

    axis: str
    devices: int
    backend: Backend
    scores: Scores
    mesh_axes: tuple[str, ...]

    def owner(self, distance) -> Array:
        """The device so many steps before this one."""
        return (lax.axis_index(self.axis) - distance) % self.devices

    def shift(self, arrays, steps: int):
        """What the device so many steps before this one holds."""
        n = self.devices
        permutation = [(device, (device + steps) % n) for device in range(n)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axis, permutation), arrays)


def with_gradients(forward: Callable, gradients: Callable) -> Callable:
    """`attend(along, q, k, v, local) -> (out, lse)` of a device's shards, which JAX differentiates.

    Args:
      forward: `(along, q, k, v, local) -> ((out, lse), kept)`, where local is the plan of the device's
        own queries for the keys of all devices, in the order of devices.
      gradients: `(along, (q, k, v, local, out, lse), kept, (d_out, d_lse)) -> (d_q, d_k, d_v)`.

    Both take rows as the backend prepares them.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def attend(along: Along, q, k, v, local):
        return forward(along, *map(along.backend.prepared, (q, k, v)), local)[0]

    def with_residuals(along: Along, q, k, v, local):
        results, kept = forward(along, *map(along.backend.prepared, (q, k, v)), local)
        return results, (q, k, v, local, results, kept)

    def backward(along: Along, saved, cotangents):
        *arrays, local, results, kept = saved
        saved = *map(along.backend.prepared, arrays), local, *results
        return *without_bad(gradients(along, saved, kept, cotangents), tuple(arrays)), None

    attend.defvjp(with_residuals, backward)
    return attend
