"""Attention for Flax Linen: the twin of `dynmask_jax.nnx`, with the same numbers for the same weights."""

import inspect
from collections.abc import Callable

import flax.linen as nn

from dynmask_jax.array_typing import Array, Float
from dynmask_jax.backends.backend import Backend
from dynmask_jax.calls import as_plan
from dynmask_jax.dispatch import attention
from dynmask_jax.flax_adapter import attend_for_flax, computation, fixed_options, head_shape
from dynmask_jax.mask_algebra import Mask, check_mask
from dynmask_jax.plans import Plan
from dynmask_jax.rotary import rotary


class Attention(nn.Module):
    """Multi-head attention under a plan: projections, rotary positions, attention, projection.

    Parameters, arguments and errors are those of `dynmask_jax.nnx.Attention`.
    """

    features: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float | None = None
    attention: Callable = attention
    dtype: object = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask_or_plan: Mask | Plan,
        context: Float[Array, "B S D"] | None = None,
        **options,
    ) -> Float[Array, "B T D"]:
        """The layer's output for queries from `x` and keys from `context` (`x` where left out).

        Options are those of `dynmask_jax.attention` for this call: `dropout=Dropout(rate, key)`, say.
        """
        context = x if context is None else context
        kv_heads, head_dim = head_shape(self.features, self.num_heads, self.num_kv_heads, self.head_dim)
        bias = {**fixed_options(self.attention), **options}.get("bias")
        plan = as_plan(mask_or_plan, x.shape[0], x.shape[1], context.shape[1], bias)

        def heads(count: int, name: str):
            return nn.DenseGeneral((count, head_dim), use_bias=False, dtype=self.dtype, name=name)

        q = heads(self.num_heads, "query")(x)
        k, v = heads(kv_heads, "key")(context), heads(kv_heads, "value")(context)
        if self.rope_theta is not None:
            q = rotary(q, plan.q_tokens.position, self.rope_theta)
            k = rotary(k, plan.kv_tokens.position, self.rope_theta)
        out = self.attention(q, k, v, plan, **options)
        return nn.DenseGeneral(self.features, axis=(-2, -1), use_bias=False, dtype=self.dtype, name="out")(
            out
        )


def attention_fn(
    mask_or_plan: Mask | Plan,
    *,
    attention: Callable = attention,
    backend: str | Backend | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
) -> Callable:
    """An `attention_fn` for `nn.MultiHeadDotProductAttention`, under a mask or a plan.

    Args:
      mask_or_plan: a `Plan`, which knows the batch's tokens, or a `Mask`.
      attention: what computes it: `functools.partial(attention, bias=ALiBi.for_heads(8))`, with options of
        its own, or a `context_parallel`.
      backend: its backend.
      block_q, block_k: tokens in a block of the plans that are made here, for a mask.

    Linen is functional, so the step is an argument: inside a module's `__call__`, make it anew with
    `attention_fn(curriculum(step))`; traced steps are fine, and a whole curriculum is one compilation.

    What a layer is given as its `mask` narrows that: a padding mask `[batch, 1, 1, keys]` hides keys, and
    `Tokens` say positions and segments. A `Plan` is narrowed by the mask. Mask arrays of pairs are refused.

    The layer's `dropout_rate`, `broadcast_dropout` and `deterministic` mean what they mean in Flax; the draws
    are those of `Dropout`, at the key that the layer draws. Flax's layers pass no bias: give it to attention,
    `functools.partial(attention, bias=RelativeBuckets(table))`, whose table is a parameter of the module that
    calls this.

    Raises:
      TypeError: neither a mask nor a plan; attention that cannot be called; or an array as a bias.
      ValueError: blocks for a plan, which has its own; when called, a mask that reads segments and no tokens,
        or other ones; other numbers of queries and keys and a mask that reads positions; dropout without a
        key.
      Unsupported: when called with a mask array of pairs, sown weights, or a precision.

    >>> layer = nn.MultiHeadDotProductAttention(
    ...     num_heads=2, attention_fn=attention_fn(Causal() & Window(4)))
    >>> layer.init_with_output(jax.random.key(0), jnp.ones((1, 16, 8)))[0].shape
    (1, 16, 8)
    """
    if not isinstance(mask_or_plan, Plan):
        check_mask(mask_or_plan, "attention_fn needs a mask or a plan")
    elif block_q is not None or block_k is not None:
        raise ValueError(
            f"block_q and block_k are for a mask: the plan has blocks of {mask_or_plan.block_q} x "
            f"{mask_or_plan.block_k}"
        )
    how = computation(attention, backend, block_q, block_k)

    def attend(query, key, value, **options):
        return attend_for_flax(
            nn.dot_product_attention, how, (query, key, value), mask_or_plan, None, options
        )

    # Linen passes on only what the signature names, and would silently keep the mask to itself.
    attend.__signature__ = inspect.signature(nn.dot_product_attention)  # pyright: ignore
    return attend
