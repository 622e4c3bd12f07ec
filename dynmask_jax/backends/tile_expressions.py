"""Masks, biases and draws on a tile, operation by operation, as kernels for NVIDIA cards can compute them.

An expression is traced on tokens `[line, 1]` and `[1, column]` and then computed anew: literals get a dtype
of their own; what depends on literals alone is computed here; and, in `elementwise`, what depends on the
tokens of one side alone is computed once a token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}
"""The operations that call a traced function, and what holds it: here it is written out."""
_ARITHMETIC = {
    "abs",
    "add",
    "clamp",
    "div",
    "integer_pow",
    "max",
    "min",
    "mul",
    "neg",
    "rem",
    "round",
    "sign",
}
_ARITHMETIC |= {"square", "sub", "convert_element_type", "select_n"}
_BITS = {"and", "not", "or", "xor", "shift_left", "shift_right_arithmetic", "shift_right_logical"}
ELEMENTWISE = frozenset(_ARITHMETIC | _BITS | {"eq", "ne", "ge", "gt", "le", "lt"})
"""The operations that `elementwise` computes, with `broadcast_in_dim` and those of `CALLS`.

Exponentials, roots and the like are not among them: Mosaic GPU approximates them where a kernel's own
exponential is to be fast.
"""
_WHOLE = {"div", "rem", "and", "or", "xor", "not"}
"""Operations of whole numbers and booleans alone: a card divides other ones with an error."""


def not_elementwise(used: frozenset[tuple[str, str]]) -> list[str]:
    """Of operations, as `fields_read.operations` gives them, those that `elementwise` does not compute."""

    def is_known(name: str, dtype: str) -> bool:
        if name in CALLS or name == "broadcast_in_dim":
            return True
        dtypes = {"bool", "int32", "uint32"} if name in _WHOLE else {"bool", "int32", "uint32", "float32"}
        return name in ELEMENTWISE and dtype in dtypes

    return sorted(f"{name} of {dtype}" for name, dtype in used if not is_known(name, dtype))


def strongly_typed(function: Callable, *arguments):
    """`function(*arguments)` of arrays, its literals with a dtype of their own, and what they make computed.

    Where a selection's literals have none, as in `jnp.where(seen, 0.5, 0.0)`, Triton's lowering takes them
    for booleans, like its condition (JAX 0.7 to 0.12).
    """

    def bind(equation, given):
        return equation.primitive.bind(*given, **equation.params)

    return _computed(function, arguments, jax.tree.leaves(arguments), bind)


def elementwise(function: Callable, scalars, line, column, shape: tuple[int, int]):
    """`function(scalars, line, column)` on a tile, of arrays `[line, 1]` and `[1, column]`, elementwise.

    Args:
      function: of operations that `not_elementwise` lets pass, giving arrays of the tile's shape.
      scalars: arrays of no axes, in any structure.
      line, column: arrays `[line]` and `[column]`, in any structure.
      shape: of the tile.
    """
    given = scalars, line, column
    axes = (), (0,), (1,)
    parts = [_Part(on, x) for on, tree in zip(axes, given, strict=True) for x in jax.tree.leaves(tree)]
    shapes = (), (shape[0], 1), (1, shape[1])
    types = [
        jax.tree.map(lambda x, of=of: jax.ShapeDtypeStruct(of, x.dtype), tree)
        for of, tree in zip(shapes, given, strict=True)
    ]

    def bind(equation, given):
        given = [x if isinstance(x, _Part) else _Part((), x) for x in given]
        if equation.primitive.name == "broadcast_in_dim":
            return given[0]
        axes = tuple(sorted({axis for x in given for axis in x.axes}))
        return _Part(axes, _bound(equation, [x.spread(axes, shape) for x in given]))

    found = _computed(function, types, parts, bind)
    return jax.tree.map(
        lambda x: x.spread((0, 1), shape), found, is_leaf=lambda leaf: isinstance(leaf, _Part)
    )


def _bound(equation, values: list):
    """An operation on values of one shape; on booleans some as Mosaic GPU has them."""
    name = equation.primitive.name
    assert name in ELEMENTWISE, equation.primitive
    if name == "not" and values[0].dtype == jnp.bool_:
        return lax.select_n(values[0], *(_spread_flag(values[0].shape, flag) for flag in (True, False)))
    if name == "convert_element_type" and equation.params["new_dtype"] == jnp.bool_:
        return values[0] != 0
    return equation.primitive.bind(*values, **equation.params)


def _spread_flag(shape: tuple[int, ...], flag):
    """One boolean on a whole shape, which Mosaic GPU has of numbers alone."""
    return lax.full(shape, int(flag), jnp.int32) != 0


@dataclass(frozen=True)
class _Part:
    """A value on a tile, held on those of the tile's axes along which it differs."""

    axes: tuple[int, ...]
    value: Any

    def spread(self, axes: tuple[int, ...], shape: tuple[int, int]):
        """It on these axes of a tile of this shape."""
        if self.axes == axes:
            return self.value
        of = tuple(shape[axis] for axis in axes)
        if isinstance(self.value, np.ndarray) and self.value.dtype == bool:
            return _spread_flag(of, self.value)
        return lax.broadcast_in_dim(self.value, of, [axes.index(axis) for axis in self.axes])


def _computed(function: Callable, types, values: list, bind: Callable):
    """The function of values of these types, each operation by `bind(equation, values) -> value`."""
    leaves, structure = jax.tree.flatten(types)

    def flat(*leaves):
        return function(*jax.tree.unflatten(structure, leaves))

    traced, shapes = jax.make_jaxpr(flat, return_shape=True)(*leaves)
    return jax.tree.unflatten(
        jax.tree.structure(shapes), _evaluated(traced.jaxpr, traced.consts, values, bind)
    )


def _evaluated(jaxpr, consts, arguments, bind: Callable) -> list:
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))

    def value(atom):
        return np.asarray(atom.val, atom.aval.dtype) if hasattr(atom, "val") else values[atom]

    for equation in jaxpr.eqns:
        given, primitive = list(map(value, equation.invars)), equation.primitive
        if primitive.name in CALLS:
            inner = equation.params[CALLS[primitive.name]]
            found = _evaluated(inner.jaxpr, inner.consts, given, bind)
        else:
            known = all(isinstance(each, np.ndarray) for each in given) and not equation.outvars[0].aval.shape
            found = _known(equation, given) if known else bind(equation, given)
            found = found if primitive.multiple_results else [found]
        values.update(zip(equation.outvars, found, strict=True))
    return list(map(value, jaxpr.outvars))


def _known(equation, given: list) -> np.ndarray:
    """What an operation makes of literals, of which Triton's lowering cannot negate one, say."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # with JAX_PLATFORMS=cuda there is no other than the card
        device = None
    with jax.default_device(device), jax.ensure_compile_time_eval():
        return np.asarray(equation.primitive.bind(*given, **equation.params))
