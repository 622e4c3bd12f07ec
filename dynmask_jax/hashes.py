"""Whole numbers hashed, and numbers in [0, 1) drawn by it: random orders, strided ones, and dropout.

The hash has the form of C. Wellons' lowbias32 (2018, https://nullprogram.com/blog/2018/07/31/): two rounds of
shift and multiplication. Its constants are those of the widespread `splitmix32`, of less bias than the first
ones: found later with his "hash prospector" (issue 19 of github.com/skeeto/hash-prospector).
"""

import jax
import jax.numpy as jnp

from dynmask_jax.spans import opaque

FIRST, SECOND = (16, 0x21F0AAAD), (15, 0x735A2D97)
"""The two rounds: by how much each shifts, and what it multiplies by."""


def random_draw(seed, i, j):
    """A number in [0, 1) for each (seed, i, j), the same on every device and in every tile."""
    return opaque(lambda i, j: _unit(mixed(mixed(mixed(seed ^ 0x5BD1E995) ^ i) ^ j)), 0.0, 1.0, i, j)


def radical_inverse(n):
    """The binary digits of n ≥ 0 mirrored at the point, in [0, 1): 1/2, 1/4, 3/4, 1/8, … for n = 1, 2, ….

    Multiples of 2^m are those below 2^−m. Of n's digits the lowest 24 count, which float32 holds.
    Source: van der Corput 1935.
    """
    return opaque(_mirrored, 0.0, 1.0, n)


def _mirrored(n):
    n = jnp.asarray(n).astype(jnp.int32)
    for shift, low in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF), (16, 0x0000FFFF)):
        n = ((n & low) << shift) | (jax.lax.shift_right_logical(n, jnp.full_like(n, shift)) & low)
    return _unit(n)


def mixed(x):
    """The hash of whole numbers, int32: one to one."""
    x = hash_round(hash_round(jnp.asarray(x).astype(jnp.int32), FIRST), SECOND)
    return x ^ jax.lax.shift_right_logical(x, jnp.full_like(x, 15))


def hash_round(x, constants: tuple[int, int]):
    """One round of the hash, of int32: its upper bits depend on all of x. One to one."""
    shift, multiplier = constants
    return (x ^ jax.lax.shift_right_logical(x, jnp.full_like(x, shift))) * multiplier


def _unit(x):
    """The upper 24 bits of an int32 as a float32 in [0, 1): exact, so that 1 bounds it strictly."""
    return jax.lax.shift_right_logical(x, jnp.full_like(x, 8)).astype(jnp.float32) * 2.0**-24
