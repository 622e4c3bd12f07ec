"""AdamW, its learning rate, and the running mean of the weights: optax's, as a config asks for them."""

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from train.config import sections

DECAYED = ("kernel", "embedding")
"""The names of weights that are matrices. The scales of norms are vectors, though stacked over layers."""


def make_optimizer(options: sections.Optimizer, steps: int) -> optax.GradientTransformation:
    """What a run trains with: AdamW with clipping, warm-up and cosine decay over a run of `steps`.

    An update whose gradient is not finite changes nothing but the counts of such updates in the state
    (`optax.ApplyIfFiniteState`); the learning rate's count stays too.
    """
    matrices = lambda params: jax.tree.map_with_path(lambda path, _: _name(path) in DECAYED, params)  # noqa: E731
    rate = learning_rate(options, steps)
    chain = optax.chain(
        optax.clip_by_global_norm(options.clip),
        optax.adamw(rate, b2=options.beta2, weight_decay=options.weight_decay, mask=matrices),
    )
    # The loop decides when to give up; optax would apply the update.
    return optax.apply_if_finite(chain, max_consecutive_errors=np.iinfo(np.int32).max)


def learning_rate(options: sections.Optimizer, steps: int) -> optax.Schedule:
    """The rate of an update, by the number of updates before it: up from 0, then down a cosine."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=options.learning_rate,
        warmup_steps=min(round(steps * options.warmup), steps - 1),
        decay_steps=steps,
        end_value=options.learning_rate * options.final,
    )


def running_mean(options: sections.Optimizer, params: optax.Params, mean, finite, updates):
    """The running mean of the weights after an update; None where `optimizer.ema` is None.

    Args:
      options: the section `optimizer` of the config.
      params: the weights after the update.
      mean: the mean before it.
      finite: whether the update was finite; else the mean stays as it is.
      updates: how many there were before.
    """
    if options.ema is None:
        return None
    # Short at first, as TensorFlow's moving averages: else the first weights stay in it for long.
    count = jnp.asarray(updates).astype(jnp.float32)
    decay = jnp.minimum(options.ema, (1 + count) / (10 + count))
    new = optax.incremental_update(params, mean, 1 - decay)
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, mean)


def skips(state: optax.OptState) -> optax.ApplyIfFiniteState:
    """The state of `make_optimizer`'s, as the record that counts the updates that were not finite."""
    return cast(optax.ApplyIfFiniteState, state)


def _name(path) -> str:
    """The last name of a weight's path."""
    return getattr(path[-1], "key", "")
