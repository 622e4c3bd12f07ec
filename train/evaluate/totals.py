"""Sums of losses over batches of rows, and their means by how much context a token has."""

from collections.abc import Callable, Iterable

import jax
import numpy as np

from train.data.batch import Batch
from train.step.state import Evaluated


def total(evaluate: Callable[[Batch], Evaluated], rows: Iterable[Batch]) -> Evaluated:
    """The sums over all rows, as NumPy arrays in float64."""
    # All are under way before the first is waited for.
    parts = jax.device_get([evaluate(batch) for batch in rows])
    return jax.tree.map(lambda *sums: np.sum(sums, axis=0, dtype=np.float64), *parts)


def mean(sums: Evaluated) -> float:
    """Nats a token."""
    return float(np.sum(sums.loss_sum) / np.sum(sums.weight))


def by_position(starts: tuple[int, ...], sums: Evaluated) -> dict[str, float]:
    """The mean loss of each bucket of `Masks.bucket_starts` that has targets, by its start."""
    return {
        str(start): float(loss / weight)
        for start, loss, weight in zip(starts, sums.loss_sum, sums.weight, strict=True)
        if weight > 0
    }
