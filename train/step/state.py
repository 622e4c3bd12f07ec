"""The state of training, and what its steps report: the records that `train.step.program` makes."""

import math
from dataclasses import field

import optax

from dynmask_jax.array_typing import Array, Float, Int, pytree
from train.config.sections import Reach
from train.step.pace import Pace


@pytree
class State:
    """The state of training: everything but the position in the data.

    Attributes:
      step: the number of steps done, which is also the number of the next step: int32.
      params: the weights that train, nested dictionaries of arrays.
      optimizer: optax's state, an `optax.ApplyIfFiniteState`.
      ema: the running mean of the weights that train; None where the run has none.
      pace: the progress of a curriculum that the validation loss moves.
      key: the data of the run's random key, uint32: `jax.random.wrap_key_data`.
      frozen: the other weights, which no step changes; an empty dictionary where all train.
    """

    step: Int[Array, ""]
    params: optax.Params
    optimizer: optax.OptState
    ema: optax.Params | None
    pace: Pace
    key: Array
    frozen: optax.Params = field(default_factory=dict)


@pytree
class Metrics:
    """What a train step reports.

    Attributes:
      loss: the weighted mean, nats a token, without the z-loss.
      weight: the number of tokens in the loss.
      text_bytes: the bytes of text that these tokens spell.
      tokens: the number of tokens that are not padding.
      exposure: visible pairs of all layers ÷ those at the full mask, 0…1.
      window: tokens of the window or chunk.
      pairs: for each reach, visible pairs of one layer (the mean over its heads), over all rows.
      gradient_norm: before it is clipped.
      learning_rate: of this step.
      hops: how often keys and values were sent to the next device of the context axis, in a forward pass of
        the layers that sent them farthest.
      bytes_moved: keys and values that a device sent, in the forward passes of all layers.
      skipped: the number of steps so far that were skipped because the loss or gradient was not finite.
      skipped_in_a_row: the number of these since the last step that was not skipped.
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    text_bytes: Int[Array, ""]
    tokens: Int[Array, ""]
    exposure: Float[Array, ""]
    window: Array
    pairs: dict[Reach, Float[Array, ""]]
    gradient_norm: Float[Array, ""]
    learning_rate: Array
    hops: Int[Array, ""]
    bytes_moved: Float[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]


@pytree
class Evaluated:
    """Losses of a batch, by the number of tokens of the same document before each: `Masks.bucket_starts`.

    Attributes:
      loss_sum: weighted, in nats, `[buckets]`.
      weight: the sum of the weights, `[buckets]`.
      text_bytes: the bytes of text that the targets of weight above 0 spell, `[buckets]`.
    """

    loss_sum: Float[Array, " buckets"]
    weight: Float[Array, " buckets"]
    text_bytes: Int[Array, " buckets"]


def bits_per_byte(nats: float, text_bytes: float) -> float:
    """Nats of scored targets, in bits, over the bytes that the same targets spell; NaN where these are 0.

    It compares models of different tokenizers: Gao et al. 2020, "The Pile", arXiv:2101.00027, section 3.1.
    """
    return float(nats) / math.log(2) / float(text_bytes) if text_bytes else math.nan
