"""Biases: what is added to a query's score of a key, each as one expression over their tokens.

A bias is a mask's sibling: one method, `score(q, k)`, written over tokens, traced on each tile, so that no
T × S array is made. Biases add with `+`. A bias hides nothing and skips no block: that is a mask's.

A bias is a frozen pytree of numbers and arrays, and attention is differentiable in those that are floating.
A leaf is a scalar, or an array `[N, …]` over the query heads, or `[1, …]` for all alike.

The biases themselves are in `dynmask_jax.biases`.
"""

import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dynmask_jax.array_typing import Array, Float, pytree
from dynmask_jax.mask_algebra import remedy
from dynmask_jax.tokens import Tokens, check_tokens


class Bias(ABC):
    """What to add to scores. Subclass it with `@pytree`, numbers and arrays as fields, and `score`."""

    __array_ufunc__ = None  # numpy must leave `array + bias` to us

    @abstractmethod
    def score(self, q: Tokens, k: Tokens) -> Any:
        """What to add to each pair's logit.

        It is added to the logit that is scaled and soft-capped: a cap bounds what products may say, and would
        squash the distances of an ALiBi to one.

        Args:
          q: queries; the fields broadcast against k's, usually `[T, 1]` against `[1, S]`.
          k: keys.

        Here the fields of the bias are those of one head: of a leaf `[N]` a scalar, of `[N, buckets]`
        an array `[buckets]`.

        Returns:
          numbers that broadcast to the pairs.
        """

    def __add__(self, other: "Bias") -> "Bias":
        check_bias(other)
        return Sum(self, other)

    def __radd__(self, other) -> "Bias":
        raise _no_bias(other)


def check_bias(value):
    """Refuses what is no bias.

    Raises:
      TypeError: with the remedy, for what is often given in place of one.
    """
    if not isinstance(value, Bias):
        raise _no_bias(value)


def _no_bias(value) -> TypeError:
    given, remedy = type(value).__name__, ""
    if isinstance(value, type) and issubclass(value, Bias):
        given, remedy = value.__name__, f": an instance, {value.__name__}(…)"
    elif hasattr(value, "dtype") or isinstance(value, list | tuple):
        given = f"an array {getattr(value, 'shape', '')}" if hasattr(value, "dtype") else "a list"
        remedy = (
            ": biases are expressions over positions and segments, such as ALiBi.for_heads(8), "
            "RelativeBuckets(table) or BiasFunction(lambda q, k: …), so that no T × S array is made; one "
            "that hides pairs (0 and −inf) is a mask; any other array goes to jax.nn.dot_product_attention"
        )
    elif isinstance(value, types.FunctionType):
        remedy = ": BiasFunction(function)"
    return TypeError(f"bias must be a Bias, got {given}{remedy}")


@pytree
class Sum(Bias):
    """Both biases: `a + b`."""

    a: Bias
    b: Bias

    def score(self, q, k):
        a, b = scored(self.a, q, k), scored(self.b, q, k)
        wide = jnp.promote_types(a.dtype, b.dtype)
        return a.astype(wide) + b.astype(wide)

    def __repr__(self):
        return f"({self.a!r} + {self.b!r})"


def scored(bias: Bias, q: Tokens, k: Tokens) -> Float[Array, "..."]:
    """`bias.score(q, k)` of one head, in float32 (float64 where it is that), which broadcasts to the pairs.

    Raises:
      TypeError: it is no real number, or the bias asks for one pair's tokens.
      ValueError: it is of other pairs.
    """
    try:
        score = bias.score(q, k)
    except Exception as cause:
        if (words := remedy(cause)) is not None:
            raise TypeError(f"{bias!r} {words}") from cause
        cause.add_note(f"in {bias!r}, whose score is of tokens {q.shape} and {k.shape}")
        raise
    if not (isinstance(score, int | float) or hasattr(score, "dtype")):
        raise TypeError(f"{bias!r} must give real numbers, got {type(score).__name__}")
    score = jnp.asarray(score)
    if not jnp.issubdtype(score.dtype, jnp.number) or jnp.issubdtype(score.dtype, jnp.complexfloating):
        raise TypeError(f"{bias!r} must give real numbers, got {score.dtype}")
    pairs = jnp.broadcast_shapes(q.shape, k.shape)
    if len(score.shape) > len(pairs) or any(
        n not in (1, m) for n, m in zip(score.shape[::-1], pairs[::-1], strict=False)
    ):
        raise ValueError(f"{bias!r} must give numbers that broadcast to the pairs {pairs}, got {score.shape}")
    return score if score.dtype == jnp.float64 else score.astype(jnp.float32)


