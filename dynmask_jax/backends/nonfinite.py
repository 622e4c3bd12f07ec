"""Keeps a NaN or an infinity to those who may see it.

A hidden pair has weight 0, but 0 · NaN is NaN: inside a matrix product one bad key would reach every
query of its block. So bad rows are emptied, and their marks are added to the logits, which are taken
for visible pairs only.
"""

import jax.numpy as jnp

from dynmask_jax.array_typing import Array, Float


def emptied(rows: Float[Array, "... H"]) -> Float[Array, "... H"]:
    """The rows, with zeros for those that hold anything but finite numbers."""
    return jnp.where(_bad(rows)[..., None], 0.0, rows)


def marks(*rows: Float[Array, "... H"]) -> Float[Array, "..."]:
    """NaN for each row that is not finite in any of the arrays, else 0."""
    bad = _bad(rows[0])
    for other in rows[1:]:
        bad = bad | _bad(other)
    return jnp.where(bad, jnp.nan, 0.0).astype(rows[0].dtype)


def _bad(rows):
    return ~jnp.isfinite(rows).all(axis=-1)
