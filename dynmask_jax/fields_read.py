"""What a mask or a bias is made of, found in its own trace: the fields of tokens it reads, its operations."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from dynmask_jax.bias_algebra import Bias, scored
from dynmask_jax.mask_algebra import Mask, evaluate
from dynmask_jax.tokens import Tokens

FIELDS = "q.position", "q.segment", "k.position", "k.segment"


def fields_read(expression: Mask | Bias) -> frozenset[str]:
    """The fields of queries and keys, of `FIELDS`, that what a mask shows, or a bias adds, may depend on.

    Found in its own trace, so expressions of one's own are read like those of the catalogue. Their numbers
    do not matter: `Window(n)` reads positions, whatever n is.

    Raises:
      what it raises on tokens.
    """
    leaves, structure = jax.tree.flatten(expression)
    return _fields_read(structure, tuple(map(_kind, leaves)))


def reads_segments(expression: Mask | Bias | None) -> bool:
    """Whether it reads the document of a query or a key; None reads nothing."""
    return expression is not None and not fields_read(expression).isdisjoint({"q.segment", "k.segment"})


def _kind(leaf):
    """What is one head's of a leaf, which is a scalar or has heads first."""
    if isinstance(leaf, bool | int | float):
        return type(leaf)
    return jax.ShapeDtypeStruct(
        jnp.shape(leaf)[1:], jnp.result_type(leaf), weak_type=getattr(leaf, "weak_type", False)
    )


def operations(expression: Mask | Bias) -> frozenset[tuple[str, str]]:
    """JAX's operations that an expression of one pair of tokens is made of: their names and dtypes.

    An operation has the dtype of its first operand, and once more that of its result.

    Raises:
      what it raises on tokens.
    """
    leaves, structure = jax.tree.flatten(expression)
    equations = equations_in(_traced(structure, tuple(map(_kind, leaves))))
    values = (
        (each.primitive.name, value) for each in equations for value in (each.invars[:1] + each.outvars)
    )
    return frozenset((name, str(value.aval.dtype)) for name, value in values)


def equations_in(jaxpr) -> Iterator[Any]:
    """All operations in a traced function, in what it calls too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for each in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(each, "jaxpr", each)
                if hasattr(inner, "eqns"):
                    yield from equations_in(inner)


def _fields_read(structure, kinds) -> frozenset[str]:
    used = _used(_traced(structure, kinds))
    return frozenset(name for at, name in enumerate(FIELDS) if used[at])


@functools.lru_cache(maxsize=1024)
def _traced(structure, kinds):
    """An expression's trace, of one pair's fields in the order of `FIELDS` and then its leaves."""
    leaves = [kind() if isinstance(kind, type) else kind for kind in kinds]
    field = jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def shown(q_position, q_segment, k_position, k_segment, leaves):
        q, k = Tokens(q_position, q_segment), Tokens(k_position, k_segment)
        expression = jax.tree.unflatten(structure, leaves)
        return evaluate(expression, q, k) if isinstance(expression, Mask) else scored(expression, q, k)

    return jax.make_jaxpr(shown)(field, field, field, field, leaves).jaxpr


def _used(jaxpr) -> list[bool]:
    """Whether each input of a program reaches its outputs; an operation is taken to use all it is given."""
    needed = {id(variable) for variable in jaxpr.outvars}
    for equation in reversed(jaxpr.eqns):
        if any(id(variable) in needed for variable in equation.outvars):
            needed.update(map(id, equation.invars))
    return [id(variable) in needed for variable in jaxpr.invars]
