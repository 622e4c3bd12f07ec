"""Which fields of tokens a mask or a bias reads: whether a call can do without the caller's tokens."""

import functools

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


@functools.lru_cache(maxsize=1024)
def _fields_read(structure, kinds) -> frozenset[str]:
    leaves = [kind() if isinstance(kind, type) else kind for kind in kinds]
    field = jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def shown(q_position, q_segment, k_position, k_segment, leaves):
        q, k = Tokens(q_position, q_segment), Tokens(k_position, k_segment)
        expression = jax.tree.unflatten(structure, leaves)
        return evaluate(expression, q, k) if isinstance(expression, Mask) else scored(expression, q, k)

    used = _used(jax.make_jaxpr(shown)(field, field, field, field, leaves).jaxpr)
    return frozenset(name for at, name in enumerate(FIELDS) if used[at])


def _used(jaxpr) -> list[bool]:
    """Whether each input of a program reaches its outputs; an operation is taken to use all it is given."""
    needed = {id(variable) for variable in jaxpr.outvars}
    for equation in reversed(jaxpr.eqns):
        if any(id(variable) in needed for variable in equation.outvars):
            needed.update(map(id, equation.invars))
    return [id(variable) in needed for variable in jaxpr.invars]
