"""Attention calls of one size, forward and forward+backward: what most benchmarks time."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from benchmarks.timing import Ways
from dynmask_jax.array_typing import Array
from tests.cases import Shape

FORWARD, BOTH = WAYS = ("forward", "forward+backward")


@dataclass(frozen=True)
class Size:
    """One sequence of self-attention."""

    tokens: int = 4_096
    heads: int = 8
    head_dim: int = 64

    def arrays(self, dtype="float32") -> tuple[Array, ...]:
        """Normal q, k, v and the cotangent of out, each `[1, T, N, H]`."""
        shape = Shape(1, self.tokens, self.tokens, self.heads, self.heads, self.head_dim)
        return *shape.qkv(dtype), shape.qkv(dtype, seed=1)[0]

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens, {self.heads} heads of {self.head_dim}"


def compiled(attend: Callable) -> dict[str, Any]:
    """`attend(q, k, v, *data)` jitted both ways: of (q, k, v, cotangent, *data).

    The backward pass takes a cotangent of its own, as in training; that of a sum, all ones, would let
    a compiler take short cuts.
    """

    def forward(q, k, v, cotangent, *data):
        return attend(q, k, v, *data)

    def both(q, k, v, cotangent, *data):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, *data), q, k, v)
        return out, pull(cotangent)

    return {FORWARD: jax.jit(forward), BOTH: jax.jit(both)}


def both_ways(functions: dict[str, Callable], *arguments) -> Ways:
    """What `compiled` gave, bound to its arguments."""
    return {way: functools.partial(function, *arguments) for way, function in functions.items()}
