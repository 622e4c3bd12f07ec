"""Loop carries inside `shard_map`: a value must say that it varies over a mesh axis before it does."""

import jax
import jax.numpy as jnp
from jax import lax

# JAX 0.7 has `pvary` and `typeof(x).vma`; 0.10 has `pcast` and `typeof(x).manual_axis_type.varying`.
_PCAST = getattr(lax, "pcast", None)
_PVARY = getattr(lax, "pvary", None)


def vary_like(value, *others):
    """`value`, its arrays typed as varying over every mesh axis that those of `others` vary over.

    Outside `shard_map` nothing varies and nothing changes. Differentiable: what was the same on all
    devices of an axis gets the sum of their gradients.
    """
    axes = frozenset().union(*(_axes(leaf) for leaf in jax.tree.leaves(others)))
    return jax.tree.map(lambda leaf: _vary(leaf, axes - _axes(leaf)), value)


def _axes(leaf) -> frozenset:
    kind = jax.typeof(leaf)
    manual = getattr(kind, "manual_axis_type", None)
    return frozenset(kind.vma if manual is None else manual.varying)


def _vary(leaf, axes: frozenset):
    if not axes:
        return leaf
    if _PCAST is not None:
        return _PCAST(leaf, tuple(axes), to="varying")
    assert _PVARY is not None, "every supported JAX has one of the two"
    return _PVARY(leaf, tuple(axes))


def shape_like(shape: tuple[int, ...], dtype, *others) -> jax.ShapeDtypeStruct:
    """The type of a kernel's output that varies over every mesh axis that arrays of `others` vary over."""
    return jax.eval_shape(lambda *others: vary_like(jnp.zeros(shape, dtype), *others), *others)


def agreed(value, axes: tuple[str, ...]):
    """The greatest of a number on all devices along some axes: the same on all of them, so that a loop
    with communication inside may be run that many times.
    """
    return lax.pmax(_vary(value, frozenset(axes) - _axes(value)), axes)
