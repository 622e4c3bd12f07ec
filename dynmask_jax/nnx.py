"""Attention for Flax NNX: a layer of our own, and an `attention_fn` for models that exist already."""

from collections.abc import Callable

import flax.nnx as nnx

from dynmask_jax.array_typing import Array, Float
from dynmask_jax.calls import as_plan
from dynmask_jax.dispatch import attention
from dynmask_jax.flax_adapter import fixed_options, head_shape
from dynmask_jax.mask_algebra import Mask
from dynmask_jax.nnx_attention_fn import BatchTokens as BatchTokens
from dynmask_jax.nnx_attention_fn import CurriculumAttention as CurriculumAttention
from dynmask_jax.nnx_attention_fn import MaskAttention as MaskAttention
from dynmask_jax.nnx_attention_fn import Step as Step
from dynmask_jax.nnx_attention_fn import attention_fn as attention_fn
from dynmask_jax.nnx_attention_fn import set_final as set_final
from dynmask_jax.nnx_attention_fn import set_step as set_step
from dynmask_jax.nnx_attention_fn import set_tokens as set_tokens
from dynmask_jax.plans import Plan
from dynmask_jax.rotary import rotary
from dynmask_jax.tokens import Tokens


class Attention(nnx.Module):
    """Multi-head attention under a plan: projections, rotary positions, attention, projection.

    Its parameters have the names and shapes of `nnx.MultiHeadAttention`'s, without biases:
    query.kernel `[D, N, H]`, key.kernel and value.kernel `[D, K, H]`, out.kernel `[N, H, D]`.

    Args:
      features: D, the model width in and out.
      num_heads: N query heads.
      num_kv_heads: K key heads, which divide N; N by default.
      head_dim: H, of keys and values alike, by default D // N.
      rope_theta: base of rotary positions, read from the plan's tokens; None for no rotation.
      attention: what computes it, with the signature of `dynmask_jax.attention`:
        `functools.partial(attention, soft_cap=50.0)`, say.
      dtype: of the computation; None for that of the inputs and parameters.
      rngs: `nnx.Rngs` with a `params` stream.

    Raises:
      ValueError: num_kv_heads does not divide num_heads, or num_heads features without a head_dim.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_theta: float | None = None,
        attention: Callable = attention,
        dtype=None,
        rngs: nnx.Rngs,
    ):
        num_kv_heads, head_dim = head_shape(features, num_heads, num_kv_heads, head_dim)
        self.rope_theta, self.attention = rope_theta, attention

        def heads(count: int) -> nnx.LinearGeneral:
            return nnx.LinearGeneral(features, (count, head_dim), use_bias=False, dtype=dtype, rngs=rngs)

        self.query, self.key, self.value = heads(num_heads), heads(num_kv_heads), heads(num_kv_heads)
        self.out = nnx.LinearGeneral(
            (num_heads, head_dim), features, axis=(-2, -1), use_bias=False, dtype=dtype, rngs=rngs
        )

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
        bias = {**fixed_options(self.attention), **options}.get("bias")
        plan = as_plan(mask_or_plan, x.shape[0], x.shape[1], context.shape[1], bias)
        return self.attend(x, *self.keys_values(context, plan.kv_tokens), plan, **options)

    def keys_values(
        self, context: Float[Array, "B S D"], tokens: Tokens
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Keys and values of the context: turned to their positions, so that they can be kept.

        With `attend`, the two halves of a call: a cache holds keys and values between them.
        """
        return self._turned(self.key(context), tokens), self.value(context)

    def attend(
        self,
        x: Float[Array, "B T D"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        plan: Plan,
        **options,
    ) -> Float[Array, "B T D"]:
        """The layer's output for queries from `x`, given what `keys_values` made of their keys."""
        return self.out(self.attention(self._turned(self.query(x), plan.q_tokens), k, v, plan, **options))

    def _turned(self, heads: Float[Array, "B S *NH"], tokens: Tokens) -> Float[Array, "B S *NH"]:
        return heads if self.rope_theta is None else rotary(heads, tokens.position, self.rope_theta)
