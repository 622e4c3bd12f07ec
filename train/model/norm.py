"""The norm of the Transformer's layers."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp

from dynmask_jax.array_typing import Array, Float
from train.config.sections import Model


class Norm(nnx.Module):
    """RMSNorm over the last axis, computed in float32: Zhang & Sennrich 2019, arXiv:1910.07467.

    The result has the dtype of its input. With `model.norm_unit_offset` it is multiplied by 1 + scale.
    """

    def __init__(self, features: int, model: Model, *, rngs: nnx.Rngs):
        self.eps, self.unit_offset = model.norm_eps, model.norm_unit_offset
        start = nnx.initializers.zeros if model.norm_unit_offset else nnx.initializers.ones
        self.scale = nnx.Param(start(rngs.params(), (features,), jnp.float32))

    def __call__(self, x: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
        scale = 1.0 + self.scale[...] if self.unit_offset else self.scale[...]
        scale = scale.reshape((1,) * (x.ndim - 1) + (-1,))
        y = x.astype(jnp.float32)
        y *= jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps) * scale
        return y.astype(x.dtype)
