"""The attention of a layer: projections, norms of queries and keys, rotary positions."""

from collections.abc import Callable
from functools import partial

import flax.nnx as nnx
import jax.numpy as jnp

from dynmask_jax import Plan, Tokens
from dynmask_jax.array_typing import Array, Float
from train.config.sections import Lora, Model, Reach
from train.model.lora import Adapters
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
      lora: what its projections have beside their matrices.
      rngs: with a `params` stream.
    """

    def __init__(self, model: Model, reach: Reach, attention: Callable, lora: Lora, *, rngs: nnx.Rngs):
        self.rope, self.attention = Rope.of(model, reach), attention
        linear = partial(nnx.LinearGeneral, dtype=jnp.dtype(model.dtype), rngs=rngs)

        def heads(count: int) -> nnx.LinearGeneral:
            return linear(model.width, (count, model.head_size), use_bias=model.qkv_bias)

        self.query, self.key, self.value = heads(model.heads), heads(model.kv_heads), heads(model.kv_heads)
        shape = (model.heads, model.head_size)
        self.out = linear(shape, model.width, axis=(-2, -1), use_bias=model.out_bias)
        queries, keys = (count * model.head_size for count in (model.heads, model.kv_heads))
        inward = {"query": queries, "key": keys, "value": keys}
        sizes = {name: (model.width, size) for name, size in inward.items()}
        sizes["out"] = (queries, model.width)
        self.lora = Adapters(lora, sizes, jnp.dtype(model.dtype), rngs=rngs)
        self.qk_norm = model.qk_norm
        if model.qk_norm:
            self.query_norm, self.key_norm = (Norm(model.head_size, model, rngs=rngs) for _ in range(2))

    def keys_values(
        self, x: Float[Array, "B S D"], tokens: Tokens
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Keys and values, turned to their positions, so that a cache can hold them."""
        keys, values = self.lora("key", x, self.key(x)), self.lora("value", x, self.value(x))
        keys = self.key_norm(keys) if self.qk_norm else keys
        return self.rope(keys, tokens.position), values

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
        queries = self.lora("query", x, self.query(x))
        queries = self.query_norm(queries) if self.qk_norm else queries
        attended = self.attention(self.rope(queries, plan.q_tokens.position), k, v, plan, **options)
        return self.lora("out", attended, self.out(attended))
