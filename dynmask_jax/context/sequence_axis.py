"""What the strategies share in which each device keeps its own queries: the axis, and their gradients."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
from jax import lax

from dynmask_jax.array_typing import Array
from dynmask_jax.backends.backend import Backend, without_bad
from dynmask_jax.scores import Scores


@dataclass(frozen=True)
class SequenceAxis:
    """The mesh axis that partitions sequences, and what computes there; static under `jit`.

    Attributes:
      axis: its name.
      devices: its size.
      backend: what computes on one device.
      mesh_axes: all of the mesh's.
    """

    axis: str
    devices: int
    backend: Backend
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
    """`attend(sequence, scores, q, k, v, local) -> (out, lse)` of a device's shards, differentiable.

    Args:
      forward: `(sequence, scores, (q, k, v), local) -> ((out, lse), kept)`, where local is the plan of the
        device's own queries for the keys of all devices, in the order of devices.
      gradients: `(sequence, scores, (q, k, v, local, out, lse), kept, (d_out, d_lse))` to
        `(d_q, d_k, d_v, d_bias)`, as a backend's.

    Both take rows as the backend prepares them.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def attend(sequence: SequenceAxis, scores: Scores, q, k, v, local):
        return run(sequence, scores, q, k, v, local)[0]

    def run(sequence: SequenceAxis, scores: Scores, q, k, v, local):
        return forward(sequence, scores, tuple(map(sequence.backend.prepared, (q, k, v))), local)

    def with_residuals(sequence: SequenceAxis, scores: Scores, q, k, v, local):
        results, kept = run(sequence, scores, q, k, v, local)
        return results, (scores, q, k, v, local, results, kept)

    def backward(sequence: SequenceAxis, saved, cotangents):
        scores, *arrays, local, results, kept = saved
        saved = *map(sequence.backend.prepared, arrays), local, *results
        *found, d_bias = gradients(sequence, scores, saved, kept, cotangents)
        return scores.gradient(d_bias), *without_bad(tuple(found), tuple(arrays)), None

    attend.defvjp(with_residuals, backward)
    return attend
