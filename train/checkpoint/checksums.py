"""Dtype, shape and checksum of each array of a state, so that a flipped bit in a checkpoint is found.

The storage layers below a checkpoint verify their index, but not the arrays.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_leaves_with_path

from dynmask_jax.array_typing import Array, Int

Leaves = dict[str, list[Any]]
"""Dotted path of a leaf -> [dtype, shape, checksum], as in JSON."""


def leaves(tree: Any) -> Leaves:
    """Dtype, shape and checksum of each array of a tree; waits for the arrays.

    The checksum is the sum modulo 2³² of the leaf's bits in words of at most 32 bits, each times another odd
    number; so a change of one word always changes it. Each device sums its shard.

    >>> leaves({"w": jnp.arange(3), "b": {"c": jnp.float32(0)}})
    {'b.c': ['float32', [], 0], 'w': ['int32', [3], 13]}
    """
    sums = jax.device_get(_checksums(tree))
    found = tree_leaves_with_path(tree)
    return {
        _name(path): [str(leaf.dtype), list(leaf.shape), int(total)]
        for (path, leaf), total in zip(found, sums, strict=True)
    }


def shapes(tree: Any) -> dict[str, list[Any]]:
    """Dtype and shape of each array of a tree, or of each `jax.ShapeDtypeStruct`."""
    return {_name(path): [str(leaf.dtype), list(leaf.shape)] for path, leaf in tree_leaves_with_path(tree)}


@jax.jit
def finite(tree: Any) -> Array:
    """Whether all elements of a tree are finite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


@jax.jit
def _checksums(tree: Any) -> list[Array]:
    return [_checksum(leaf) for leaf in jax.tree.leaves(tree)]


def _checksum(leaf: Array) -> Int[Array, ""]:
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    width = min(leaf.dtype.itemsize, 4)  # 8 bytes become two words
    words = jax.lax.bitcast_convert_type(leaf, f"uint{8 * width}").astype(jnp.uint32)
    # Words are numbered without a reshape, which would gather a sharded leaf.
    number, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        number += index * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return (words * (2 * number + 1)).sum(dtype=jnp.uint32)


def _name(path: Any) -> str:
    return keystr(path, simple=True, separator=".")
