"""The cross-entropy of each token, from the logits of a chunk of tokens at a time.

The logits of a row of T tokens take T times the vocabulary: for 32,768 of each 4 GiB, more than everything
else together. Here only a chunk's logits exist at a time, and the backward pass computes them again, so that
memory is linear in T.
"""

from collections.abc import Callable

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
) -> TokenLosses:
    """The losses of the targets, with logits of `loss.chunk` tokens at a time on each device.

    Args:
      hidden: the model's output, which `logits` takes.
      logits: `[B, t, D]` -> `[B, t, vocabulary]` in float32, any t.
      targets: the tokens to predict.
      weights: only whether a weight is 0 matters here: a chunk of zeros is not computed.
      options: the section `loss` of the config.
      devices: the number of devices that the rows are partitioned over.
    """
    batch, length = targets.shape
    chunk = options.chunk or _default_chunk(jax.eval_shape(logits, hidden).shape[-1])
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
    losses = jax.lax.map(jax.checkpoint(of_chunk, prevent_cse=False), chunks)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(batch, -1)[:, :length], losses)


def _default_chunk(vocabulary: int) -> int:
    """1,024 tokens, or as many as have 16 MiB of logits: computing few logits twice saves no memory.

    On two CPU cores a train step of 4,096 bytes took 237 ms with all logits at once, and 250 ms in chunks of
    1,024 tokens.
    """
    return max(1_024, 2**22 // vocabulary)


def _of_logits(logits, targets, weights, z: float) -> TokenLosses:
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    penalty = z * jnp.square(jax.nn.logsumexp(logits, axis=-1)) if z else jnp.zeros_like(nats)
    counts = weights != 0
    return TokenLosses(jnp.where(counts, nats, 0.0), jnp.where(counts, penalty, 0.0))


def _cut(x, count: int, size: int):
    """`[B, T, …]` as `[count, B, size, …]`; the last chunk is padded with zeros, whose weight is 0."""
    padding = [(0, 0), (0, count * size - x.shape[1]), *[(0, 0)] * (x.ndim - 2)]
    return jnp.pad(x, padding).reshape(x.shape[0], count, size, *x.shape[2:]).swapaxes(0, 1)
