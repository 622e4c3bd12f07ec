"""Masks: which keys each query may see, as one expression over their tokens.

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
from types import CellType
from typing import Any

import jax
import jax.numpy as jnp

from dynmask_jax.array_typing import (
    Array,
    Bool,
    Number,
    is_boolean,
    is_traced,
    pytree,
    static,
)
from dynmask_jax.hashes import random_draw
from dynmask_jax.leaves import check_fraction, check_whole
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
        return look(self.a, q, k) & look(self.b, q, k)

    def __repr__(self):
        return f"({self.a!r} & {self.b!r})"


@pytree
class Or(Mask):
    """Keys that either mask shows: `a | b`."""

    a: Mask
    b: Mask

    def visible(self, q, k):
        return look(self.a, q, k) | look(self.b, q, k)

    def __repr__(self):
        return f"({self.a!r} | {self.b!r})"


@pytree
class Not(Mask):
    """Keys that the mask hides: `~mask`."""

    mask: Mask

    def visible(self, q, k):
        return ~look(self.mask, q, k)

    def __repr__(self):
        return f"~{self.mask!r}"


@pytree
class Everything(Mask):
    """Every key."""

    def visible(self, q, k):
        return lift(True, q.position)


@pytree
class Causal(Mask):
    """Keys at the query's own position and before it."""

    def visible(self, q, k):
        return k.position <= q.position


@pytree
class Window(Mask):
    """The `length` most recent keys, the query's own included: q − k < length.

    Later keys are visible too, as many as `ahead` (all where it is None), so that a causal window is
    `Causal() & Window(n)` and an encoder's is `Window(n, ahead=n)`.

    Raises:
      ValueError: length or ahead is negative.
    """

    length: Number
    ahead: Number | None = None

    def __post_init__(self):
        check_whole("Window", "length", self.length, least=0)
        if self.ahead is not None:
            check_whole("Window", "ahead", self.ahead, least=0)

    def visible(self, q, k):
        recent = q.position - k.position < self.length
        return recent if self.ahead is None else recent & (k.position - q.position <= self.ahead)


@pytree
class Chunks(Mask):
    """Keys of the query's own chunk, where the sequence is cut every `length` positions.

    With `Causal()` and a constant length: static masking, the method's baseline. SkyLadder's
    fragments (Zhu et al. 2025, arXiv:2503.15450) are these with a growing length.

    Raises:
      ValueError: length is below 1.
    """

    length: Number

    def __post_init__(self):
        check_whole("Chunks", "length", self.length, least=1)

    def visible(self, q, k):
        return q.position // self.length == k.position // self.length


@pytree
class Prefix(Mask):
    """Keys at positions below `length`, for every query, earlier ones too.

    `Causal() | Prefix(n)` is a prefix LM (Raffel et al. 2020, arXiv:1910.10683). For prefixes of
    different lengths in one batch, give the first token after each prefix position 0 and the prefix
    negative positions; then `Prefix(0)` fits them all.

    Raises:
      TypeError: length is not a whole number. (A negative one is a place like any other.)
    """

    length: Number

    def __post_init__(self):
        check_whole("Prefix", "length", self.length)

    def visible(self, q, k):
        return k.position < self.length


@pytree
class Sinks(Mask):
    """The first `count` positions, for every query.

    `Causal() & (Window(n) | Sinks(4))` is StreamingLLM's (Xiao et al. 2023, arXiv:2309.17453). Not
    to be confused with `attention(sinks=…)`, which are logits without a key.

    Raises:
      ValueError: count is negative.
    """

    count: Number

    def __post_init__(self):
        check_whole("Sinks", "count", self.count, least=0)

    def visible(self, q, k):
        return k.position < self.count


@pytree
class SameSegment(Mask):
    """Keys of the query's own packed document. Padding, segment 0, sees nothing and is never seen."""

    def visible(self, q, k):
        return (q.segment == k.segment) & (q.segment != 0)


