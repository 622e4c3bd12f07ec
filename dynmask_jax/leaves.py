"""What the fields of masks, biases and curricula may be: the checks that they share."""

from collections.abc import Callable
from types import CellType
from typing import Any

import jax.numpy as jnp
import numpy as np

from dynmask_jax.array_typing import fits_int32, is_boolean, is_concrete, is_traced


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


def check_function(owner: str, function: Callable):
    """Refuses what is no function of two tokens, or one that closes over a traced value."""
    if not callable(function):
        raise TypeError(f"{owner}: function must be callable, got {function!r}")
    for name, value in _closed_over(function):
        if is_traced(value):
            raise ValueError(
                f"{owner}: the function closes over {name}, which is traced; give it as a parameter: "
                f"{owner}(lambda q, k, {name}: …, {name})"
            )


def _closed_over(function) -> list[tuple[str, Any]]:
    """The variables of an enclosing function that it uses, with their values."""
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or cells is None:
        return []
    return [(n, c.cell_contents) for n, c in zip(code.co_freevars, cells, strict=True) if c != CellType()]
