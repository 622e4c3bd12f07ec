"""AdamW, its learning rate, and the running mean of the weights: optax's, as a config asks for them."""

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from train.config import sections

DECAYED = ("kernel", "embedding", "lora_a", "lora_b")
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
    """The rate of an update, by the number n of updates before it, in a run of N `steps`.

    With W = max(1, round(warmup · N)), of several steps at most N − 1, and the peak P = learning_rate:

        n < W:  P · (n + 1) / W
        else:   P · (final + (1 − final) · (1 + cos(π · (n − W + 1) / (N − W))) / 2)

    So the first update has a rate above 0, update W − 1 the peak, and the last, N − 1, the final rate; in a
    run of one step it is the peak. A step that is skipped is no update: the rate waits for it.
    """
    peak = options.learning_rate
    warmup = min(max(1, round(steps * options.warmup)), max(1, steps - 1))
    if steps == 1:
        return optax.constant_schedule(peak)
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / warmup,
        peak_value=peak,
        warmup_steps=warmup - 1,
        decay_steps=steps - 1,
        end_value=peak * options.final,
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
