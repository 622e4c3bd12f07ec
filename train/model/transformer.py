"""A decoder-only Transformer: tokens and plans in, hidden features and from them logits out."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.nnx as nnx
import jax
import jax.numpy as jnp

from dynmask_jax import ALiBi, Dropout, Plan
from dynmask_jax.array_typing import Array, Float, Int, pytree
from dynmask_jax.nnx import Attention
from train.config import sections
from train.config.sections import Reach
from train.parallel.activations import constrain_activations, constrain_features, embed_tokens
from train.parallel.gather_weights import gather_layer
from train.parallel.sharding import Placement

Plans = dict[Reach, Plan]
"""The plan of each reach in the model's pattern, "global" and "local"."""

POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""What a layer saves for the backward pass, by the names of `model.remat`; "none" has no policy."""


@pytree
class Cache:
    """Keys and values of the tokens so far, in the same slots in all layers. Made by `begin_cache`.

    Attributes:
      keys, values: `[layers, B, S, K, H]`, S slots.
    """

    keys: Float[Array, "layers B S K H"]
    values: Float[Array, "layers B S K H"]

    def write(self, layer, slot, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]) -> "Cache":
        """The cache with a layer's keys and values written from `slot` on."""
        at = (layer, 0, slot, 0, 0)
        return Cache(
            jax.lax.dynamic_update_slice(self.keys, k[None], at),
            jax.lax.dynamic_update_slice(self.values, v[None], at),
        )


