"""Inside `jit`: activations constrained to the mesh, and rows and tokens cut along it.

On a mesh of one device the constraints change nothing: see `train.parallel.mesh`.
"""

from collections.abc import Callable

from jax.sharding import Mesh

from dynmask_jax.array_typing import Array, Float, Int
from train.parallel.mesh import (
    FEATURES,
    ROWS,
    TOKENS,
    WIDTH,
    Axes,
    constrain,
    is_sharded,
    parts_of,
    sharding_over,
)


def embed_tokens(mesh: Mesh, embed: Callable, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """`embed(tokens)`, constrained as by `constrain_activations`.

    Each device looks up all tokens in its columns of the embedding. The result is then sent to the devices
    of the tokens, one axis of the mesh at a time: the compiler can move two at once only by gathering all.
    So a part of the activations is sent, not the whole embedding.
    """
    x = embed(_constrain(mesh, tokens, "data"))
    for axes in (("data", None, WIDTH), ("data", TOKENS, "fsdp"), (ROWS, TOKENS)):
        x = _constrain(mesh, x, *axes)
    return x


def constrain_activations(mesh: Mesh, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """What goes from layer to layer: rows and tokens partitioned, features whole.

    Weights are gathered for it, layer by layer. Without the constraint the compiler might partition it as
    the weights are.
    """
    return _constrain(mesh, x, ROWS, TOKENS)


def constrain_features(mesh: Mesh, x: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
    """The features inside a feed-forward layer."""
    return _constrain(mesh, x, ROWS, TOKENS, FEATURES)


def split_rows(mesh: Mesh, x: Array, count: int, *, strided: bool = False) -> Array:
    """`[B, T]` rows as `[count, B / count, T]`; on a mesh every part has rows of every device.

    Part n has the rows n, n + count, … there, and with `strided` on one device too.
    """
    if not is_sharded(mesh) and not strided:
        return x.reshape(count, -1, x.shape[1])
    return _constrain(mesh, x.reshape(-1, count, x.shape[1]).swapaxes(0, 1), None, ROWS, TOKENS)


def fold_tokens(mesh: Mesh, x: Array) -> Array:
    """`[B, T, …]` as `[context · B, T / context, …]`: each device's tokens as rows of their own."""
    context = parts_of(mesh, TOKENS)
    batch, length, *rest = x.shape
    cut = x.reshape(batch, context, length // context, *rest).swapaxes(0, 1)
    return _constrain(mesh, cut.reshape(-1, *cut.shape[2:]), (TOKENS, *ROWS))


def unfold_tokens(mesh: Mesh, x: Array) -> Array:
    """What `fold_tokens` folded, `[B, T, …]` again."""
    cut = x.reshape(parts_of(mesh, TOKENS), -1, *x.shape[1:]).swapaxes(0, 1)
    return constrain_activations(mesh, cut.reshape(cut.shape[0], -1, *cut.shape[3:]))


def _constrain(mesh: Mesh, x: Array, *axes: Axes) -> Array:
    return constrain(mesh, x, sharding_over(mesh, *axes))
