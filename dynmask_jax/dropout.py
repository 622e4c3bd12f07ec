"""Dropout of attention weights, drawn by a hash of each pair's place: alike on every backend and device.

Nothing is kept from the forward pass for the backward pass, and nothing of size T·S is ever made: either
draws anew. A query has two words, hashes of the key of the call, its row of the batch, its head, its
position and its segment; a key has one, of its position and segment. A pair's draw is two rounds of `hashes`
with a word of the query before each, as a block cipher mixes in its key (Even & Mansour 1997, J. Cryptology).
"""

import jax
import jax.numpy as jnp
import numpy as np

from dynmask_jax.array_typing import Array, Bool, Float, Int, Number, is_boolean, is_concrete, pytree, static
from dynmask_jax.hashes import FIRST, SECOND, hash_round, mixed
from dynmask_jax.tokens import Tokens, check_tokens

ORIGINS = 0x243F6A88, 0x13198A2E
"""What the two words of a query start from: digits of π."""


@pytree
class Dropout:
    """Dropout of attention weights (Srivastava et al. 2014; in Transformers, Vaswani et al. 2017).

    Each weight is dropped, set to 0, with probability `rate`; those that are kept are divided by 1 − rate.
    The log-sum-exp stays that of all weights.

    Args:
      rate: 0 ≤ rate < 1. At a Python 0 nothing is drawn. A traced rate may change without a new compilation;
        it is not checked (at 1 everything is NaN), and attention has no gradient in it.
      key: a key of `jax.random`, a new one for each layer and step: `jax.random.fold_in(key, layer)`.
      broadcast: whether all rows and heads draw alike, as `broadcast_dropout` of Flax.

    The draw is a function of the key, the row of the batch, the query head, and the positions and segments
    of query and key. So it does not depend on the backend, on blocks, or on the devices that share the work,
    in any layout of the sequence. Tokens of one row with the same position and segment draw alike. So do
    the calls that `jax.vmap` makes of one call, unless it maps the key; and the devices of a `jax.shard_map`
    or `pmap` of one's own, each of which counts its rows and heads from 0: give each a key of its own,
    `jax.random.fold_in(key, jax.lax.axis_index(axis))`.

    Raises:
      TypeError: the rate is no number, or the key no key.
      ValueError: the rate lies outside 0…1 (1 excluded), or the key is an array of keys.
    """

    rate: Number
    key: Array
    broadcast: bool = static(default=False)

    def __post_init__(self):
        number = isinstance(self.rate, int | float) or jnp.issubdtype(_dtype(self.rate), jnp.floating)
        if not number or is_boolean(self.rate) or jnp.ndim(self.rate):
            raise TypeError(f"Dropout: rate must be a number, got {self.rate!r}")
        if is_concrete(self.rate) and not 0 <= np.float32(self.rate) < 1:
            raise ValueError(f"Dropout: rate must lie in 0…1 (1 excluded), got {self.rate}")
        typed = jnp.issubdtype(_dtype(self.key), jax.dtypes.prng_key)
        if not typed and _dtype(self.key) != np.dtype(np.uint32):
            raise TypeError(f"Dropout: key must be a key of jax.random, got {self.key!r}")
        if jnp.ndim(self.key) != (0 if typed else 1):
            raise ValueError(f"Dropout: key must be one key, got keys of shape {jnp.shape(self.key)}")

    def draws(self, batch: int, heads: int) -> "Draws | None":
        """The draws of a call; None where the rate is a Python 0 (or one that can be read now)."""
        if is_concrete(self.rate) and self.rate == 0:
            return None
        typed = jnp.issubdtype(_dtype(self.key), jax.dtypes.prng_key)
        words = (jax.random.key_data(self.key) if typed else jnp.asarray(self.key)).astype(jnp.int32)
        rows, of_heads = (jnp.arange(n, dtype=jnp.int32) for n in (batch, heads))
        if self.broadcast:
            rows, of_heads = jnp.zeros_like(rows), jnp.zeros_like(of_heads)
        seeds = []
        for origin in ORIGINS:
            seed = mixed(origin)
            for word in words:
                seed = mixed(seed ^ word)
            seeds.append(mixed(mixed(seed ^ rows)[None, :] ^ of_heads[:, None]))
        rate = jax.lax.stop_gradient(jnp.asarray(self.rate)).astype(jnp.float32)
        return Draws(jnp.stack(seeds, axis=-1), rate)


