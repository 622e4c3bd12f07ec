"""Whole numbers hashed, and numbers in [0, 1) drawn by it: random orders, strided ones, and dropout.

The hash has the form of C. Wellons' lowbias32 (2018, https://nullprogram.com/blog/2018/07/31/): two rounds of
shift and multiplication. Its constants are those of the widespread `splitmix32`, of less bias than the first
ones: found later with his "hash prospector" (issue 19 of github.com/skeeto/hash-prospector).
"""

import jax
import jax.numpy as jnp

from dynmask_jax.spans import Span, opaque

FIRST, SECOND = (16, 0x21F0AAAD), (15, 0x735A2D97)
"""The two rounds: by how much each shifts, and what it multiplies by."""
DIGITS = 24
"""Binary digits that a float32 in [0, 1) holds."""


def random_draw(seed, i, j):
    """A number in [0, 1) for each (seed, i, j), the same on every device and in every tile."""
    return opaque(lambda i, j: _unit(mixed(mixed(mixed(seed ^ 0x5BD1E995) ^ i) ^ j)), 0.0, 1.0, i, j)


def radical_inverse(n):
    """The binary digits of n ≥ 0 mirrored at the point, in [0, 1): 1/2, 1/4, 3/4, 1/8, … for n = 1, 2, ….

    Multiples of 2^m are those below 2^−m. Of n's digits the lowest 24 count, which float32 holds. Over a span
    of more than two numbers the bounds are powers of two: see `_mirrored_span`.
    Source: van der Corput 1935.
    """
    known = opaque(_mirrored, 0.0, 1.0, n)
    if not isinstance(n, Span):
        return known
    bounds = _mirrored_span(n)
    return Span(jnp.maximum(known.lo, bounds.lo), jnp.minimum(known.hi, bounds.hi))


def _mirrored_span(n: Span) -> Span:
    """Bounds of the radical inverse over lo … hi.

    A number with m zeros at its end, and no more, is mirrored to at least 2^−(m+1), one with m ones to less
    than 1 − 2^−(m+1). The most zeros that a number of lo … hi has are at the place of the highest digit in
    which lo − 1 and hi differ; the most ones, of lo and hi + 1.
    """
    zeros, ones = (_highest_digit(a ^ b) for a, b in ((n.lo - 1, n.hi), (n.lo, n.hi + 1)))
    least = jnp.where((n.lo > 0) & (zeros < DIGITS), _half_to(zeros + 1), 0.0)
    # Numbers at the end of int32 wrap: nothing is said of them, nor of what is negative.
    within = (n.lo >= 0) & (n.hi < jnp.iinfo(jnp.int32).max) & (ones < DIGITS)
    return Span(least, jnp.where(within, 1.0 - _half_to(ones + 1), 1.0))


def _highest_digit(n):
    """The place of the highest digit that is 1, from 0 on."""
    return 31 - jax.lax.clz(jnp.asarray(n).astype(jnp.int32))


def _half_to(n):
    """2^−n, exact, for 0 ≤ n ≤ 126."""
    return jax.lax.bitcast_convert_type((127 - n) << 23, jnp.float32)


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
