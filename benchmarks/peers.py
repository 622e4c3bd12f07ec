"""What else a JAX user would call: `jax.nn`, with and without a dense mask, and tokamax."""

import functools
import importlib
import importlib.util
from collections.abc import Callable

import jax

from benchmarks.calls import WAYS, both_ways, compiled
from benchmarks.timing import Ways, attempt
from dynmask_jax import Causal, Tokens, mask_tensor
from dynmask_jax.array_typing import Array

NOT_INSTALLED = "not installed"


def missing(package: str) -> str | None:
    """Why a package cannot be compared with, or None."""
    return NOT_INSTALLED if importlib.util.find_spec(package) is None else None


def of_no_use(reason: str) -> Ways:
    """A peer that is not there, and why."""
    return dict.fromkeys(WAYS, reason)


def jax_nn(arrays: tuple[Array, ...]) -> dict[str, Ways]:
    """`jax.nn.dot_product_attention` under the causal mask, by its own argument and by a dense mask."""

    def by_argument(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    def by_mask(q, k, v, mask):
        return jax.nn.dot_product_attention(q, k, v, mask=mask)

    dense = mask_tensor(Causal(), Tokens.sequence(arrays[0].shape[1]))[None, None]
    return {
        "jax.nn, is_causal": both_ways(compiled(by_argument), *arrays),
        "jax.nn, dense mask": both_ways(compiled(by_mask), *arrays, dense),
    }


def tokamax(arrays: tuple[Array, ...]) -> dict[str, Ways]:
    """tokamax's two implementations that need no kernel, under the causal mask."""
    return {f"tokamax, {name}": tokamax_as(name, arrays) for name in ("xla", "xla_chunked")}


def tokamax_as(implementation: str | None, arrays: tuple[Array, ...]) -> Ways:
    """tokamax under the causal mask, by one of its implementations; None for its own choice."""
    if reason := missing("tokamax"):
        return of_no_use(reason)
    try:
        attend: Callable = importlib.import_module("tokamax").dot_product_attention
    except Exception as error:  # tokamax supports fewer versions of jax than we do
        return of_no_use(f"cannot be imported: {type(error).__name__}")
    ways = compiled(functools.partial(attend, is_causal=True, implementation=implementation))
    return {way: attempt(call) for way, call in both_ways(ways, *arrays).items() if callable(call)}