def for_heads(bias: Bias, heads: int) -> Bias:
    """The bias, its leaves scalars or arrays over so many heads.

    Raises:
      ValueError: a leaf is of other heads.
    """

    def leaf(value):
        shape = jnp.shape(value)
        if not shape or shape[0] == heads:
            return value
        if shape[0] != 1:
            raise ValueError(
                f"the bias has a leaf {shape}, got {heads} query heads: leaves are scalars, or arrays over "
                f"heads, [{heads}, …], or [1, …] for all alike"
            )
        return jnp.broadcast_to(value, (heads, *shape[1:]))

    return jax.tree.map(leaf, bias)


def by_group(bias: Bias, pairs: Callable, heads: int, key_heads: int):
    """`pairs(bias of one head)` for each head, `[K, G, …]`; `[1, 1, …]` where no leaf is per head."""
    if all(jnp.ndim(leaf) == 0 for leaf in jax.tree.leaves(bias)):
        return pairs(bias)[None, None]
    axes = jax.tree.map(lambda leaf: 0 if jnp.ndim(leaf) else None, bias)

    def grouped(leaf):
        return leaf.reshape(key_heads, heads // key_heads, *leaf.shape[1:]) if jnp.ndim(leaf) else leaf

    return jax.vmap(jax.vmap(pairs, in_axes=(axes,)), in_axes=(axes,))(jax.tree.map(grouped, bias))


def score_pairs(bias: Bias, q: Tokens, k: Tokens, *, keys_first: bool = False) -> Float[Array, "T S"]:
    """The bias of one head between tokens `[T]` and `[S]`: `[T, S]`, or `[S, T]` with `keys_first`."""
    if keys_first:
        pair, shape = (q[None, :], k[:, None]), k.shape + q.shape
    else:
        pair, shape = (q[:, None], k[None, :]), q.shape + k.shape
    return jnp.broadcast_to(scored(bias, *pair), shape)


def bias_tensor(
    bias: Bias, q_tokens: Tokens, kv_tokens: Tokens | None = None, *, heads: int
) -> Float[Array, "*B N T S"]:
    """The whole bias as an array, for any other attention; O(T·S) memory.

    Args:
      bias: any bias.
      q_tokens: the queries, `[T]` or `[B, T]`.
      kv_tokens: the keys, `[S]` or `[B, S]`; left out, the queries are the keys too.
      heads: N, query heads.

    Returns:
      float32 `[N, T, S]`, with B before it where tokens are batched.

    Raises:
      TypeError: bias or tokens are something else.
      ValueError: batches that differ, or leaves of other heads.

    >>> bias_tensor(ALiBi.for_heads(1), Tokens.sequence(3), heads=1)[0, 2].tolist()
    [-0.0078125, -0.00390625, -0.0]
    """
    check_bias(bias)
    kv_tokens = q_tokens if kv_tokens is None else kv_tokens
    check_tokens(q_tokens, kv_tokens)
    bias = for_heads(bias, heads)

    def of_row(q, k):
        scores = by_group(bias, lambda one: score_pairs(one, q, k), heads, 1)[0]
        return jnp.broadcast_to(scores, (heads, *scores.shape[1:]))

    batched = [len(tokens.shape) == 2 for tokens in (q_tokens, kv_tokens)]
    if not any(batched):
        return of_row(q_tokens, kv_tokens)
    return jax.vmap(of_row, in_axes=[0 if b else None for b in batched])(q_tokens, kv_tokens)


def learnable(bias: Bias | None) -> tuple[list, Callable[..., Any]]:
    """The leaves in which attention is differentiable, and what makes a bias of others in their place.

    What is given in place of a leaf may be anything, `None` too.
    """
    leaves, structure = jax.tree.flatten(bias)
    places = [
        place for place, leaf in enumerate(leaves) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    ]

    def rebuilt(numbers: Sequence, others: Sequence | None = None):
        filled = list(leaves if others is None else others)
        for place, number in zip(places, numbers, strict=True):
            filled[place] = number
        return jax.tree.unflatten(structure, filled)

    return [leaves[place] for place in places], rebuilt


def gradient_of(bias: Bias | None, numbers: list):
    """Gradients of its learnable leaves as a tree of the bias's structure, None for its other leaves."""
    leaves, rebuilt = learnable(bias)
    count = len(jax.tree.leaves(bias))
    cast = [number.astype(jnp.result_type(leaf)) for number, leaf in zip(numbers, leaves, strict=True)]
    return rebuilt(cast, [None] * count)