@pytree
class Strided(Mask):
    """Every `stride`-th key, counted from the query's own: (q − k) mod stride = 0.

    `Causal() & Window(n * stride) & Strided(stride)` is a dilated window of n keys (Longformer,
    Beltagy et al. 2020, arXiv:2004.05150); the strided pattern is that of the Sparse Transformer
    (Child et al. 2019, arXiv:1904.10509).

    Raises:
      ValueError: stride is below 1.
    """

    stride: Number

    def __post_init__(self):
        check_whole("Strided", "stride", self.stride, least=1)

    def visible(self, q, k):
        return (q.position - k.position) % self.stride == 0


@pytree
class RandomChunks(Mask):
    """A random `fraction` of the pairs of chunks, drawn anew for each `seed`.

    Chunk pair (i, j) is visible where a hash of (seed, i, j), uniform over [0, 1), is below the
    fraction. So it is nested: a greater fraction shows the same pairs and more. 0 shows none and 1
    all of them. Blocks are skipped where they touch at most two chunks each way.

    Raises:
      ValueError: chunk is below 1, or fraction outside 0…1.
    """

    chunk: Number
    fraction: Number
    seed: Number = 0

    def __post_init__(self):
        check_whole("RandomChunks", "chunk", self.chunk, least=1)
        check_whole("RandomChunks", "seed", self.seed)
        check_fraction("RandomChunks", "fraction", self.fraction)

    def visible(self, q, k):
        return random_draw(self.seed, q.position // self.chunk, k.position // self.chunk) < self.fraction


@pytree
class Select(Mask):
    """Mask `a` where the flag is true, else `b`: a switch by data, without a retrace.

    Args:
      flag: a boolean, or `[N]` of them to mix two masks over the heads.

    Raises:
      TypeError: the flag is not boolean.
    """

    flag: Any
    a: Mask
    b: Mask

    def __post_init__(self):
        for mask in (self.a, self.b):
            check_mask(mask)
        if not is_boolean(self.flag):
            raise TypeError(f"Select: flag must be boolean, got {self.flag!r}")

    def visible(self, q, k):
        flag = jnp.asarray(self.flag)
        return (look(self.a, q, k) & flag) | (look(self.b, q, k) & ~flag)


@pytree
class Predicate(Mask):
    """A mask of one's own, from a function of two tokens.

    Args:
      function: `(q, k, *parameters) -> visible`, in `Tokens`. Over spans, `+ - * // %`, `abs`,
        comparisons, `& | ~`, and `maximum` and `minimum` of `dynmask_jax` are followed; a function
        that does anything else is right all the same, but skips no block, and says so once. It is
        part of the mask's structure: define it once, not anew in each step, or each step recompiles.
      parameters: numbers it depends on, as leaves: they may change from step to step, and be traced.

    Raises:
      TypeError: the function is not callable.
      ValueError: it closes over a traced value, which must be a parameter.

    >>> blocks_of_8_in_64 = Predicate(lambda q, k: (q.position - k.position) % 64 < 8)
    >>> near = Predicate(lambda q, k, n: abs(q.position - k.position) < n, 16)
    """

    function: Callable = static()
    parameters: tuple = ()

    def __init__(self, function: Callable, *parameters):
        if not callable(function):
            raise TypeError(f"Predicate: function must be callable, got {function!r}")
        for name, value in _closed_over(function):
            if is_traced(value):
                raise ValueError(
                    f"Predicate: the function closes over {name}, which is traced; give it as a parameter: "
                    f"Predicate(lambda q, k, {name}: …, {name})"
                )
        object.__setattr__(self, "function", function)
        object.__setattr__(self, "parameters", parameters)

    def visible(self, q, k):
        return self.function(q, k, *self.parameters)

    def __repr__(self):
        name = getattr(self.function, "__name__", repr(self.function))
        return f"Predicate({', '.join([name, *map(repr, self.parameters)])})"


def _closed_over(function) -> list[tuple[str, Any]]:
    """The variables of an enclosing function that it uses, with their values."""
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or cells is None:
        return []
    return [(n, c.cell_contents) for n, c in zip(code.co_freevars, cells, strict=True) if c != CellType()]


def look(mask: Mask, q: Tokens, k: Tokens) -> Any:
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
        seen = look(one_head, q[:, None], k[None, :])
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
