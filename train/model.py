"""A decoder-only Transformer: tokens and a plan in, logits out."""

from functools import partial

import flax.nnx as nnx

from dynmask_jax import Plan, attention
from dynmask_jax.array_typing import Array, Float, Int
from dynmask_jax.nnx import Attention
from train import config


class FeedForward(nnx.Module):
    """SwiGLU: silu(x·gate) · (x·up), projected back. Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, shape: config.Model, *, rngs: nnx.Rngs):
        self.gate = nnx.Linear(shape.width, shape.hidden, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(shape.width, shape.hidden, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(shape.hidden, shape.width, use_bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Attention, then feed-forward, each added to its input after an RMSNorm of it."""

    def __init__(self, shape: config.Model, *, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(shape.width, rngs=rngs)
        self.attention = Attention(
            shape.width,
            shape.heads,
            num_kv_heads=shape.kv_heads,
            rope_theta=shape.rope_theta,
            attention=attention if shape.backend is None else partial(attention, backend=shape.backend),
            rngs=rngs,
        )
        self.feed_forward_norm = nnx.RMSNorm(shape.width, rngs=rngs)
        self.feed_forward = FeedForward(shape, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], plan: Plan) -> Float[Array, "B T D"]:
        x = x + self.attention(self.attention_norm(x), plan)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Transformer(nnx.Module):
    """The language model. Its first predictions are uniform: the last projection starts at zero.

    Args:
      shape: its sizes.
      vocabulary: how many different tokens there are.
      rngs: with a `params` stream.
    """

    def __init__(self, shape: config.Model, vocabulary: int, *, rngs: nnx.Rngs):
        # As large as what a layer adds: tokens that are drowned in the first layers' noise learn slowly.
        unit = nnx.initializers.normal(1.0)
        self.embed = nnx.Embed(vocabulary, shape.width, embedding_init=unit, rngs=rngs)
        self.blocks = nnx.Sequential(*[Block(shape, rngs=rngs) for _ in range(shape.layers)])
        self.norm = nnx.RMSNorm(shape.width, rngs=rngs)
        self.logits = nnx.Linear(
            shape.width, vocabulary, use_bias=False, kernel_init=nnx.initializers.zeros_init(), rngs=rngs
        )

    def __call__(self, tokens: Int[Array, "B T"], plan: Plan) -> Float[Array, "B T vocabulary"]:
        """The logits of each next token, under one plan for all layers."""
        x = self.embed(tokens)
        for block in self.blocks.layers:
            x = block(x, plan)
        return self.logits(self.norm(x))
