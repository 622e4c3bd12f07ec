"""What a mask's leaves may be: the checks that masks and curricula share."""

import jax.numpy as jnp
import numpy as np

from dynmask_jax.array_typing import fits_int32, is_boolean, is_concrete


def check_whole(owner: str, name: str, value, *, least: int | None = None):
    """Refuses a leaf that is not of whole numbers, or (where it can be read) is below `least`."""
    dtype = getattr(value, "dtype", np.dtype(int) if isinstance(value, int) else None)
    if dtype is None or is_boolean(value) or not jnp.issubdtype(dtype, jnp.signedinteger):
        raise TypeError(f"{owner}: {name} must be a whole number, got {value!r}")
    if is_concrete(value) and not fits_int32(value):
        raise ValueError(f"{owner}: {name} must fit int32, got {value!r}")
    if least is not None and is_concrete(value) and np.min(np.asarray(value)) < least:
        raise ValueError(f"{owner}: {name} must be at least {least}, got {value!r}")


def check_fraction(owner: str, name: str, value):
    """Refuses a leaf that is no number, or (where it can be read) lies outside 0…1."""
    if is_boolean(value) or not (isinstance(value, int | float) or hasattr(value, "dtype")):
        raise TypeError(f"{owner}: {name} must be a number, got {value!r}")
    if is_concrete(value) and not np.all((np.asarray(value) >= 0) & (np.asarray(value) <= 1)):
        raise ValueError(f"{owner}: {name} must lie in 0…1, got {value!r}")
