"""What the full mask shows of a batch, counted without looking at a pair: what exposure is a share of."""

import jax.numpy as jnp

from dynmask_jax.array_typing import Array, Float
from train.config.run import Run
from train.config.sections import Reach
from train.data.batch import Batch
from train.data.tasks import task_of


def full_pairs(run: Run, batch: Batch) -> dict[Reach, Float[Array, ""]]:
    """Visible pairs of one layer of each reach in the pattern, at the full mask, over all rows.

    Each token sees itself and those before it in its document, at most `local_window` in a local
    layer. Where a document's tokens see each other both ways, each of these pairs counts twice, but a
    token and itself once.
    """
    if run.data.rows == "chunked":
        length = batch.inputs.shape[1]
        before, real = jnp.broadcast_to(jnp.arange(length), batch.inputs.shape), jnp.asarray(True)
    else:
        before, real = batch.context, batch.segments > 0
    ahead = task_of(run).visible_ahead(run)
    both_ways = batch.positions < ahead if ahead else jnp.asarray(False)
    windows: dict[Reach, int] = {"global": run.data.length, "local": run.model.local_window}

    def pairs(window: int):
        seen = jnp.minimum(before + 1, window).astype(jnp.float32)
        return jnp.where(real, jnp.where(both_ways, 2 * seen - 1, seen), 0.0).sum()

    return {reach: pairs(windows[reach]) for reach in set(run.model.pattern)}
