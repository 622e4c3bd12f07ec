"""What masks are: one method over tokens, the operators `&`, `|`, `~`, and both readings of the result.

A mask has one method, `visible(q, k)`, written once and read twice. On arrays it is exact. On
`Span`s, the range of each token field over a block, the same line runs in interval arithmetic and
says whether none, some or every pair of the block is visible. Masks combine with `&`, `|`, `~`; the
combination keeps them as a tree, so nothing is lost.

A mask is a frozen pytree whose leaves are numbers, so it may hold traced values: a new window is new
data, never a new compilation. A leaf is a scalar, or an array `[N]` with a value for each query head.
"""

import types
import warnings
from abc import ABCMeta, abstractmethod
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dynmask_jax.array_typing import Array, Bool, pytree
from dynmask_jax.spans import Span, Verdict, lift
from dynmask_jax.tokens import Tokens, check_tokens


class _MaskClass(ABCMeta):
    """Says of `Causal & Window(4)` that a mask is an instance. `|` stays Python's: unions of types."""

    def __and__(cls, other):
        raise _no_mask(cls)

    __rand__ = __and__

    def __invert__(cls):
        raise _no_mask(cls)


class Mask(metaclass=_MaskClass):
    """Which keys a query may see. Subclass it with `@pytree`, numbers as fields, and `visible`."""

    __array_ufunc__ = None  # numpy must leave `array & mask` to us

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
        check_mask(other)
        return And(self, other)

    def __or__(self, other: "Mask") -> "Mask":
        check_mask(other)
        return Or(self, other)

    def __rand__(self, other) -> "Mask":
        raise _no_mask(other)

    def __ror__(self, other) -> "Mask":
        raise _no_mask(other)

    def __invert__(self) -> "Mask":
        return Not(self)

    def __bool__(self):
        raise TypeError("a mask has no single truth value: combine masks with & | ~")


def check_mask(value, needed: str = "mask must be a Mask"):
    """Refuses what is no mask.

    Args:
      value: what was given.
      needed: the first words of the message: the argument's name, and what it takes.

    Raises:
      TypeError: with the remedy, for what is often given in place of a mask.
    """
    if not isinstance(value, Mask):
        raise _no_mask(value, needed)


def _no_mask(value: Any, needed: str = "mask must be a Mask") -> TypeError:
    given = value.__name__ if isinstance(value, type) else type(value).__name__
    remedy = ""
    if isinstance(value, type) and issubclass(value, Mask):
        remedy = f": an instance, {given}(…)"
    elif isinstance(value, types.UnionType):
        remedy = ": of classes `|` makes a union of types; masks are instances, Causal() | Prefix(4)"
    elif value is None:
        remedy = "; that all keys are visible is Everything()"
    elif hasattr(value, "dtype") or isinstance(value, list | tuple):
        given = f"an array of {getattr(value, 'dtype', 'lists')}"
        remedy = (
            ": masks are expressions over positions and segments, such as Causal() & Window(512), so that "
            "blocks are skipped and no T × S array is made; a padding mask [B, T] is the segment of "
            "Tokens(position, segment), 1 for tokens and 0 for padding; any other array goes to "
            "jax.nn.dot_product_attention"
        )
    elif callable(value):
        remedy = "; a curriculum is called with the step first: curriculum(step)"
    return TypeError(f"{needed}, got {given}{remedy}")


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
    try:
        return lift(mask.visible(q, k), q.position)
    except Exception as cause:
        if not isinstance(q.position, Span):
            if (words := remedy(cause)) is not None:
                raise TypeError(f"{mask!r} {words}") from cause
            raise
        _check_on_arrays(mask)
        reason = "it indexes an array with tokens" if isinstance(cause, IndexError) else cause
        warnings.warn(
            f"{mask!r} cannot be read over blocks ({reason}); it is right, but skips no block",
            stacklevel=2,
        )
        return Verdict(jnp.asarray(True), jnp.asarray(False))


def _check_on_arrays(mask: Mask):
    """Raises what the mask raises on plain tokens: then it is wrong, not merely unreadable."""
    q, k = Tokens.sequence(2)[:, None], Tokens.sequence(2)[None, :]
    jax.eval_shape(lambda q, k: evaluate(mask, q, k), q, k)


def remedy(error: Exception) -> str | None:
    """What to write instead, where tokens were used as if they were one pair."""
    truth = "truth value of an array" in str(error)  # of arrays that are not traced
    if truth or isinstance(error, jax.errors.TracerBoolConversionError):
        return (
            "asks for the truth of a condition on tokens (`and`, `or`, `not`, `if`, `a < b < c`), which "
            "stands for many pairs at once: combine conditions with & | ~, each in parentheses"
        )
    tables = jax.errors.TracerArrayConversionError, jax.errors.TracerIntegerConversionError
    if isinstance(error, tables) or "converted to a scalar index" in str(error):
        return (
            "uses tokens where plain numbers are needed, as to index a NumPy array or a list: make it "
            "jnp.asarray(table)[q.position]. Document ids belong in Tokens(position, segment), by which "
            "SameSegment() skips blocks"
        )
    return None


def visible_pairs(
    mask: Mask, q: Tokens, k: Tokens, *, keys_first: bool = False
) -> Bool[Array, "*N T S"] | Bool[Array, "*N S T"]:
    """The mask between tokens `[T]` and tokens `[S]`: `[T, S]`, or `[N, T, S]` with per-head leaves.

    With `keys_first`, `[S, T]` and `[N, S, T]`.
    """

    def pairs(one_head):
        if keys_first:
            return jnp.broadcast_to(evaluate(one_head, q[None, :], k[:, None]), k.shape + q.shape)
        return jnp.broadcast_to(evaluate(one_head, q[:, None], k[None, :]), q.shape + k.shape)

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
