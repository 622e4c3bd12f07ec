"""The feed-forward part of a layer."""

from functools import partial

import flax.nnx as nnx
import jax.numpy as jnp

from dynmask_jax.array_typing import Array, Float
from train.config.sections import Lora, Model
from train.model.lora import Adapters
from train.parallel.activations import constrain_features
from train.parallel.sharding import Placement

ACTIVATIONS = {"silu": nnx.silu, "gelu_tanh": partial(nnx.gelu, approximate=True)}
"""Activations by the names of `model.activation`."""


class FeedForward(nnx.Module):
    """silu(x·gate) · (x·up), or with another activation, projected back. Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, shape: Model, placement: Placement, lora: Lora, *, rngs: nnx.Rngs):
        self.placement, self.activation = placement, ACTIVATIONS[shape.activation]
        linear = partial(nnx.Linear, use_bias=False, dtype=jnp.dtype(shape.dtype), rngs=rngs)
        self.gate = linear(shape.width, shape.hidden)
        self.up = linear(shape.width, shape.hidden)
        self.down = linear(shape.hidden, shape.width)
        inward, outward = (shape.width, shape.hidden), (shape.hidden, shape.width)
        sizes = {"gate": inward, "up": inward, "down": outward}
        self.lora = Adapters(lora, sizes, jnp.dtype(shape.dtype), rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate, up = (self.lora(name, x, base(x)) for name, base in (("gate", self.gate), ("up", self.up)))
        hidden = constrain_features(self.placement.mesh, self.activation(gate) * up)
        return self.lora("down", hidden, self.down(hidden))