def _dtype(value):
    return getattr(value, "dtype", np.dtype(object))


@pytree
class Draws:
    """Which weights of one call are dropped. Made by `Dropout.draws`.

    Attributes:
      seeds: int32, of each query head in each row two: `[N, B, 2]`.
      rate: the probability, float32.
    """

    seeds: Int[Array, "N B 2"]
    rate: Float[Array, ""]

    @property
    def scale(self) -> Float[Array, ""]:
        """What weights that are kept are multiplied by: 1 / (1 − rate)."""
        return 1.0 / (1.0 - self.rate)

    @property
    def threshold(self) -> Int[Array, ""]:
        """Pairs whose draw, any int32 with equal probability, is at least this are kept."""
        return (self.rate * 2.0**32 - 2.0**31).astype(jnp.int32)

    def of_queries(self, tokens: Tokens) -> tuple[Int[Array, "B T N"], Int[Array, "B T N"]]:
        """The two words of each query, from tokens `[R, T]`."""
        seeds = jnp.moveaxis(self.seeds, 2, 0).swapaxes(1, 2)[:, :, None, :]
        first, second = mixed(seeds ^ _words(tokens)[None, :, :, None])
        return first, second

    def of_keys(self, tokens: Tokens) -> Int[Array, "R S"]:
        """The word of each key, from tokens `[R, S]`."""
        return _words(tokens)

    def kept(self, first, second, of_key) -> Bool[Array, "..."]:
        """Whether pairs are kept, elementwise, from the words of queries and of keys, which broadcast."""
        return draw(first, second, of_key) >= self.threshold


def draw(first, second, of_key) -> Int[Array, "..."]:
    """The draw of each pair, any int32 with equal probability, from the words of its query and its key."""
    # The upper bits decide alone, so the hash's last shift is left out.
    return hash_round(hash_round(first ^ of_key, FIRST) ^ second, SECOND)


def _words(tokens: Tokens):
    return mixed(tokens.position ^ mixed(tokens.segment))


def dropout_mask(
    dropout: Dropout, q_tokens: Tokens, kv_tokens: Tokens | None = None, *, batch: int = 1, heads: int = 1
) -> Bool[Array, "B N T S"]:
    """The weights that attention keeps, True, and drops, False: for tests, in O(T·S) memory.

    Args:
      dropout: as given to `attention`.
      q_tokens: the queries, `[T]` or `[B, T]`.
      kv_tokens: the keys, `[S]` or `[B, S]`; left out, the queries are the keys too.
      batch, heads: B and N of q.

    Raises:
      TypeError: dropout or tokens are something else.
      ValueError: tokens of other rows than batch.

    >>> dropout = Dropout(0.5, jax.random.key(0))
    >>> dropout_mask(dropout, Tokens.sequence(4)).astype(int)[0, 0].tolist()
    [[0, 0, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0], [0, 1, 1, 0]]
    """
    check_dropout(dropout)
    kv_tokens = q_tokens if kv_tokens is None else kv_tokens
    check_tokens(q_tokens, kv_tokens)
    for tokens in (q_tokens, kv_tokens):
        if len(tokens.shape) == 2 and tokens.shape[0] not in (1, batch):
            raise ValueError(f"batch must be that of the tokens, got {batch} and tokens {tokens.shape}")
    draws = dropout.draws(batch, heads)
    if draws is None:
        return jnp.ones((batch, heads, q_tokens.shape[-1], kv_tokens.shape[-1]), bool)
    q_tokens, kv_tokens = (
        tokens if len(tokens.shape) == 2 else tokens[None] for tokens in (q_tokens, kv_tokens)
    )
    return kept_pairs(draws, q_tokens, kv_tokens)


def kept_pairs(draws: Draws, q_tokens: Tokens, kv_tokens: Tokens) -> Bool[Array, "B N T S"]:
    """Which of all pairs are kept, of tokens `[R, T]` and `[R, S]`."""
    of_queries = (x.swapaxes(1, 2)[..., None] for x in draws.of_queries(q_tokens))
    first, second = of_queries
    return draws.kept(first, second, draws.of_keys(kv_tokens)[:, None, None, :])


def check_dropout(dropout):
    """Refuses what is no `Dropout`.

    Raises:
      TypeError: with what is needed.
    """
    if not isinstance(dropout, Dropout):
        raise TypeError(f"dropout must be a Dropout(rate, key), got {dropout!r}")
