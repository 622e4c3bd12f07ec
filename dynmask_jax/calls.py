"""The arguments of `attention`: what they must be, and the plan that a mask stands for."""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from dynmask_jax.bias_algebra import Bias, check_bias
from dynmask_jax.fields_read import fields_read, reads_segments
from dynmask_jax.mask_algebra import Mask, check_mask
from dynmask_jax.plans import Plan, plan
from dynmask_jax.tokens import Tokens

MANY_HEADS = 128
"""No model has more key heads in a layer, as far as we know; sequences have more tokens."""


def as_plan(mask_or_plan: Mask | Plan, batch: int, queries: int, keys: int, bias: Bias | None = None) -> Plan:
    """The plan itself, or one for the mask with queries and keys at positions 0, 1, ….

    Raises:
      TypeError: it is neither, or the bias is none.
      ValueError: the plan is for another batch, or other numbers of queries and keys; or the mask, or the
        bias that reads the same tokens, needs them.
    """
    if bias is not None:
        check_bias(bias)
    if isinstance(mask_or_plan, Plan):
        _check_plan(mask_or_plan, batch, queries, keys)
        return mask_or_plan
    check_mask(mask_or_plan, "mask_or_plan must be a Mask or a Plan")
    for expression in (mask_or_plan, bias):
        check_without_tokens(expression, queries, keys)
    return plan(mask_or_plan, Tokens.sequence(queries), Tokens.sequence(keys))


def check_without_tokens(expression: Mask | Bias | None, queries: int, keys: int):
    """Refuses a mask or a bias that needs to be told more of queries and keys than their numbers.

    Raises:
      ValueError: it reads segments; or as `check_positions` says.
    """
    if reads_segments(expression):
        raise ValueError(
            f"{expression!r} reads the segments of tokens, and there are none here, so packed documents "
            "would count as one: make a plan of the tokens, plan(mask, Tokens.packed([300, 212])) or "
            "plan(mask, Tokens(position, segment)), and give it in place of the mask"
        )
    check_positions(expression, queries, keys)


def check_positions(expression: Mask | Bias | None, queries: int, keys: int):
    """Refuses a mask or a bias for which it must be said where the queries stand among the keys.

    Raises:
      ValueError: it reads positions of queries, and there are more keys than queries, or fewer.
    """
    if expression is not None and queries != keys and "q.position" in fields_read(expression):
        start = f"Tokens.sequence({queries}), Tokens.sequence({keys})"
        end = f"Tokens.sequence({queries}, start={keys - queries}), Tokens.sequence({keys})"
        raise ValueError(
            f"{expression!r} reads positions, and where {queries} queries stand among {keys} keys is not "
            f"said: give plan(mask, {end}) in place of the mask if the queries are the last tokens, "
            f"plan(mask, {start}) if they start where the keys do"
        )


def check_arrays(q, k, v):
    """Refuses what cannot be the queries, keys and values of one call; raises as `attention` says."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, jax.Array | np.ndarray):
            raise TypeError(f"{name} must be an array, got {type(x).__name__}")
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(f"{name} must have shape [batch, tokens, heads, head_dim], got {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating, got {x.dtype}")
        if x.dtype != q.dtype:
            raise TypeError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k and v must have one batch, tokens and heads, got {k.shape} and {v.shape}")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q and k must have one batch size, got {q.shape[0]} and {k.shape[0]}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must have one head dim, got {q.shape[3]} and {k.shape[3]}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"query heads ({q.shape[2]}) must be a multiple of key heads ({k.shape[2]})")
    _warn_of_layout(q, k)


def _warn_of_layout(q, k):
    """Says that arrays look as PyTorch lays them out, [batch, heads, tokens, head_dim]."""
    if q.shape[2] > q.shape[1] and k.shape[2] > max(k.shape[1], MANY_HEADS):
        warnings.warn(
            f"q {q.shape} and k {k.shape} have more heads than tokens: arrays are [batch, tokens, heads, "
            "head_dim] here; those of PyTorch, [batch, heads, tokens, head_dim], need .swapaxes(1, 2)",
            stacklevel=4,
        )


def _check_plan(the_plan: Plan, batch: int, queries: int, keys: int):
    if the_plan.codes.ndim != 3:
        raise ValueError(
            f"the plan's codes must have shape [rows, Tb, Sb], got {the_plan.codes.shape}; of plans made "
            "under vmap each goes to its own attention, under vmap too"
        )
    if the_plan.lengths != (queries, keys):
        t, s = the_plan.lengths
        raise ValueError(f"the plan is for {t} queries and {s} keys, got {queries} and {keys}")
    if the_plan.rows not in (1, batch):
        raise ValueError(f"the plan is for a batch of {the_plan.rows}, got {batch} sequences")


def positive(name: str, value, default):
    """The value as a float, or the default where there is none; refuses what is no positive number."""
    if value is None:
        return default
    if not isinstance(value, int | float | np.number) or isinstance(value, bool):
        raise TypeError(f"{name} must be a Python number, fixed when compiled, got {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return float(value)
