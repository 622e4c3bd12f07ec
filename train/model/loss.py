"""The cross-entropy of each token, from the logits of a chunk of tokens at a time.

The logits of a row of T tokens take T times the vocabulary: for 32,768 of each 4 GiB, more than everything
else together. Here only a chunk's logits exist at a time, and the backward pass computes them again, so that
memory is linear in T.

Where few targets have a weight, as in a document before its summary, their tokens are gathered at the
beginning of the row, and a loop of as many chunks as hold them computes their logits alone. How many that are
is data: the program is one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dynmask_jax.array_typing import Array, Float, Int, pytree
from train.config import sections


@pytree
class TokenLosses:
    """Losses of the targets, `[B, T]` float32; 0 where the target's weight is 0.

    Attributes:
      nats: the cross-entropy.
      penalty: the z-loss, loss.z · log²(normaliser): Chowdhery et al. 2022, "PaLM", arXiv:2204.02311.
    """

    nats: Float[Array, "B T"]
    penalty: Float[Array, "B T"]


def token_losses(
    hidden: Float[Array, "B T D"],
    logits: Callable,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    options: sections.Loss,
    devices: int = 1,
    *,
    few: bool = False,
) -> TokenLosses:
    """The losses of the targets, with logits of `loss.chunk` tokens at a time on each device.

    Args:
      hidden: the model's output, which `logits` takes.
      logits: `[B, t, D]` -> `[B, t, vocabulary]` in float32, any t.
      targets: the tokens to predict.
      weights: only whether a weight is 0 matters here: a chunk of zeros is not computed.
      options: the section `loss` of the config.
      devices: the number of devices that the rows are partitioned over.
      few: whether few weights are not 0. On one device those tokens alone are computed; on several, where
        gathering would send them, the chunks that hold one.
    """
    if few and devices == 1:
        return _of_few(hidden, logits, targets, weights, options)
    batch, length = targets.shape
    chunk = options.chunk or _default_chunk(jax.eval_shape(logits, hidden).shape[-1], least=1_024)
    count = -(-length // max(1, chunk * devices // batch))
    size = -(-length // count)  # chunks of equal size, for the least padding

    def of_chunk(part) -> TokenLosses:
        hidden, targets, weights = part
        nothing = TokenLosses(*2 * [jnp.zeros(targets.shape, jnp.float32)])
        return jax.lax.cond(
            (weights != 0).any(),
            lambda: _of_logits(logits(hidden), targets, weights, options.z),
            lambda: nothing,
        )

    if count == 1:
        return _of_logits(logits(hidden), targets, weights, options.z)
    chunks = tuple(_cut(x, count, size) for x in (hidden, targets, weights))
    return _uncut(jax.lax.map(jax.checkpoint(of_chunk, prevent_cse=False), chunks), length)


def _of_few(hidden, logits: Callable, targets, weights, options: sections.Loss) -> TokenLosses:
    """The losses, computed of the tokens alone whose weight is not 0."""
    batch, length = targets.shape
    chunk = options.chunk or _default_chunk(jax.eval_shape(logits, hidden).shape[-1], least=128)
    count = -(-length // max(1, chunk // batch))
    size = -(-length // count)
    order = jnp.argsort(weights == 0, axis=1, stable=True)
    hidden, targets, weights = (_cut(_reordered(x, order), count, size) for x in (hidden, targets, weights))
    held = -(-(weights != 0).sum(axis=(0, 2), dtype=jnp.int32).max() // size)
    # What the logits are differentiated by beside the features, as arguments of their function.
    pure, constants = jax.closure_convert(logits, hidden[0])
    losses = _uncut(_loop(pure, options.z, hidden, constants, targets, weights, held), length)
    return jax.tree.map(lambda x: _reordered(x, jnp.argsort(order, axis=1)), losses)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loop(pure: Callable, z: float, hidden, constants: list, targets, weights, held) -> TokenLosses:
    """JAX has no gradient of a loop whose length is data."""

    def add(i, losses: TokenLosses) -> TokenLosses:
        found = _of_logits(pure(hidden[i], *constants), targets[i], weights[i], z)
        return jax.tree.map(lambda all, new: all.at[i].set(new), losses, found)

    nothing = TokenLosses(*2 * [jnp.zeros(targets.shape, jnp.float32)])
    return jax.lax.fori_loop(0, held, add, nothing)


def _loop_forward(pure, z, *arguments):
    return _loop(pure, z, *arguments), arguments


def _loop_backward(pure: Callable, z: float, arguments: tuple, cotangent: TokenLosses):
    hidden, constants, targets, weights, held = arguments

    def add(i, sums: tuple[Any, Any]) -> tuple[Any, Any]:
        def losses(hidden, constants):
            return _of_logits(pure(hidden, *constants), targets[i], weights[i], z)

        _, pull = jax.vjp(losses, hidden[i], constants)
        of_hidden, of_constants = pull(jax.tree.map(lambda x: x[i], cotangent))
        return sums[0].at[i].set(of_hidden), jax.tree.map(jnp.add, sums[1], of_constants)

    start = jnp.zeros_like(hidden), jax.tree.map(jnp.zeros_like, constants)
    return *jax.lax.fori_loop(0, held, add, start), None, None, None


_loop.defvjp(_loop_forward, _loop_backward)


def _reordered(x: Array, order: Array) -> Array:
    """`[B, T, …]` with the tokens of each row in this order, `[B, T]`."""
    return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)


def _default_chunk(vocabulary: int, least: int) -> int:
    """So many tokens at least, or as many as have 16 MiB of logits: to compute few twice saves no memory.

    On two CPU cores a train step of 4,096 bytes took 237 ms with all logits at once, and 250 ms in chunks of
    1,024 tokens. Where 128 tokens of 4,096 have a loss, with 262,144 × 640 weights, loss and gradient took
    3.9, 3.3 and 5.3 s of CPU time in chunks of 64, 128 and 256.
    """
    return max(least, 2**22 // vocabulary)


def _of_logits(logits, targets, weights, z: float) -> TokenLosses:
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    penalty = z * jnp.square(jax.nn.logsumexp(logits, axis=-1)) if z else jnp.zeros_like(nats)
    counts = weights != 0
    return TokenLosses(jnp.where(counts, nats, 0.0), jnp.where(counts, penalty, 0.0))


def _cut(x, count: int, size: int):
    """`[B, T, …]` as `[count, B, size, …]`; the last chunk is padded with zeros, whose weight is 0."""
    padding = [(0, 0), (0, count * size - x.shape[1]), *[(0, 0)] * (x.ndim - 2)]
    return jnp.pad(x, padding).reshape(x.shape[0], count, size, *x.shape[2:]).swapaxes(0, 1)


def _uncut(losses: TokenLosses, length: int) -> TokenLosses:
    """Losses `[count, B, size]` of what `_cut` cut, `[B, T]` again."""
    batch = losses.nats.shape[1]
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(batch, -1)[:, :length], losses)
