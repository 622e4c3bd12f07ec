"""Three-valued verdicts: what a condition is over all pairs of two blocks, none, some or every one."""

import jax.numpy as jnp

from dynmask_jax.array_typing import Array, Bool, is_boolean, pytree


@pytree
class Verdict:
    """What a condition is over all pairs of two blocks: none of them, some, or every one.

    Attributes:
      some: may it hold for any pair? False is a promise: it holds for none.
      every: must it hold for all pairs? True is a promise.

    `&`, `|`, `^`, `~`, `==` and `!=` are closed over verdicts, and take plain booleans beside them.
    """

    some: Bool[Array, "..."]
    every: Bool[Array, "..."]

    __array_ufunc__ = None  # numpy must leave `array & verdict` to us
    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __and__(self, other):
        return _verdict(other, lambda b: Verdict(self.some & b.some, self.every & b.every))

    def __or__(self, other):
        return _verdict(other, lambda b: Verdict(self.some | b.some, self.every | b.every))

    def __invert__(self):
        return Verdict(~self.every, ~self.some)

    def __xor__(self, other):
        return _verdict(other, lambda b: (self & ~b) | (~self & b))

    def __eq__(self, other):  # pyright: ignore[reportIncompatibleMethodOverride]
        return ruled(_verdict(other, lambda b: ~(self ^ b)))

    def __ne__(self, other):  # pyright: ignore[reportIncompatibleMethodOverride]
        return ruled(_verdict(other, lambda b: self ^ b))

    __rand__, __ror__, __rxor__ = __and__, __or__, __xor__

    def __bool__(self):
        raise TypeError("a verdict has no single truth value: combine conditions with & | ~")


def _verdict(other, rule):
    if isinstance(other, Verdict):
        return rule(other)
    if not is_boolean(other):
        return NotImplemented
    truth = jnp.asarray(other)
    return rule(Verdict(truth, truth))


def ruled(answer):
    """The answer of == or !=, for which Python would put identity where there is no rule."""
    if answer is NotImplemented:
        raise TypeError("spans compare with spans and numbers, verdicts with verdicts and booleans")
    return answer
