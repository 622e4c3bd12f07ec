"""Interval arithmetic: what an expression over token fields can be, over a whole block at once.

A `Span` holds the least and the greatest value that a field takes over a block of tokens. Arithmetic
on spans gives a span that holds every result; a comparison gives a `Verdict`. Both are conservative:
a span may be wider than need be and a verdict may be "some" where "none" or "every" is the truth,
but never the other way. That holds for wrapped int32 results, for rounding, and for NaN.

Reference: R. E. Moore, "Interval Analysis", 1966.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

import jax.numpy as jnp
import numpy as np

from dynmask_jax.array_typing import Array, is_boolean, pytree
from dynmask_jax.verdicts import Verdict as Verdict
from dynmask_jax.verdicts import ruled


@pytree
class Span:
    """All values from `lo` to `hi`, both included; arrays give one span per block.

    `+ - * // %`, `abs`, the comparisons, `maximum` and `minimum` have rules; `//` and `%` for
    integers only. Anything else raises `TypeError`, and the mask that used it is then not skipped.
    A NaN bound says that nothing is known.
    """

    lo: Any
    hi: Any

    __array_ufunc__ = None
    __iter__ = None  # indexing alone would make Python iterate without end
    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __getitem__(self, index):
        return Span(self.lo[index], self.hi[index])

    @property
    def shape(self) -> tuple[int, ...]:
        """The blocks' shape."""
        return jnp.shape(self.lo)

    def __neg__(self):
        return 0 - self

    def __abs__(self):
        larger = maximum(self, -self)
        # The least integer is its own absolute value: a span that starts there stays unbounded.
        floor = jnp.where(self.lo == _lowest(self.lo), self.lo, 0)
        return Span(jnp.maximum(larger.lo, floor), larger.hi)

    def __add__(self, other):
        return _span(other, lambda b: _sum(self, b))

    def __sub__(self, other):
        return _span(other, lambda b: _difference(self, b))

    def __rsub__(self, other):
        return _span(other, lambda a: _difference(a, self))

    def __mul__(self, other):
        return _span(other, lambda b: _product(self, b))

    def __floordiv__(self, other):
        return _span(other, lambda b: _quotient(self, b))

    def __rfloordiv__(self, other):
        return _span(other, lambda a: _quotient(a, self))

    def __mod__(self, other):
        return _span(other, lambda b: _remainder(self, b))

    def __rmod__(self, other):
        return _span(other, lambda a: _remainder(a, self))

    __radd__, __rmul__ = __add__, __mul__

    # A NaN bound makes `>=` False, so "some" stays True and "every" stays False.
    def __lt__(self, other):
        return _span(other, lambda b: Verdict(~(self.lo >= b.hi), self.hi < b.lo))

    def __le__(self, other):
        return _span(other, lambda b: Verdict(~(self.lo > b.hi), self.hi <= b.lo))

    def __gt__(self, other):
        return _span(other, lambda b: b < self)

    def __ge__(self, other):
        return _span(other, lambda b: b <= self)

    def __eq__(self, other):  # pyright: ignore[reportIncompatibleMethodOverride]
        return ruled(_span(other, lambda b: (self <= b) & (b <= self)))

    def __ne__(self, other):  # pyright: ignore[reportIncompatibleMethodOverride]
        return ruled(_span(other, lambda b: ~(self == b)))

    def __bool__(self):
        raise TypeError("a span has no single truth value: combine conditions with & | ~")


def maximum(a, b) -> Any:
    """The greater of two token expressions, pair by pair, in both readings."""
    return _of_spans_or_arrays(jnp.maximum, a, b)


def minimum(a, b) -> Any:
    """The lesser of two token expressions, pair by pair, in both readings."""
    return _of_spans_or_arrays(jnp.minimum, a, b)


def rising(function: Callable, x):
    """`function(x)`, elementwise, where it never falls as x rises: a span's ends go to its ends."""
    return Span(function(x.lo), function(x.hi)) if isinstance(x, Span) else function(x)


def opaque(function: Callable, lowest: float, highest: float, *operands):
    """`function(*operands)`, a function of integers that interval arithmetic cannot follow (a hash).

    On spans of at most two values each, the exact range of the function over their combinations;
    on wider ones `lowest … highest`, which must hold every result.
    """
    if not any(isinstance(x, Span) for x in operands):
        return function(*operands)
    spans = [_as_span(x) for x in operands]
    corners = [function(*corner) for corner in product(*((x.lo, x.hi) for x in spans))]
    # hi - 1 cannot wrap where hi > lo, and lo == hi is small whatever it is.
    small = _all((x.lo == x.hi) | (x.hi - 1 == x.lo) & (x.hi > x.lo) for x in spans)
    least, greatest = _extremes(corners)
    return Span(jnp.where(small, least, lowest), jnp.where(small, greatest, highest))


def lift(value, like):
    """A plain truth value in the reading of the token field `like`: a Verdict beside a Span."""
    if not isinstance(like, Span):
        if not is_boolean(value):
            dtype = getattr(value, "dtype", type(value).__name__)
            raise TypeError(f"a mask must give booleans, got {dtype}: compare, as in (…) != 0")
        return jnp.asarray(value)
    if isinstance(value, Verdict):
        return value
    if not is_boolean(value) or jnp.ndim(value) != 0:
        raise TypeError(f"over spans a mask must give a verdict or one boolean, got {value!r}")
    truth = jnp.asarray(value)
    return Verdict(truth, truth)


