"""What masks are: one method over tokens, the operators `&`, `|`, `~`, and both readings of the result.

A mask has one method, `visible(q, k)`, written once and read twice. On arrays it is exact. On
`Span`s, the range of each token field over a block, the same line runs in interval arithmetic and
says whether none, some or every pair of the block is visible. Masks combine with `&`, `|`, `~`; the
combination keeps them as a tree, so nothing is lost.

A mask is a frozen pytree whose leaves are numbers, so it may hold traced values: a new window is new
data, never a new compilation. A leaf is a scalar, or an array `[N]` with a value for each query head.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dynmask_jax.array_typing import Array, Bool, pytree
from dynmask_jax.spans import Span, Verdict, lift
from dynmask_jax.tokens import Tokens, check_tokens


class Mask(ABC):
    """Which keys a query may see. Subclass it with `@pytree`, numbers as fields, and `visible`."""

    @abstractmethod
    def visible(self, q: Tokens, k: Tokens) -> Any:
        """Whether each query may see each key.

        Args:
          q: queries; the fields broadcast against k's, usually `[T, 1]` against `[1, S]`.
          k: keys.

        Returns:
          booleans that broadcast to the pairs; a `Verdict` where the fields are `Span`s.
        """

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, other) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> "Mask":
        return Not(self)

    def __bool__(self):
        raise TypeError("a mask has no single truth value: combine masks with & | ~")


def check_mask(value):
    """Refuses what is no mask.

    Raises:
      TypeError: with the remedy, where it is a mask's class or a curriculum.
    """
    if isinstance(value, Mask):
        return
    given = value.__name__ if isinstance(value, type) else type(value).__name__
    remedy = ""
    if isinstance(value, type) and issubclass(value, Mask):
        remedy = f": an instance, {given}(…)"
    elif callable(value):
        remedy = "; a curriculum is called with the step first: curriculum(step)"
    raise TypeError(f"mask must be a Mask, got {given}{remedy}")


@pytree
class And(Mask):
    """Keys that both masks show: `a & b`."""

    a: Mask
    b: Mask

    def visible(self, q, k):
        return evaluate(self.a, q, k) & evaluate(self.b, q, k)

    def __repr__(self):
        return f"({self.a!r} & {self.b!r})"


@pytree
class Or(Mask):
    """Keys that either mask shows: `a | b`."""

    a: Mask
    b: Mask

    def visible(self, q, k):
        return evaluate(self.a, q, k) | evaluate(self.b, q, k)

    def __repr__(self):
        return f"({self.a!r} | {self.b!r})"


@pytree
class Not(Mask):
    """Keys that the mask hides: `~mask`."""

    mask: Mask

    def visible(self, q, k):
        return ~evaluate(self.mask, q, k)

    def __repr__(self):
        return f"~{self.mask!r}"


def evaluate(mask: Mask, q: Tokens, k: Tokens) -> Any:
    """`mask.visible(q, k)` as a boolean array or a `Verdict`, whatever the mask returned.

    Over spans, a mask that uses an operation without a span rule may be anything: verdict "some".
    """
    if not isinstance(q.position, Span):
        return lift(mask.visible(q, k), q.position)
    try:
        return lift(mask.visible(q, k), q.position)
    except Exception as cause:
        _check_on_arrays(mask)
        warnings.warn(
            f"{mask!r} cannot be read over blocks ({cause}); it is right, but skips no block",
            stacklevel=2,
        )
        return Verdict(jnp.asarray(True), jnp.asarray(False))


def _check_on_arrays(mask: Mask):
    """Raises what the mask raises on plain tokens: then it is wrong, not merely unreadable."""
    q, k = Tokens.sequence(2)[:, None], Tokens.sequence(2)[None, :]
    jax.eval_shape(lambda: jnp.asarray(mask.visible(q, k), bool))


def visible_pairs(mask: Mask, q: Tokens, k: Tokens) -> Bool[Array, "*N T S"]:
    """The mask between tokens `[T]` and tokens `[S]`: `[T, S]`, or `[N, T, S]` with per-head leaves."""

    def pairs(one_head):
        seen = evaluate(one_head, q[:, None], k[None, :])
        return jnp.broadcast_to(seen, q.shape + k.shape)

    return by_head(pairs, mask)


def by_head(function: Callable[[Mask], Any], mask: Mask):
    """`function(mask)` where every leaf is a scalar; with per-head leaves, its results stacked `[N]`."""
    if head_count(mask) is None:
        return function(mask)
    axes = jax.tree.map(lambda leaf: 0 if jnp.ndim(leaf) else None, mask)
    return jax.vmap(function, in_axes=(axes,))(mask)


def head_count(mask: Mask) -> int | None:
    """N of a mask's per-head leaves, or None where every leaf is a scalar.

    Raises:
      ValueError: leaves of different lengths, or of more than one axis.
    """
    shapes: set[tuple[int, ...]] = {jnp.shape(leaf) for leaf in jax.tree.leaves(mask)} - {()}
    if not shapes:
        return None
    if len(shapes) > 1 or any(len(shape) > 1 for shape in shapes):
        raise ValueError(f"the leaves of {mask!r} must be scalars or share one shape [heads]")
    return shapes.pop()[0]


def mask_tensor(mask: Mask, q_tokens: Tokens, kv_tokens: Tokens | None = None) -> Bool[Array, "*BN T S"]:
    """The whole mask as booleans, for any other attention (True is visible).

    Args:
      mask: any mask.
      q_tokens: the queries, `[T]` or `[B, T]`.
      kv_tokens: the keys, `[S]` or `[B, S]`; left out, the queries are the keys too.

    Raises:
      TypeError: the mask or the tokens are something else.
      ValueError: tokens of another shape, batches that differ, leaves of different lengths.

    Returns:
      `[T, S]`, with N before it where a leaf is per-head and B before that where tokens are batched:
      `[B, T, S]`, `[N, T, S]`, `[B, N, T, S]`. `jax.nn.dot_product_attention` and Flax want
      `[B, N or 1, T, S]`.

    >>> mask_tensor(Causal() & Window(2), Tokens.sequence(3)).astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    kv_tokens = q_tokens if kv_tokens is None else kv_tokens
    check_mask(mask)
    check_tokens(q_tokens, kv_tokens)
    return _mask_tensor(mask, q_tokens, kv_tokens)


@jax.jit
def _mask_tensor(mask, q_tokens, kv_tokens):
    batched = [tokens.position.ndim == 2 for tokens in (q_tokens, kv_tokens)]
    if not any(batched):
        return visible_pairs(mask, q_tokens, kv_tokens)
    axes = [0 if b else None for b in batched]
    return jax.vmap(visible_pairs, in_axes=(None, *axes))(mask, q_tokens, kv_tokens)
