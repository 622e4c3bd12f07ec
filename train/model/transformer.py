"""A decoder-only Transformer: tokens and plans in, hidden features and from them logits out."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.nnx as nnx
import jax
import jax.numpy as jnp

from dynmask_jax import ALiBi, Dropout, Plan
from dynmask_jax.array_typing import Array, Float, Int
from train.config import sections
from train.config.sections import Reach
from train.model.attention import Attention
from train.model.cache import Cache, slots_of
from train.model.feed_forward import FeedForward
from train.model.norm import Norm
from train.parallel.activations import constrain_activations, embed_tokens
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


@dataclass(frozen=True)
class Caching:
    """What a call does with the cache.

    Attributes:
      slot: of the first token: keys are written there, and then all slots are read.
      lengths: tokens in each prompt, `[B]`: prompts read their own keys, and the cache takes them for later.
        None: the tokens follow those in the cache.
    """

    slot: Any = 0
    lengths: Any = None

    def __call__(self, cache: Cache, reach: Reach, layer, k, v) -> tuple[Cache, Any, Any]:
        """The cache with a layer's new keys and values, and the keys and values to attend to."""
        if self.lengths is not None:
            return cache.write_prompts(reach, layer, self.lengths, k, v), k, v
        cache = cache.write(reach, layer, self.slot, k, v)
        return cache, *cache.of_layer(reach, layer)


