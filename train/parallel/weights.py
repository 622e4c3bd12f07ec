"""Where weights, and the state that follows them, lie on the mesh: one table of rules."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh

from train.parallel.mesh import FEATURES, WIDTH, constrain, is_sharded, parts_of, sharding_over

Tree = TypeVar("Tree")

WEIGHTS: dict[str, tuple[Any, ...]] = {
    "embed.embedding": (FEATURES, WIDTH),  # [vocabulary, D]
    "query.kernel": (None, WIDTH, FEATURES, None),  # [groups, D, N, H]
    "key.kernel": (None, WIDTH, FEATURES, None),  # [groups, D, K, H]
    "value.kernel": (None, WIDTH, FEATURES, None),
    "out.kernel": (None, FEATURES, None, WIDTH),  # [groups, N, H, D]
    "gate.kernel": (None, WIDTH, FEATURES),  # [groups, D, hidden]
    "up.kernel": (None, WIDTH, FEATURES),
    "down.kernel": (None, FEATURES, WIDTH),  # [groups, hidden, D]
    "logits.kernel": (WIDTH, FEATURES),  # [D, vocabulary]
    # LoRA's pairs of matrices: their inner axis, the rank, is whole.
    **{f"{name}.lora_a": (None, WIDTH, None) for name in ("query", "key", "value", "gate", "up")},
    **{f"{name}.lora_b": (None, None, FEATURES) for name in ("query", "key", "value", "gate", "up")},
    **{f"{name}.lora_a": (None, FEATURES, None) for name in ("out", "down")},  # [groups, N·H or hidden, rank]
    **{f"{name}.lora_b": (None, None, WIDTH) for name in ("out", "down")},  # [groups, rank, D]
}
"""What each axis of a weight is partitioned over, by the last two names of its path.

A weight's gradient, its moments in the optimizer and its running mean have the same names and the same
sharding. Arrays that are not listed are small and replicated: the scales of norms, counts, the key. The
vocabulary is whole where `tensor` does not divide it.
"""


def weight_axes(mesh: Mesh, path: Any, leaf: Any) -> tuple[Any, ...]:
    """The axes of the mesh that each axis of an array is partitioned over; () for a replicated array.

    Args:
      mesh: the devices.
      path: of the array in its tree: JAX's, or its names joined by dots.
      leaf: the array or its shape; of one layer's weight, without the axis of groups.
    """
    whole = path if isinstance(path, str) else jax.tree_util.keystr(path, simple=True, separator=".")
    names = whole.split(".")
    rule = WEIGHTS.get(".".join(names[-2:]), ())
    rule = rule[len(rule) - leaf.ndim :] if rule else ()
    vocabulary = {"embed": 0, "logits": 1}.get(names[-2] if len(names) > 1 else "")
    if rule and vocabulary is not None and leaf.shape[vocabulary] % parts_of(mesh, FEATURES):
        return tuple(None if axis == vocabulary else over for axis, over in enumerate(rule))
    return rule


def shardings_of(mesh: Mesh, tree: Tree) -> Tree:
    """The `NamedSharding` of each array, or `jax.ShapeDtypeStruct`, of a state or a part of one."""
    return jax.tree.map_with_path(
        lambda path, leaf: sharding_over(mesh, *weight_axes(mesh, path, leaf)), tree
    )


def shapes_of(mesh: Mesh, tree: Tree) -> Tree:
    """The `jax.ShapeDtypeStruct` of each array, with its sharding."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings_of(mesh, tree),
    )


def create_sharded(mesh: Mesh, make: Callable[[], Tree]) -> Tree:
    """What `make` returns, each array created in its shards: none is ever whole on a device."""
    if not is_sharded(mesh):
        return make()
    return jax.jit(make, out_shardings=shardings_of(mesh, jax.eval_shape(make)))()


def constrain_weights(mesh: Mesh, tree: Tree) -> Tree:
    """Inside `jit`: the same arrays of a state, or of a part of one, constrained to their shardings."""
    return constrain(mesh, tree, shardings_of(mesh, tree))
