"""Which fields of tokens a mask reads: whether a call can do without the caller's tokens."""

import functools

import jax
import jax.numpy as jnp

from dynmask_jax.mask_algebra import Mask, evaluate
from dynmask_jax.tokens import Tokens

FIELDS = "q.position", "q.segment", "k.position", "k.segment"


def fields_read(mask: Mask) -> frozenset[str]:
    """The fields of queries and keys, of `FIELDS`, that what the mask shows may depend on.

    Found in the mask's own trace, so masks of one's own are read like those of the catalogue. Numbers of the
    mask do not matter: `Window(n)` reads positions, whatever n is.

    Raises:
      what the mask raises on tokens.
    """
    leaves, structure = jax.tree.flatten(mask)
    return _fields_read(structure, tuple(map(_kind, leaves)))


def reads_segments(mask: Mask) -> bool:
    """Whether the mask reads the document of a query or a key."""
    return not fields_read(mask).isdisjoint({"q.segment", "k.segment"})


def _kind(leaf):
    """A scalar like the leaf, or one value of a per-head leaf."""
    if isinstance(leaf, bool | int | float):
        return type(leaf)
    return jax.ShapeDtypeStruct((), jnp.result_type(leaf), weak_type=getattr(leaf, "weak_type", False))


@functools.lru_cache(maxsize=1024)
def _fields_read(structure, kinds) -> frozenset[str]:
    leaves = [kind() if isinstance(kind, type) else kind for kind in kinds]
    field = jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def shown(q_position, q_segment, k_position, k_segment, leaves):
        q, k = Tokens(q_position, q_segment), Tokens(k_position, k_segment)
        return evaluate(jax.tree.unflatten(structure, leaves), q, k)

    used = _used(jax.make_jaxpr(shown)(field, field, field, field, leaves).jaxpr)
    return frozenset(name for at, name in enumerate(FIELDS) if used[at])


def _used(jaxpr) -> list[bool]:
    """Whether each input of a program reaches its outputs; an operation is taken to use all it is given."""
    needed = {id(variable) for variable in jaxpr.outvars}
    for equation in reversed(jaxpr.eqns):
        if any(id(variable) in needed for variable in equation.outvars):
            needed.update(map(id, equation.invars))
    return [id(variable) in needed for variable in jaxpr.invars]
