"""Parts of arrays at places that are traced."""

import jax
import jax.numpy as jnp
from jax import lax

from dynmask_jax.array_typing import Array


def at(array: Array, *place) -> Array:
    """`array[place]`, of traced whole numbers that are in range.

    JAX's own indexing asks of each whether it is negative, which is more to compile in loops over blocks.
    """
    rest = array.shape[len(place) :]
    return lax.dynamic_slice(array, _start(place, len(rest)), (*[1] * len(place), *rest)).reshape(rest)


def row_and_block(number, blocks: int):
    """`divmod` of a number that is not negative: which row, and which of its blocks; less to compile."""
    divisor = jnp.asarray(blocks, number.dtype)
    return lax.div(number, divisor), lax.rem(number, divisor)


def _start(place: tuple, rest: int) -> tuple:
    return (*(jnp.asarray(each, jnp.int32) for each in place), *[jnp.int32(0)] * rest)


def tree_at(tree, *place):
    """`at` of every array of a tree."""
    return jax.tree.map(lambda array: at(array, *place), tree)
