"""Weights gathered for use, whose gradients go straight back to where they lie."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from dynmask_jax.array_typing import Array


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gathered(weight: Array, dtype: Any, whole: NamedSharding, spread: NamedSharding) -> Array:
    """A float32 weight in `dtype`, spread as `whole` says; its gradient, in float32 too, as `spread` does.

    JAX's own transpose of a sharding constraint would hold the gradient whole on every device first: a sum
    over all devices, twice what has to travel.
    """
    del spread
    return jax.lax.with_sharding_constraint(weight.astype(dtype), whole)


def _forward(weight, dtype, whole, spread):
    return gathered(weight, dtype, whole, spread), None


def _backward(dtype, whole, spread, _, gradient):
    return (jax.lax.with_sharding_constraint(gradient, spread).astype(jnp.float32),)


gathered.defvjp(_forward, _backward)
