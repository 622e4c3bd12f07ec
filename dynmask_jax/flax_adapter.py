"""What the NNX and the Linen layers have in common; it needs no Flax itself."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dynmask_jax.array_typing import Array, Float, is_concrete
from dynmask_jax.backends.backend import Backend
from dynmask_jax.bias_algebra import Bias, check_bias
from dynmask_jax.dispatch import known_backend
from dynmask_jax.dropout import Dropout
from dynmask_jax.errors import Unsupported
from dynmask_jax.flax_mask import LayerCall, one_batch_axis
from dynmask_jax.mask_algebra import Mask
from dynmask_jax.masks import Causal
from dynmask_jax.plans import Plan, block_size, plan
from dynmask_jax.tokens import Tokens

# Handled below, or without effect here: the softmax is float32 always.
UNDERSTOOD = frozenset(
    [
        "mask",
        "bias",
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


@dataclass(frozen=True)
class Computation:
    """What computes attention for a Flax layer, and in which blocks. Made by `computation`.

    Attributes:
      attention: what computes it, with the signature of `dynmask_jax.attention`.
      block_q, block_k: tokens in a block of plans that are made here; None for the default.
    """

    attention: Callable
    block_q: int | None
    block_k: int | None

    @property
    def bias(self) -> Bias | None:
        """The one that its attention was made with; raises TypeError where it is something else."""
        if (bias := fixed_options(self.attention).get("bias")) is not None:
            check_bias(bias)
        return bias

    def plan(self, mask: Mask, q_tokens: Tokens, kv_tokens: Tokens) -> Plan:
        """The mask's plan, in these blocks."""
        return plan(mask, q_tokens, kv_tokens, block_q=self.block_q, block_k=self.block_k)


def fixed_options(attention: Callable) -> Mapping[str, Any]:
    """The options that each call of it has: those of a `functools.partial`, and of a `context_parallel`."""
    if isinstance(attention, functools.partial):
        return {**fixed_options(attention.func), **attention.keywords}
    return getattr(attention, "options", {})


def computation(
    attention: Callable, backend: str | Backend | None, block_q: int | None, block_k: int | None
) -> Computation:
    """The options of both `attention_fn`, as one.

    Raises:
      TypeError: the attention cannot be called, or a block size is no whole number.
      ValueError: there is no such backend, or a block size is below 1.
    """
    if not callable(attention):
        raise TypeError(f"attention must be a function like dynmask_jax.attention, got {attention!r}")
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if size is not None:
            block_size(name, size)
    if backend is not None:
        known_backend(backend)
        attention = functools.partial(attention, backend=backend)
    return Computation(attention, block_q, block_k)


def attend_for_flax(
    original: Callable,
    how: Computation,
    qkv: tuple,
    mask_or_plan: Mask | Plan,
    told: tuple[Tokens, Tokens] | None,
    options: Mapping[str, Any],
) -> Float[Array, "*B T N H"]:
    """Attention for a Flax layer, with the keyword arguments that Flax passes to `original`.

    Args:
      original: Flax's own function, whose options are known.
      how: what computes it.
      qkv: query `[*B, T, N, H]`, key and value `[*B, S, K, H]`.
      mask_or_plan: what is visible.
      told: the tokens of queries and keys, where they were told.
      options: what Flax passes. Its `mask` may be
        - an array over keys `[*B, 1, 1, S]`, as of padding: keys that it hides stay hidden;
        - the same for a single query, as Flax makes one to decode with a cache: the last key that it shows
          is the query's own place. So a row that hides the query's own key, as padding does, is read as if
          the query stood at the last key that it shows;
        - `Tokens`, of queries and keys alike; a `Plan`, which `mask_or_plan` narrows; or one more `Mask`.

        Its `bias` is a `Bias`. Several batch axes are one to attention, so dropout counts their rows as one.

    Raises:
      Unsupported: an option that would change the result and that we have not, by name.
      TypeError: a bias that is an array.
      ValueError: tokens are needed, and were not told; or other ones were. Dropout without a key.
    """
    _refuse(original, options)
    if (dtype := options.get("dtype")) is not None:
        qkv = tuple(x.astype(dtype) for x in qkv)
    if options.get("is_causal"):
        mask_or_plan = mask_or_plan & Causal()
    batch = qkv[0].shape[:-3]
    query, key, value = (one_batch_axis(x, batch, 3) for x in qkv)
    added = _bias_and_dropout(how, options)
    call = LayerCall(how.plan, batch, query.shape[1], key.shape[1], added.get("bias", how.bias))
    the_plan = call.plan(mask_or_plan, told, options.get("mask"))
    out = how.attention(query, key, value, the_plan, **added)
    return out if len(batch) == 1 else out.reshape(*batch, *out.shape[1:])


def _refuse(original: Callable, options: Mapping[str, Any]):
    if options.get("module") is not None:
        raise Unsupported("attention_fn never forms attention weights: sow_weights must be False")
    known = inspect.signature(original).parameters
    for name, value in options.items():
        if name not in UNDERSTOOD and not (name in known and value is known[name].default):
            raise Unsupported(f"attention_fn does not support {name}={value!r}")


def _bias_and_dropout(how: Computation, options: Mapping[str, Any]) -> dict[str, Any]:
    """What Flax's options add to the call of `attention`: nothing where they are off."""
    added = {}
    if options.get("bias") is not None:
        check_bias(options["bias"])
        added["bias"] = options["bias"]
    rate = options.get("dropout_rate", 0.0)
    if not (options.get("deterministic") or (is_concrete(rate) and rate == 0)):
        if (rng := options.get("dropout_rng")) is None:
            raise ValueError(f"attention_fn got dropout_rate={rate} and no dropout_rng, a key of jax.random")
        added["dropout"] = Dropout(rate, rng, broadcast=options.get("broadcast_dropout", True))
    for name in added:
        if fixed_options(how.attention).get(name) is not None:
            raise ValueError(f"attention_fn was made with {name}, and got {name} of its layer too: give one")
    return added
