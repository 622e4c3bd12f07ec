"""Shape letters, array types, and the frozen pytree record that everything here is made of.

The letters are those of `jax.nn`:

| letter | axis | letter | axis |
|---|---|---|---|
| B | batch | N | query heads |
| T | queries | K | key heads |
| S | keys | G | query heads per key head, N // K |
| H | head dim | D | model width |

Of a plan: Tb and Sb count the blocks of queries and keys, R is its rows: B, or 1 where one plan
serves the whole batch.
"""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

__all__ = ["Array", "Bool", "Float", "Int", "Number", "fits_int32", "is_boolean", "is_concrete", "is_traced"]
__all__ += ["pytree", "static", "sum_dtype"]

Number = int | float | np.ndarray | Array
"""What a mask leaf may be: a Python number, or an array of rank 0 or `[N]`, traced or not."""

_Record = TypeVar("_Record")


def static(default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field that belongs to the structure of a pytree, not to its data."""
    return dataclasses.field(default=default, metadata={"static": True})


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(static, dataclasses.field))
def pytree(cls: type[_Record]) -> type[_Record]:
    """Makes `cls` a frozen dataclass whose fields are pytree children, save the `static()` ones.

    Validation in `__post_init__` runs when a caller builds the record. It does not run when JAX
    rebuilds one from leaves, which may then be tracers, axis numbers or placeholders. Records
    compare by identity: their leaves may be arrays.
    """
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    data = [f.name for f in fields if not f.metadata.get("static")]
    fixed = [f.name for f in fields if f.metadata.get("static")]

    def structure(record):
        return tuple(getattr(record, name) for name in fixed)

    def flatten(record):
        return tuple(getattr(record, name) for name in data), structure(record)

    def flatten_with_keys(record):
        children = [(jax.tree_util.GetAttrKey(name), getattr(record, name)) for name in data]
        return children, structure(record)

    def unflatten(values, children):
        record = object.__new__(cls)
        for name, value in zip(data, children, strict=True):
            object.__setattr__(record, name, value)
        for name, value in zip(fixed, values, strict=True):
            object.__setattr__(record, name, value)
        return record

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def sum_dtype(dtype) -> np.dtype:
    """What sums over values of a floating dtype are kept in: float32, or float64 for itself."""
    return np.dtype(np.float64 if dtype == np.dtype(np.float64) else np.float32)


def is_concrete(value: object) -> bool:
    """Whether `value` is a number or an array whose contents can be read now, outside a trace."""
    numbers = (bool, int, float, np.ndarray, np.generic, jax.Array)
    return isinstance(value, numbers) and not is_traced(value)


def is_traced(value: object) -> bool:
    """Whether `value` stands for data that is not there yet, inside `jit`, `grad` or `vmap`."""
    return isinstance(value, Tracer)


def fits_int32(values) -> bool:
    """Whether concrete whole numbers are all in the range of int32."""
    values = np.asarray(values)
    return int(values.min()) >= -(2**31) and int(values.max()) < 2**31


def is_boolean(value: object) -> bool:
    """Whether `value` is a Python bool or an array of booleans, traced or not."""
    return isinstance(value, bool) or getattr(value, "dtype", None) == np.dtype(bool)
