"""The next token of each text, from the logits: the likeliest, or drawn."""

import jax
import jax.numpy as jnp

from dynmask_jax.array_typing import Array, Bool, Float, Int
from train.config.operation import Generation


def next_tokens(
    logits: Float[Array, "B V"], keys: Array | None = None, options: Generation = Generation()
) -> Int[Array, " B"]:
    """One token for each row of logits, int32.

    At temperature 0 it is the likeliest (the first of equals). Otherwise it is drawn from
    softmax(logits / temperature), of which `top_k` keeps the k likeliest tokens, and then `top_p` the
    nucleus of these: as few of the likeliest as have probability p together, and always the first.

    Args:
      logits: as the model gives them.
      keys: `[B]`, a random key for each row, so that a row's token does not depend on the others.
        Not needed at temperature 0.
      options: fixed when compiled.

    Reference: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", arXiv:1904.09751.

    >>> logits = jnp.log(jnp.array([[0.1, 0.6, 0.3]]))
    >>> next_tokens(logits).tolist()
    [1]
    >>> keys = jax.random.split(jax.random.key(0), 1)
    >>> next_tokens(logits, keys, Generation(temperature=1.0, top_p=0.5)).tolist()
    [1]
    """
    if options.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if keys is None:
        raise ValueError(f"keys must be given to draw at temperature {options.temperature}")
    logits = logits.astype(jnp.float32) / options.temperature
    if options.top_k is None and options.top_p is None:
        return _draw(keys, logits)
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    logits = jnp.take_along_axis(logits, order, axis=-1)
    place = _draw(keys, jnp.where(_kept(logits, options), logits, -jnp.inf))
    return jnp.take_along_axis(order, place[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _kept(logits: Float[Array, "B V"], options: Generation) -> Bool[Array, "B V"]:
    """Which tokens may be drawn, of logits in falling order."""
    rank = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, :]
    kept = rank < (logits.shape[-1] if options.top_k is None else options.top_k)
    # A sum of probabilities may round to 1 before its last term: p = 1 is every token, not nearly every.
    if options.top_p is None or options.top_p == 1:
        return jnp.broadcast_to(kept, logits.shape)
    shares = jax.nn.softmax(jnp.where(kept, logits, -jnp.inf), axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares
    return kept & ((before < options.top_p) | (rank == 0))


def _draw(keys: Array, logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