class Block(nnx.Module):
    """Attention, then feed-forward, each added to its input after an RMSNorm of it.

    With `model.post_norms` what is added is normalised too.
    """

    def __init__(
        self,
        shape: sections.Model,
        reach: Reach,
        placement: Placement,
        lora: sections.Lora,
        *,
        rngs: nnx.Rngs,
    ):
        self.placement, self.attention_dropout = placement, shape.attention_dropout
        self.reach: Reach = reach
        norm = partial(Norm, shape.width, shape, rngs=rngs)
        attention = placement.attention(
            backend=shape.backend,
            bias=ALiBi.for_heads(shape.heads) if shape.bias == "alibi" else None,
            scale=shape.query_scale,
            soft_cap=shape.attention_soft_cap,
        )
        self.attention_norm = norm()
        self.attention = Attention(shape, reach, attention, lora, rngs=rngs)
        self.feed_forward_norm = norm()
        self.feed_forward = FeedForward(shape, placement, lora, rngs=rngs)
        self.post_norms = shape.post_norms
        if shape.post_norms:
            self.attention_post_norm, self.feed_forward_post_norm = norm(), norm()

    def __call__(
        self,
        x: Float[Array, "B T D"],
        plan: Plan,
        layer=0,
        cached: tuple[Cache, Caching, Any] | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """The block's output, and the cache with x's keys in it.

        Args:
          x: the tokens' features.
          plan: what they see.
          layer: the number of the block in the model.
          cached: the cache, what to do with it, and the block's number among those of its reach; None: x sees
            its own keys.
          key: all layers share it: attention weights are dropped. None: they are not.
        """
        normed, cache = self.attention_norm(x), None
        k, v = self.attention.keys_values(normed, plan.q_tokens)
        if cached is not None:
            before, caching, number = cached
            cache, k, v = caching(before, self.reach, number, k, v)
        options = {}
        if key is not None:
            options["dropout"] = Dropout(self.attention_dropout, jax.random.fold_in(key, layer))
        mesh, attended = self.placement.mesh, self.attention.attend(normed, k, v, plan, **options)
        if self.post_norms:
            attended = self.attention_post_norm(attended)
        x = constrain_activations(mesh, x + attended)
        fed = self.feed_forward(self.feed_forward_norm(x))
        if self.post_norms:
            fed = self.feed_forward_post_norm(fed)
        return constrain_activations(mesh, x + fed), cache


class Transformer(nnx.Module):
    """The language model. Its first predictions are uniform: the last projection starts at zero, unless it is
    the embedding.

    A group of layers is one repetition of the pattern. The weights of groups are stacked: `[groups, …]`. From
    5 layers on, one loop runs over the groups, so that the size of the program does not depend on the number
    of layers. Layers after the last whole repetition, the rest, have weights of their own.

    Args:
      shape: its sizes.
      vocabulary: the number of different tokens.
      placement: the devices that it computes on; None: one device.
      lora: what the layers' projections have beside their matrices.
      rngs: with a `params` stream.
    """

    def __init__(
        self,
        shape: sections.Model,
        vocabulary: int,
        placement: Placement | None = None,
        lora: sections.Lora = sections.Lora(),
        *,
        rngs: nnx.Rngs,
    ):
        # As large as what a layer adds: an embedding that is small beside it is learnt slowly. An embedding
        # that projects to logits too would give logits as large as the root of the width.
        std = shape.width**-0.5 if shape.tied_embeddings else 1.0
        placement = placement or Placement()
        self.shape, self.placement, dtype = shape, placement, jnp.dtype(shape.dtype)
        start = nnx.initializers.normal(std)
        self.embed = nnx.Embed(vocabulary, shape.width, embedding_init=start, dtype=dtype, rngs=rngs)

        def blocks(pattern: tuple[Reach, ...], rngs: nnx.Rngs) -> nnx.Sequential:
            return nnx.Sequential(*[Block(shape, reach, placement, lora, rngs=rngs) for reach in pattern])

        stacked = nnx.split_rngs(splits=shape.groups)(nnx.vmap(partial(blocks, shape.pattern)))
        self.groups = stacked(rngs)
        self.norm = Norm(shape.width, shape, rngs=rngs)
        if not shape.tied_embeddings:
            zeros = nnx.initializers.zeros_init()
            self.logits = nnx.Linear(shape.width, vocabulary, use_bias=False, kernel_init=zeros, rngs=rngs)
        if shape.rest:
            self.rest = blocks(shape.rest, rngs)

    def __call__(
        self, tokens: Int[Array, "B T"], plans: Plans, key: Array | None = None
    ) -> Float[Array, "B T D"]:
        """The features from which `unembed` predicts each next token.

        Args:
          tokens: the rows.
          plans: what layers of each reach see.
          key: of `model.attention_dropout`, in training: a new one for each call. None: nothing is dropped.
        """
        return self._layers(tokens, plans, key=key)[0]

    def begin_cache(self, batch: int, slots: int) -> Cache:
        """An empty cache of `batch` sequences of so many slots; local layers keep no more than a window."""
        return Cache.empty(self.shape, batch, slots_of(self.shape, slots))

    def prefill(
        self, tokens: Int[Array, "B P"], plans: Plans, cache: Cache, lengths: Int[Array, " B"]
    ) -> tuple[Float[Array, "B P D"], Cache]:
        """The same for prompts, each at its row's beginning, and the cache with their keys in it.

        Args:
          tokens: the prompts.
          plans: their queries and their keys are these tokens.
          cache: an empty one.
          lengths: tokens in each prompt.
        """
        return self._layers(tokens, plans, cache, Caching(lengths=lengths))

    def decode(
        self, tokens: Int[Array, "B T"], plans: Plans, cache: Cache, slot: Int[Array, ""] | int
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """The same for tokens that follow those in the cache, and the cache with theirs added.

        Args:
          tokens: written to the slots slot … slot + T − 1, which the cache must have. A ring that is full
            takes one at a time.
          plans: their queries are these tokens, their keys are all slots of the reach:
            `train.model.cache.slot_tokens`. Empty slots have segment 0, which `SameSegment` hides.
          cache: of the tokens before.
          slot: of the first token; it may be traced.
        """
        return self._layers(tokens, plans, cache, Caching(slot))

    @property
    def unembedding(self) -> tuple[str, Array]:
        """The path and the value of the weight that `unembed` projects with."""
        if self.shape.tied_embeddings:
            return "embed.embedding", self.embed.embedding[...]
        return "logits.kernel", self.logits.kernel[...]

    def unembed(
        self, hidden: Float[Array, "*B D"], weight: Array | None = None
    ) -> Float[Array, "*B vocabulary"]:
        """The logits of hidden features, in float32 whatever the dtype.

        Args:
          hidden: the features.
          weight: a copy of the weight of `unembedding`; None: that weight.
        """
        shape, dtype = self.shape, jnp.dtype(self.shape.dtype)
        weight = self.unembedding[1] if weight is None else weight
        features = 1 if shape.tied_embeddings else 0
        logits = jax.lax.dot_general(
            hidden.astype(dtype),
            weight.astype(dtype),
            (((hidden.ndim - 1,), (features,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        cap = shape.logits_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def _layers(self, tokens, plans: Plans, cache: Any = None, caching: Any = None, key: Any = None):
        graph, weights = nnx.split(self.groups)
        shape = self.shape

        def apply(carry, blocks, repetition, *, looped: bool):
            x, cache = carry
            for i, (reach, block) in enumerate(zip(shape.pattern, blocks, strict=False)):
                call, layer = self._remat(block, caching, looped), repetition * len(shape.pattern) + i
                number = repetition * shape.pattern.count(reach) + shape.pattern[:i].count(reach)
                x, cache = call(x, plans[reach], layer, None if cache is None else (cache, number), key)
            return x, cache

        def group(carry, at):
            number, weights = at
            return apply(carry, nnx.merge(graph, weights).layers, number, looped=self._looped), None

        numbers = jnp.arange(shape.groups, dtype=jnp.int32)
        unroll = 1 if self._looped else len(numbers)
        carry, _ = jax.lax.scan(group, (self._embedded(tokens), cache), (numbers, weights), unroll=unroll)
        if shape.rest:
            carry = apply(carry, self.rest.layers, jnp.int32(shape.groups), looped=False)
        x, cache = carry
        return self.norm(x), cache

    def _embedded(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """What the first layer reads."""
        with jax.named_scope("embedding"):
            x = embed_tokens(self.placement.mesh, self.embed, tokens)
            scale = self.shape.embedding_scale
            return x if scale == 1.0 else x * jnp.asarray(scale, x.dtype)

    @property
    def _looped(self) -> bool:
        """Whether groups run in a loop. Few do not: a loop copies what each saves in and out.

        Measured on two CPU cores, 4,096 bytes, width 64: a train step of 2 layers takes 209 ms without
        the loop and 233 ms with it at the start of a curriculum, and 424 and 455 ms at its end.
        """
        return self.shape.layers > 4

    def _remat(self, block: Any, caching: Caching | None, looped: bool) -> Callable:
        """The block, which saves for the backward pass what `model.remat` says.

        On a mesh its weights are gathered inside, so that full rematerialisation saves only the shards.
        """
        graph, state = nnx.split(block)

        def call(weights, x, plan, layer, cached, key):
            whole = gather_layer(self.placement.mesh, weights, jnp.dtype(self.shape.dtype))
            with_cache = None if cached is None else (cached[0], caching, cached[1])
            return nnx.merge(graph, whole)(x, plan, layer, with_cache, key)

        if self.shape.remat != "none":
            # XLA cannot merge a loop's body with the backward pass, so nothing has to prevent it there.
            policy = POLICIES[self.shape.remat]
            call = jax.checkpoint(call, policy=policy, prevent_cse=not looped)
        return partial(call, nnx.to_pure_dict(state))
