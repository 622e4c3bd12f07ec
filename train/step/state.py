"""What training changes, and what its steps report: the records that `train.step.program` makes."""

import optax

from dynmask_jax.array_typing import Array, Float, Int, pytree
from train.config.sections import Reach
from train.step.pace import Pace


@pytree
class State:
    """What training changes: all of it but the place in the data.

    Attributes:
      step: how many steps have been done, which is also the number of the next: int32.
      params: the weights, a dictionary of arrays.
      optimizer: optax's state, an `optax.ApplyIfFiniteState`.
      ema: a running mean of the weights; None where the run has none.
      pace: of a curriculum that the loss moves.
      key: the data of the run's random key, uint32: `jax.random.wrap_key_data`.
    """

    step: Int[Array, ""]
    params: optax.Params
    optimizer: optax.OptState
    ema: optax.Params | None
    pace: Pace
    key: Array


@pytree
class Metrics:
    """What a train step reports.

    Attributes:
      loss: mean over the batch's weights, nats a token, without the z-loss.
      weight: tokens in the loss.
      tokens: tokens that are not padding.
      exposure: visible pairs of all layers ÷ those at the full mask, 0…1.
      window: tokens of the window or chunk.
      pairs: of each reach, visible pairs of one layer (the mean over its heads), over all rows.
      gradient_norm: before it is clipped.
      learning_rate: of this step.
      hops: how often keys and values went on to the next device of the context axis, in a forward pass of
        the layers where they went farthest.
      bytes_moved: that a device sent, keys and values in the forward passes of all layers.
      skipped: steps so far whose loss or gradient was not finite, which changed no weight.
      skipped_in_a_row: of these, how many since the last step that was not.
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
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
    """Losses of a batch, by how many tokens of its document come before each: `Masks.bucket_starts`.

    Attributes:
      loss_sum: weighted, in nats. weight: what it is to be divided by. Both `[buckets]`.
    """

    loss_sum: Float[Array, " buckets"]
    weight: Float[Array, " buckets"]
