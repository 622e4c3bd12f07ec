"""The next token of each text, from the logits: the likeliest, or drawn."""

import jax
import jax.numpy as jnp
from jax import lax

from dynmask_jax.array_typing import Array, Bool, Float, Int
from train.config.operation import Generation

CANDIDATES = 1_024
"""The likeliest tokens, in which a nucleus is looked for before all tokens are sorted."""


def next_tokens(
    logits: Float[Array, "B V"], keys: Array | None = None, options: Generation = Generation()
) -> Int[Array, " B"]:
    """One token for each row of logits, int32.

    At temperature 0 it is the likeliest (the first of equals). Otherwise it is drawn from
    softmax(logits / temperature), of which `top_k` keeps the k likeliest tokens, and then `top_p` the
    nucleus of these: as few of the likeliest as have probability p together, and always the first.

    Only a nucleus of more than `CANDIDATES` tokens sorts the vocabulary, which is found out at run time.

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
    # A sum of probabilities may round to 1 before its last term: p = 1 is every token, not nearly every.
    share = 1.0 if options.top_p is None else options.top_p
    if options.top_k is not None:
        values, ids = _likeliest(logits, options.top_k)
        return _of_nucleus(keys, values, ids, _mass(values, values), share)[0]
    if share == 1:
        return _draw(keys, logits)
    return _nucleus(keys, logits, share)


def _nucleus(keys: Array, logits: Float[Array, "B V"], share: float) -> Int[Array, " B"]:
    """Tokens drawn from the nuclei of this share, of all tokens."""

    def drawn(count: int) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
        values, ids = _likeliest(logits, count)
        return _of_nucleus(keys, values, ids, _mass(logits, values), share)

    tokens, found = drawn(CANDIDATES)
    if logits.shape[-1] <= CANDIDATES:
        return tokens

    def sort_the_others():
        return jnp.where(found, tokens, drawn(logits.shape[-1])[0])

    return lax.cond(found.all(), lambda: tokens, sort_the_others)


def _likeliest(logits: Float[Array, "B V"], count: int) -> tuple[Float[Array, "B C"], Int[Array, "B C"]]:
    """The largest logits, at most `count`, in falling order with their tokens; the first of equals first."""
    if count < logits.shape[-1]:
        # XLA on CPU finds its top-k in a slice of a sort, and takes it for a sort where slices are merged.
        return lax.optimization_barrier(lax.top_k(logits, count))
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    return jnp.take_along_axis(logits, order, axis=-1), order


def _mass(logits: Float[Array, "B V"], values: Float[Array, "B C"]) -> Float[Array, "B 1"]:
    """The sum of exp(logits), over that of the likeliest."""
    return jnp.exp(logits - values[:, :1]).sum(axis=-1, keepdims=True)


def _of_nucleus(
    keys: Array,
    values: Float[Array, "B C"],
    ids: Int[Array, "B C"],
    mass: Float[Array, "B 1"],
    share: float,
) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
    """Tokens drawn from the first of `values`, in falling order, that have the share of `mass` together.

    Beside them, whether these values have so much.
    """
    shares = jnp.exp(values - values[:, :1]) / mass
    through = jnp.cumsum(shares, axis=-1)
    first = jnp.arange(values.shape[-1], dtype=jnp.int32)[None, :] == 0
    kept = (through - shares < share) | first | (share == 1)
    place = _draw(keys, jnp.where(kept, values, -jnp.inf))
    tokens = jnp.take_along_axis(ids, place[:, None], axis=-1)[:, 0].astype(jnp.int32)
    return tokens, through[:, -1] >= share


def _draw(keys: Array, logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
