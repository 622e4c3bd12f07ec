"""Curricula: `step -> Mask`, plain pure functions that end in the full mask.

The step may be traced, so a whole curriculum is one compilation. Each takes `base`, the mask that
training ends with: `Causal()` for decoders, `Everything()` for encoders, `Causal() | Prefix(n)` for
summarisation; `Causal() & SameSegment()` for packed documents (or combine the result).

A curriculum is *nested* where what is shown stays shown. `growing_window` and `reveal` are;
`growing_chunks` is not by nature: where chunks of 3 grow to chunks of 4, token 3 parts from 4.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, get_args

import jax.numpy as jnp

from dynmask_jax.array_typing import Array, is_concrete
from dynmask_jax.hashes import radical_inverse, random_draw
from dynmask_jax.leaves import check_whole
from dynmask_jax.masks import Causal, Chunks, Mask, Predicate, Window, check_mask
from dynmask_jax.schedules import Schedule, Step
from dynmask_jax.spans import maximum, minimum, rising

Curriculum = Callable[[Step], Mask]
Order = Literal["nearest", "oldest", "random", "strided", "partial"]


def growing_window(length: Schedule, *, base: Mask = Causal()) -> Curriculum:
    """base & Window(length(step)): the nearest tokens first. Nested where the schedule never falls.

    Args:
      length: `step -> tokens`, the query's own included; fractions are rounded down. With a base that
        shows later keys, as many of them. The curriculum ends in the full mask where the schedule
        ends at the sequence length or above.
      base: the mask that training ends with.

    Source: window growth, e.g. Press et al. 2021, "Shortformer", arXiv:2012.15832.

    >>> curriculum = growing_window(lambda step: 2 + step)
    >>> mask_tensor(curriculum(0), Tokens.sequence(3)).astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    _check(length=length, base=base)

    def curriculum(step: Step) -> Mask:
        tokens = _rounded_down(length(step))
        # Before `ahead` is built, so that a negative length is refused by its own name.
        window = Window(tokens)
        return base & replace(window, ahead=jnp.maximum(tokens - 1, 0))

    return curriculum


def growing_chunks(length: Schedule, *, base: Mask = Causal()) -> Curriculum:
    """base & Chunks(length(step)): SkyLadder's fragments, without resetting positions.

    Not nested, unless each length divides the next (`staircase` or powers of two). A constant length
    is static masking.

    Args:
      length: `step -> tokens` in a chunk, at least 1; fractions are rounded down.
      base: the mask that training ends with.

    Source: Zhu et al. 2025, "SkyLadder", arXiv:2503.15450.
    """
    _check(length=length, base=base)

    def curriculum(step: Step) -> Mask:
        tokens = _rounded_down(length(step))
        # A concrete length below 1 is refused; a traced one cannot be, and must not divide by zero.
        return base & Chunks(tokens if is_concrete(tokens) else jnp.maximum(tokens, 1))

    return curriculum


def reveal(
    chunk: int, amount: Schedule, order: Order = "nearest", *, base: Mask = Causal(), seed: int = 0
) -> Curriculum:
    """base & (own chunk | part of the other chunks): the dynamic mask of the method. Nested.

    A query in chunk i sees its own chunk always, and of the i chunks before it a share `amount`:

    - `nearest`: chunk j where i − j ≤ amount·i, the latest first;
    - `oldest`: chunk j where j < amount·i, the sequence's beginning first;
    - `random`: chunk j where a hash of (seed, i, j), uniform over [0, 1), is below amount;
    - `strided`: chunk j where the radical inverse of i − j is below amount, so that 1/2 shows every
      second chunk, 1/4 every fourth: coarse to fine (van der Corput 1935);
    - `partial`: of every other chunk its last ⌈amount·chunk⌉ tokens: the method's "part of each
      subsequence's information".

    With a base that shows later chunks, a pair of chunks is read the same from either side: i is
    the later of the two and j the earlier.

    Args:
      chunk: tokens in a subsequence, the method's T.
      amount: `step -> 0 … 1` in floats, such as `linear(0.0, 1.0, steps)`.
      order: one of the five.
      base: the mask that training ends with.
      seed: of the random order.

    Raises:
      ValueError: an unknown order, a chunk below 1, or an amount outside 0…1 where it can be read.
      TypeError: an amount that is no schedule or gives whole numbers (`linear(0, 1, steps)` would
        stay 0 up to its last step), or a base that is no mask.
    """
    _check(amount=amount, base=base)
    if order not in get_args(Order):
        raise ValueError(f"order must be one of {', '.join(map(repr, get_args(Order)))}, got {order!r}")
    own, shown = Chunks(chunk), _SHOWN[order]
    check_whole("reveal", "seed", seed)

    def curriculum(step: Step) -> Mask:
        share = jnp.asarray(amount(step))
        if not jnp.issubdtype(share.dtype, jnp.floating):
            raise TypeError(f"amount must give fractions, as linear(0.0, 1.0, steps) does, got {share.dtype}")
        if is_concrete(share) and not ((share >= 0) & (share <= 1)).all():
            raise ValueError(f"amount must lie in 0…1, got {share} at step {step}")
        return base & (own | Predicate(shown, chunk, _as_float(share), seed))

    return curriculum


def _nearest(q, k, chunk, share, seed):
    i, j = q.position // chunk, k.position // chunk
    return abs(i - j) <= rising(lambda n: _as_whole(jnp.floor(_as_float(n) * share)), maximum(i, j))


def _oldest(q, k, chunk, share, seed):
    i, j = q.position // chunk, k.position // chunk
    return minimum(i, j) < rising(lambda n: _as_whole(jnp.ceil(_as_float(n) * share)), maximum(i, j))


def _random(q, k, chunk, share, seed):
    i, j = q.position // chunk, k.position // chunk
    return random_draw(seed, maximum(i, j), minimum(i, j)) < share


def _strided(q, k, chunk, share, seed):
    return radical_inverse(abs(q.position // chunk - k.position // chunk)) < share


def _partial(q, k, chunk, share, seed):
    return k.position % chunk >= chunk - _as_whole(jnp.ceil(share * chunk))


_SHOWN: dict[str, Callable] = {
    "nearest": _nearest,
    "oldest": _oldest,
    "random": _random,
    "strided": _strided,
    "partial": _partial,
}


def _rounded_down(length) -> Array:
    """A schedule's value as whole tokens: optax schedules give floats."""
    length = jnp.asarray(length)
    return _as_whole(length if jnp.issubdtype(length.dtype, jnp.integer) else jnp.floor(length))


def _as_float(value) -> Array:
    return jnp.asarray(value).astype(jnp.float32)


def _as_whole(value) -> Array:
    return value.astype(jnp.int32)


def _check(base: Mask, **schedules):
    check_mask(base, "base must be a Mask")
    for name, schedule in schedules.items():
        if not callable(schedule):
            raise TypeError(f"{name} must be a schedule (step -> number), got {schedule!r}; see constant()")
