"""The attention of a layer: projections, norms of queries and keys, rotary positions."""

from collections.abc import Callable
from functools import partial

import flax.nnx as nnx
import jax.numpy as jnp

from dynmask_jax import Plan, Tokens
from dynmask_jax.array_typing import Array, Float
from train.config.sections import Model, Reach
from train.model.norm import Norm
from train.model.rope import Rope


class Attention(nnx.Module):
    """Grouped-query attention under a plan, with the options of `train.config.model.Model`.

    Its kernels have the names and shapes of `dynmask_jax.nnx.Attention`: query.kernel `[D, N, H]`, key.kernel
    and value.kernel `[D, K, H]`, out.kernel `[N, H, D]`.

    Args:
      model: the options.
      reach: of the layer, which decides its rotary frequencies.
      attention: what computes it, with the signature of `dynmask_jax.attention`.
      rngs: with a `params` stream.
    """

    def __init__(self, model: Model, reach: Reach, attention: Callable, *, rngs: nnx.Rngs):
        self.rope, self.attention = Rope.of(model, reach), attention
        linear = partial(nnx.LinearGeneral, dtype=jnp.dtype(model.dtype), rngs=rngs)

        def heads(count: int) -> nnx.LinearGeneral:
            return linear(model.width, (count, model.head_size), use_bias=model.qkv_bias)

        self.query, self.key, self.value = heads(model.heads), heads(model.kv_heads), heads(model.kv_heads)
        shape = (model.heads, model.head_size)
        self.out = linear(shape, model.width, axis=(-2, -1), use_bias=model.out_bias)
        self.qk_norm = model.qk_norm
        if model.qk_norm:
            self.query_norm, self.key_norm = (Norm(model.head_size, model, rngs=rngs) for _ in range(2))

    def keys_values(
        self, x: Float[Array, "B S D"], tokens: Tokens
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Keys and values, turned to their positions, so that a cache can hold them."""
        keys = self.key_norm(self.key(x)) if self.qk_norm else self.key(x)
        return self.rope(keys, tokens.position), self.value(x)

    def attend(
        self,
        x: Float[Array, "B T D"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        plan: Plan,
        **options,
    ) -> Float[Array, "B T D"]:
        """The layer's output for queries from `x`, given what `keys_values` made of their keys.

        Options are those of `dynmask_jax.attention` for this call.
        """
        queries = self.query_norm(self.query(x)) if self.qk_norm else self.query(x)
        return self.out(self.attention(self.rope(queries, plan.q_tokens.position), k, v, plan, **options))
