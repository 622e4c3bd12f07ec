"""What a train step computes, and how much of what the devices can do that is: MFU.

Counted is what the model needs, not what was done: no recomputation, and of attention only the pairs
that the mask shows. So an early step of a curriculum, which shows little, is not credited with the
full mask's work.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp

from dynmask_jax.context.machines import MACHINES
from train.config.operation import Watch
from train.config.sections import Dtype, Model, Reach
from train.model.lora import is_lora
from train.step.state import State


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a train step, forward and backward.

    Attributes:
      per_token: 6 for each weight of a matrix: a multiplication and an addition, forward once and
        backward twice; 4 if it is frozen, for it has no gradient. The embedding is a lookup and does not
        count; the projection to logits does.
      per_pair: of one visible pair of a query and a key, over all layers of a reach.
    """

    per_token: float
    per_pair: Mapping[Reach, float]

    def of(self, tokens: float, pairs: Mapping[Reach, float]) -> float:
        """The operations of a step.

        Args:
          tokens: real ones, padding left out.
          pairs: visible in one layer of each reach, summed over the rows.
        """
        return self.per_token * tokens + sum(self.per_pair[reach] * pairs[reach] for reach in pairs)


def work(model: Model, vocabulary: int, state: State | None = None) -> Work:
    """The work of a model with a tokenizer of `vocabulary` tokens.

    Args:
      model: its options.
      vocabulary: the number of different tokens.
      state: of arrays or their shapes, which says what is frozen and has the matrices of LoRA; None: all
        weights train, and there is no LoRA.

    >>> from train.config.sections import Model
    >>> shape = Model(layers=2, width=8, heads=2, kv_heads=1, hidden=16, pattern=("local", "global"))
    >>> work(shape, vocabulary=10).of(tokens=1, pairs={"local": 1, "global": 1})
    7584.0
    """
    head_dim = model.head_size
    attention = 2 * model.width * head_dim * (model.heads + model.kv_heads)
    layer = attention + 3 * model.width * model.hidden
    # Scores and the weighted sum of values: two products of H each, forward, and four backward.
    pair = 12 * model.heads * head_dim
    per_pair: dict[Reach, float] = {
        reach: float(pair * model.reaches.count(reach)) for reach in model.pattern
    }
    weights = model.layers * layer + model.width * model.vocabulary(vocabulary)
    return Work(6.0 * weights + (0 if state is None else _difference(model, state)), per_pair)


def _difference(model: Model, state: State) -> float:
    """What frozen matrices save, and those of LoRA add, of a token's operations."""
    projection = "embed.embedding" if model.tied_embeddings else "logits.kernel"
    frozen = [
        leaf.size for path, leaf in _by_path(state.frozen) if path.endswith("kernel") or path == projection
    ]
    return 6.0 * sum(leaf.size for path, leaf in _by_path(state.params) if is_lora(path)) - 2.0 * sum(frozen)


def _by_path(tree: Any) -> list[tuple[str, Any]]:
    return [
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


@dataclass(frozen=True)
class Peak:
    """What the devices can do at best.

    Attributes:
      flops: floating-point operations a second, of all devices together.
      source: where the figure is from, in words.
    """

    flops: float
    source: str


def peak(watch: Watch, dtype: Dtype, devices: Collection[Any]) -> Peak:
    """The peak of the devices: `watch.peak_flops`, or the data sheet's, or what is measured here.

    Args:
      dtype: what the model computes in.
      devices: JAX's, all of one kind, the first of them of this process; those that an array lies on are
        `array.devices()`. CPU devices are taken for one: what is measured is the whole machine.
    """
    device = next(iter(devices))
    if watch.peak_flops is not None:
        return Peak(watch.peak_flops * len(devices), "watch.peak_flops")
    kind = device.device_kind
    if (machine := MACHINES.get(kind)) is not None:
        # A TPU device is a chip or one core of it: the runtime decides.
        parts = getattr(device, "num_cores", machine.cores) / machine.cores
        flops = machine.flops if dtype == "bfloat16" else machine.float32 or machine.flops
        return Peak(flops * parts * len(devices), f"the data sheet of {kind}")
    size = 1024 if device.platform == "cpu" else 8192
    count = 1 if device.platform == "cpu" else len(devices)
    return Peak(measured(size, dtype, device) * count, f"measured: a {size} × {size} product in {dtype}")


def measured(size: int, dtype: Dtype, device: Any) -> float:
    """Operations a second of a product of two square matrices, the best of a few."""
    matrix = jax.device_put(jnp.ones((size, size), dtype), device)
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()  # compiles
    seconds = []
    for _ in range(5):
        since = perf_counter()
        product(matrix, matrix).block_until_ready()
        seconds.append(perf_counter() - since)
    return 2 * size**3 / min(seconds)