def _is_number(value) -> bool:
    return isinstance(value, bool | int | float | np.ndarray | np.generic | Array)


def _span(other, rule):
    return rule(_as_span(other)) if isinstance(other, Span) or _is_number(other) else NotImplemented


def _as_span(value) -> Span:
    if isinstance(value, Span):
        return value
    if jnp.issubdtype(jnp.result_type(value), jnp.unsignedinteger):
        raise TypeError("unsigned numbers have no span rule")
    return Span(value, value)


def _of_spans_or_arrays(function, a, b):
    if not isinstance(a, Span) and not isinstance(b, Span):
        return function(a, b)
    a, b = _as_span(a), _as_span(b)
    return Span(function(a.lo, b.lo), function(a.hi, b.hi))


def _is_float(*bounds) -> bool:
    return jnp.issubdtype(jnp.result_type(*bounds), jnp.floating)


def _lowest(bound):
    dtype = jnp.result_type(bound)
    return -jnp.inf if _is_float(bound) else jnp.iinfo(dtype).min


def _all(conditions):
    first, *rest = conditions
    for condition in rest:
        first = first & condition
    return first


def _extremes(values):
    least = greatest = values[0]
    for value in values[1:]:
        least, greatest = jnp.minimum(least, value), jnp.maximum(greatest, value)
    return least, greatest


def _bounded(lo, hi, wrapped) -> Span:
    """The integer span lo … hi, or all integers of the type where an end has wrapped round."""
    limits = jnp.iinfo(jnp.result_type(lo))
    return Span(jnp.where(wrapped, limits.min, lo), jnp.where(wrapped, limits.max, hi))


def _rounded(lo, hi, *operands) -> Span:
    """The float span lo … hi, one ulp wider at each end.

    Compilers may keep a product exact inside a fused multiply-add; the ulp holds both results. Where
    an operand is infinite an inner value may be NaN, so nothing is known.
    """
    known = _all(jnp.isfinite(bound) for x in operands for bound in (x.lo, x.hi))
    lo = jnp.where(known, jnp.nextafter(lo, -jnp.inf), jnp.nan)
    return Span(lo, jnp.where(known, jnp.nextafter(hi, jnp.inf), jnp.nan))


def _sum(a: Span, b: Span) -> Span:
    lo, hi = a.lo + b.lo, a.hi + b.hi
    if _is_float(lo):
        return _rounded(lo, hi, a, b)
    # A sum has wrapped where both operands have the sign that it lacks.
    return _bounded(lo, hi, ((a.lo ^ lo) & (b.lo ^ lo) < 0) | ((a.hi ^ hi) & (b.hi ^ hi) < 0))


def _difference(a: Span, b: Span) -> Span:
    lo, hi = a.lo - b.hi, a.hi - b.lo
    if _is_float(lo):
        return _rounded(lo, hi, a, b)
    return _bounded(lo, hi, ((a.lo ^ b.hi) & (a.lo ^ lo) < 0) | ((a.hi ^ b.lo) & (a.hi ^ hi) < 0))


def _product(a: Span, b: Span) -> Span:
    lo, hi = _extremes([x * y for x, y in product((a.lo, a.hi), (b.lo, b.hi))])
    if _is_float(lo):
        return _rounded(lo, hi, a, b)
    greatest = [jnp.maximum(abs(_float(x.lo)), abs(_float(x.hi))) for x in (a, b)]
    # 2^30, not 2^31: the float product may be rounded down.
    return _bounded(lo, hi, greatest[0] * greatest[1] >= 2.0**30)


def _float(value):
    return jnp.asarray(value).astype(jnp.float32)


def _divisor_allows(a: Span, b: Span):
    """Where a // b is defined and cannot wrap: b keeps off 0, and a off the least integer // -1."""
    if _is_float(a.lo, a.hi, b.lo, b.hi):
        raise TypeError("// and % over spans are for integers")
    wraps = (a.lo == _lowest(a.lo)) & (b.lo <= -1) & (b.hi >= -1)
    return ((b.lo > 0) | (b.hi < 0)) & ~wraps


def _quotient(a: Span, b: Span) -> Span:
    # For b of one sign, a // b is monotone in either argument: its extremes are at the corners.
    allowed = _divisor_allows(a, b)
    lo, hi = _extremes([x // y for x, y in product((a.lo, a.hi), (b.lo, b.hi))])
    return _bounded(lo, hi, ~allowed)


def _remainder(a: Span, b: Span) -> Span:
    # Within one period of a single divisor the remainder rises with a; else it takes the divisor's
    # sign and stays below it.
    allowed = _divisor_allows(a, b)
    rising = (b.lo == b.hi) & (a.lo // b.lo == a.hi // b.lo)
    lo = jnp.where(rising, a.lo % b.lo, jnp.minimum(b.lo + 1, 0))
    hi = jnp.where(rising, a.hi % b.lo, jnp.maximum(b.hi - 1, 0))
    return _bounded(lo, hi, ~allowed)
