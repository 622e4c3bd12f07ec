"""Weights gathered for use, whose gradients go straight back to the shards."""

from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from dynmask_jax.array_typing import Array
from train.parallel.mesh import ROWS, TOKENS, WIDTH, constrain, is_sharded, parts_of, sharding_over
from train.parallel.weights import weight_axes

Tree = TypeVar("Tree")


def gather_layer(mesh: Mesh, weights: Tree, dtype: Any) -> Tree:
    """Inside `jit`: a layer's weights as its products read them, whole on the axes of `WIDTH`.

    They are gathered in the dtype of the products: bfloat16 is half as much to send as float32. Each
    gradient is summed straight into its shards.
    """
    if not is_sharded(mesh):
        return weights

    def gather(path, leaf):
        axes = weight_axes(mesh, path, leaf)
        if not axes:
            return leaf
        return gather_weight(leaf, dtype, sharding_over(mesh, *_whole(axes)), sharding_over(mesh, *axes))

    with jax.named_scope("gathered"):
        return jax.tree.map_with_path(gather, weights)


def per_device_copy(mesh: Mesh, path: str, weight: Array) -> Array:
    """Inside `jit`: `[devices of rows and tokens, …]`, a whole copy of the weight for each of these devices.

    A loop over parts of a device's tokens then sums the gradient on that device, and the sum over devices
    comes once, after the loop.
    """
    axes = _whole(weight_axes(mesh, path, weight))
    whole = constrain(mesh, weight, sharding_over(mesh, *axes))
    copies = jnp.broadcast_to(whole, (parts_of(mesh, *ROWS, TOKENS), *weight.shape))
    return constrain(mesh, copies, sharding_over(mesh, (TOKENS, *ROWS), *axes))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather_weight(weight: Array, dtype: Any, whole: NamedSharding, shards: NamedSharding) -> Array:
    """A float32 weight in `dtype` with the sharding `whole`; its gradient, in float32, has that of `shards`.

    JAX's own transpose of a sharding constraint would make the gradient whole on every device first: a sum
    over all devices, twice what has to be sent.
    """
    del shards
    return jax.lax.with_sharding_constraint(weight.astype(dtype), whole)


def _forward(weight, dtype, whole, shards):
    return gather_weight(weight, dtype, whole, shards), None


def _backward(dtype, whole, shards, _, gradient):
    return (jax.lax.with_sharding_constraint(gradient, shards).astype(jnp.float32),)


gather_weight.defvjp(_forward, _backward)


def _whole(axes: tuple[Any, ...]) -> tuple[Any, ...]:
    """The axes without those of `WIDTH`."""
    return tuple(None if axis == WIDTH else axis for axis in axes)
