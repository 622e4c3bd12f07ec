"""What the NNX and the Linen layers have in common; it needs no Flax itself."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from dynmask_jax.array_typing import Array, Float, Int
from dynmask_jax.dispatch import attention
from dynmask_jax.errors import Unsupported
from dynmask_jax.fields_read import reads_segments
from dynmask_jax.masks import Causal, Mask, SameSegment
from dynmask_jax.plans import Plan, plan
from dynmask_jax.tokens import Tokens

# Handled below, or without effect here: nothing is dropped out, and the softmax is float32 always.
UNDERSTOOD = frozenset(
    [
        "mask",
        "is_causal",
        "dtype",
        "deterministic",
        "dropout_rate",
        "dropout_rng",
        "broadcast_dropout",
        "force_fp32_for_softmax",
        "promote_dtype",
    ]
)


def head_shape(
    features: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None
) -> tuple[int, int]:
    """The layer's key heads K and head dim H, with the defaults filled in: N and D // N.

    Raises:
      ValueError: heads below 1; K does not divide N; or N does not divide D where there is no head dim.
    """
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    for name, count in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads must divide num_heads ({num_heads}), got {num_kv_heads}")
    if head_dim is None and features % num_heads:
        raise ValueError(f"num_heads must divide features ({features}), got {num_heads}; or give head_dim")
    return num_kv_heads, features // num_heads if head_dim is None else head_dim


def check_reads_no_segments(mask: Mask):
    """Refuses a mask for which Flax's layers, which pass on no tokens, would take all for one."""
    if reads_segments(mask):
        raise ValueError(
            f"attention_fn: {mask!r} reads segments, and Flax's layers pass on none: packed documents would "
            "see each other: give a plan, plan(mask, Tokens.packed([300, 212])), to the layers of "
            "dynmask_jax.nnx or dynmask_jax.linen, or to linen.attention_fn"
        )


def attend_for_flax(
    original: Callable,
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K H"],
    mask_or_plan: Mask | Plan,
    options: Mapping[str, Any],
) -> Float[Array, "*B T N H"]:
    """Attention for a Flax layer, with the keyword arguments that Flax passes to `original`.

    A mask array is taken for a single query only, as Flax makes one to decode with a cache: the last
    key that it shows is the query's own place, and keys that it hides stay hidden. So a row that hides the
    query's own key, as padding does, is read as if the query stood at the last key that it shows.

    Raises:
      Unsupported: an option that would change the result and that we have not, by name.
    """
    _refuse(original, options)
    if (dtype := options.get("dtype")) is not None:
        query, key, value = (x.astype(dtype) for x in (query, key, value))
    if options.get("is_causal"):
        if isinstance(mask_or_plan, Plan):
            raise Unsupported("attention_fn cannot add is_causal to a plan: make the plan with & Causal()")
        mask_or_plan = mask_or_plan & Causal()
    batch = query.shape[:-3]
    query, key, value = (x.reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value))
    if options.get("mask") is not None:
        shown = _shown_to_one_query(options["mask"], batch, query.shape[1], key.shape[1])
        mask_or_plan = _decoding_plan(mask_or_plan, shown)
    out = attention(query, key, value, mask_or_plan)
    return out.reshape(*batch, *out.shape[1:])


def _refuse(original: Callable, options: Mapping[str, Any]):
    if options.get("dropout_rate") and not options.get("deterministic"):
        raise Unsupported(f"attention_fn has no dropout, got dropout_rate={options['dropout_rate']}")
    if options.get("module") is not None:
        raise Unsupported("attention_fn never forms attention weights: sow_weights must be False")
    known = inspect.signature(original).parameters
    for name, value in options.items():
        if name not in UNDERSTOOD and not (name in known and value is known[name].default):
            raise Unsupported(f"attention_fn does not support {name}={value!r}")


def _shown_to_one_query(mask, batch, queries: int, keys: int) -> Int[Array, "B S"]:
    if queries > 1:
        raise Unsupported(
            "attention_fn takes a mask array for one query (decoding) only; for more, give it a mask "
            "expression: attention_fn(Causal() & ...)"
        )
    if mask.shape[-3:] != (1, 1, keys):
        raise Unsupported(f"attention_fn takes one mask for all heads, [..., 1, 1, {keys}], got {mask.shape}")
    return jnp.broadcast_to(mask.astype(bool), (*batch, 1, 1, keys)).reshape(-1, keys)


def _decoding_plan(mask_or_plan: Mask | Plan, shown) -> Plan:
    if isinstance(mask_or_plan, Plan):
        raise Unsupported("attention_fn decodes with a mask or a curriculum, not with a plan")
    place = jnp.arange(shown.shape[1], dtype=jnp.int32)
    cursor = jnp.max(jnp.where(shown, place[None, :], 0), axis=1, keepdims=True)
    keys = Tokens(jnp.broadcast_to(place, shown.shape), shown.astype(jnp.int32))
    return plan(mask_or_plan & SameSegment(), Tokens(cursor), keys)
