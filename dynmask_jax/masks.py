"""The catalogue of masks: which keys each query may see, each as one expression over their tokens.

What a mask is, and how masks combine and are read, is in `dynmask_jax.mask_algebra`.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from dynmask_jax.array_typing import (
    Number,
    is_boolean,
    pytree,
    static,
)
from dynmask_jax.hashes import random_draw
from dynmask_jax.leaves import check_fraction, check_function, check_whole
from dynmask_jax.mask_algebra import And as And
from dynmask_jax.mask_algebra import Mask as Mask
from dynmask_jax.mask_algebra import Not as Not
from dynmask_jax.mask_algebra import Or as Or
from dynmask_jax.mask_algebra import check_mask as check_mask
from dynmask_jax.mask_algebra import evaluate as evaluate
from dynmask_jax.mask_algebra import head_count as head_count
from dynmask_jax.mask_algebra import mask_tensor as mask_tensor
from dynmask_jax.mask_algebra import visible_pairs as visible_pairs
from dynmask_jax.spans import lift


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
        return (evaluate(self.a, q, k) & flag) | (evaluate(self.b, q, k) & ~flag)


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
        check_function("Predicate", function)
        object.__setattr__(self, "function", function)
        object.__setattr__(self, "parameters", parameters)

    def visible(self, q, k):
        return self.function(q, k, *self.parameters)

    def __repr__(self):
        name = getattr(self.function, "__name__", repr(self.function))
        return f"Predicate({', '.join([name, *map(repr, self.parameters)])})"
