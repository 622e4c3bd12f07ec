"""LoRA: products of two small matrices beside those of the layers, and how they are merged into these.

Hu et al. 2021, arXiv:2106.09685: y = x W + alpha / rank · x A B, with W frozen.
"""

from collections.abc import Mapping
from typing import Any

import flax.nnx as nnx
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from dynmask_jax.array_typing import Array, Float
from train.config.sections import Lora

NAME = "lora"
"""Of the modules in a layer whose weights are these matrices."""


class Adapters(nnx.Module):
    """What LoRA adds to the outputs of a module's projections: nothing where the rank is 0.

    A is `[inputs, rank]`, normal with a variance of 1 / inputs; B is `[rank, outputs]`, zero at first, so
    that the model begins as it was. Both are float32.

    Args:
      options: the section `lora` of the config.
      sizes: inputs and outputs of each projection, by its name.
      dtype: of the products.
      rngs: with a `params` stream.
    """

    def __init__(self, options: Lora, sizes: Mapping[str, tuple[int, int]], dtype: Any, *, rngs: nnx.Rngs):
        self.scale = options.scale
        start = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")
        self.factors = nnx.Dict(
            {
                name: nnx.LoRA(inputs, options.rank, outputs, dtype=dtype, a_initializer=start, rngs=rngs)
                for name, (inputs, outputs) in sizes.items()
                if options.rank and name in options.targets
            }
        )

    def __call__(self, name: str, x: Float[Array, "B T *I"], y: Float[Array, "B T *O"]) -> Array:
        """The output of the projection `name` for the input x, of which the matrix gives y."""
        if name not in self.factors:
            return y
        lora = self.factors[name]
        return y + self.scale * lora(x.reshape(*x.shape[:2], lora.in_features)).reshape(y.shape)


def is_lora(path: str) -> bool:
    """Whether a weight is of LoRA, by its path joined by dots."""
    return NAME in path.split(".")


def split_lora(params: Any) -> tuple[Any, Any]:
    """The weights without those of LoRA, and those of LoRA."""
    flat = _flat(params)
    ours = {path: leaf for path, leaf in flat.items() if NAME in path}
    rest = {path: leaf for path, leaf in flat.items() if NAME not in path}
    return unflatten_dict(rest), unflatten_dict(ours)


def merge_lora(params: Any, options: Lora) -> Any:
    """The weights of the same model without LoRA: each matrix with its product added, in float32.

    Args:
      params: nested dictionaries of arrays; those of no LoRA come back as they are.
      options: the section `lora` of the config.
    """
    base, ours = split_lora(params)
    rest, factors = _flat(base), _flat(ours)
    for path in [path for path in factors if path[-1] == "lora_a"]:
        at = path.index(NAME)
        kernel = (*path[:at], path[-2], "kernel")
        product = jnp.matmul(
            factors[path], factors[(*path[:-1], "lora_b")], precision=jax.lax.Precision.HIGHEST
        )
        rest[kernel] = rest[kernel] + options.scale * product.reshape(rest[kernel].shape)
    return unflatten_dict(rest)


def _flat(params: Any) -> dict[tuple[Any, ...], Any]:
    return dict(flatten_dict(params))