class FeedForward(nnx.Module):
    """SwiGLU: silu(x·gate) · (x·up), projected back. Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, shape: sections.Model, placement: Placement, *, rngs: nnx.Rngs):
        self.placement = placement
        linear = partial(nnx.Linear, use_bias=False, dtype=jnp.dtype(shape.dtype), rngs=rngs)
        self.gate = linear(shape.width, shape.hidden)
        self.up = linear(shape.width, shape.hidden)
        self.down = linear(shape.hidden, shape.width)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        hidden = nnx.silu(self.gate(x)) * self.up(x)
        return self.down(constrain_features(self.placement.mesh, hidden))


class Block(nnx.Module):
    """Attention, then feed-forward, each added to its input after an RMSNorm of it."""

    def __init__(self, shape: sections.Model, placement: Placement, *, rngs: nnx.Rngs):
        self.placement, self.attention_dropout = placement, shape.attention_dropout
        bias = ALiBi.for_heads(shape.heads) if shape.bias == "alibi" else None
        self.attention_norm = nnx.RMSNorm(shape.width, rngs=rngs)
        self.attention = Attention(
            shape.width,
            shape.heads,
            num_kv_heads=shape.kv_heads,
            rope_theta=shape.rope_theta,
            attention=placement.attention(shape.backend, bias),
            dtype=jnp.dtype(shape.dtype),
            rngs=rngs,
        )
        self.feed_forward_norm = nnx.RMSNorm(shape.width, rngs=rngs)
        self.feed_forward = FeedForward(shape, placement, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        plan: Plan,
        cache: Cache | None = None,
        layer=0,
        slot=0,
        key: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """The block's output. With a cache, x's keys are written there first, and x attends to all keys.

        With a key, which all layers share, attention weights are dropped.
        """
        normed = _normed(self.attention_norm, x)
        k, v = self.attention.keys_values(normed, plan.q_tokens)
        if cache is not None:
            cache = cache.write(layer, slot, k, v)
            k, v = cache.keys[layer], cache.values[layer]
        options = {}
        if key is not None:
            options["dropout"] = Dropout(self.attention_dropout, jax.random.fold_in(key, layer))
        mesh = self.placement.mesh
        x = constrain_activations(mesh, x + self.attention.attend(normed, k, v, plan, **options))
        fed = self.feed_forward(_normed(self.feed_forward_norm, x))
        return constrain_activations(mesh, x + fed), cache


class Transformer(nnx.Module):
    """The language model. Its first predictions are uniform: the last projection starts at zero.

    A group of layers is one repetition of the pattern. The weights of groups are stacked:
    `[layers / len(pattern), …]`. From 5 layers on, one loop runs over the groups, so that the size of the
    program does not depend on the number of layers.

    Args:
      shape: its sizes.
      vocabulary: the number of different tokens.
      placement: the devices that it computes on; None: one device.
      rngs: with a `params` stream.
    """

    def __init__(
        self,
        shape: sections.Model,
        vocabulary: int,
        placement: Placement | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        # As large as what a layer adds: an embedding that is small beside it is learnt slowly.
        unit = nnx.initializers.normal(1.0)
        placement = placement or Placement()
        self.shape, self.placement, dtype = shape, placement, jnp.dtype(shape.dtype)
        self.embed = nnx.Embed(vocabulary, shape.width, embedding_init=unit, dtype=dtype, rngs=rngs)

        @nnx.split_rngs(splits=shape.layers // len(shape.pattern))
        @nnx.vmap
        def stacked(rngs: nnx.Rngs) -> nnx.Sequential:
            return nnx.Sequential(*[Block(shape, placement, rngs=rngs) for _ in shape.pattern])

        self.groups = stacked(rngs)
        self.norm = nnx.RMSNorm(shape.width, rngs=rngs)
        self.logits = nnx.Linear(
            shape.width,
            vocabulary,
            use_bias=False,
            kernel_init=nnx.initializers.zeros_init(),
            dtype=dtype,
            dot_general=partial(jax.lax.dot_general, preferred_element_type=jnp.float32),
            rngs=rngs,
        )
        """hidden `[..., D]` -> logits `[..., vocabulary]`, in float32 whatever the dtype."""

    def __call__(
        self, tokens: Int[Array, "B T"], plans: Plans, key: Array | None = None
    ) -> Float[Array, "B T D"]:
        """The features from which `logits` predicts each next token.

        Args:
          tokens: the rows.
          plans: what layers of each reach see.
          key: of `model.attention_dropout`, in training: a new one for each call. None: nothing is dropped.
        """
        return self._layers(tokens, plans, key=key)[0]

    def begin_cache(self, batch: int, slots: int) -> Cache:
        """An empty cache for `batch` sequences of at most `slots` tokens."""
        shape = self.shape
        size = (shape.layers, batch, slots, shape.kv_heads, shape.width // shape.heads)
        return Cache(jnp.zeros(size, shape.dtype), jnp.zeros(size, shape.dtype))

    def decode(
        self, tokens: Int[Array, "B T"], plans: Plans, cache: Cache, slot: Int[Array, ""] | int
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """The same for tokens that follow those in the cache, and the cache with theirs added.

        Args:
          tokens: written to the slots slot … slot + T − 1, which the cache must have.
          plans: their queries are these tokens, their keys are all slots. Empty slots have segment 0, which
            `SameSegment` hides.
          cache: of the tokens before.
          slot: of the first token; it may be traced.
        """
        return self._layers(tokens, plans, cache, slot)

    def _layers(self, tokens, plans: Plans, cache: Any = None, slot: Any = 0, key: Any = None):
        graph, weights = nnx.split(self.groups)
        pattern = self.shape.pattern

        def group(carry, at):
            (x, cache), (number, weights) = carry, at
            blocks = nnx.merge(graph, weights).layers
            for i, (reach, block) in enumerate(zip(pattern, blocks, strict=True)):
                layer = number * len(pattern) + i
                x, cache = self._remat(block)(x, plans[reach], cache, layer, slot, key)
            return (x, cache), None

        numbers = jnp.arange(self.shape.layers // len(pattern), dtype=jnp.int32)
        with jax.named_scope("embedding"):
            start = embed_tokens(self.placement.mesh, self.embed, tokens)
        unroll = 1 if self._looped else len(numbers)
        (x, cache), _ = jax.lax.scan(group, (start, cache), (numbers, weights), unroll=unroll)
        return _normed(self.norm, x), cache

    @property
    def _looped(self) -> bool:
        """Whether groups run in a loop. Few do not: a loop copies what each saves in and out.

        Measured on two CPU cores, 4,096 bytes, width 64: a train step of 2 layers takes 209 ms without
        the loop and 233 ms with it at the start of a curriculum, and 424 and 455 ms at its end.
        """
        return self.shape.layers > 4

    def _remat(self, block: Any) -> Callable:
        """The block, which saves for the backward pass what `model.remat` says.

        On a mesh its weights are gathered inside, so that full rematerialisation saves only the shards.
        """
        graph, state = nnx.split(block)

        def call(weights, *arguments):
            whole = gather_layer(self.placement.mesh, weights, jnp.dtype(self.shape.dtype))
            return nnx.merge(graph, whole)(*arguments)

        if self.shape.remat != "none":
            # XLA cannot merge a loop's body with the backward pass, so nothing has to prevent it there.
            policy = POLICIES[self.shape.remat]
            call = jax.checkpoint(call, policy=policy, prevent_cse=not self._looped)
        return partial(call, nnx.to_pure_dict(state))


def _normed(norm: nnx.RMSNorm, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The norm, computed in float32; the result has the dtype of x."""
    return norm(x.astype(jnp.float32)).astype(x.dtype)
