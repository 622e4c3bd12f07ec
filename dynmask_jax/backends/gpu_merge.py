"""The partial results of a long line's chunks become its result: a small kernel after the one that made them.

Chunks are taken in order and no two programs store to one place: results are the same bit for bit from run
to run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dynmask_jax.backends.gpu_blocks import LEAST
from dynmask_jax.backends.gpu_chunks import LongLines
from dynmask_jax.backends.gpu_lines import divided, store_rows
from dynmask_jax.backends.tile_expressions import strongly_typed
from dynmask_jax.online_softmax import Partial, merge, normalize

ROWS = LEAST
"""Rows that a program merges: every filled block has a multiple of them."""


@dataclass(frozen=True)
class _Slots:
    """In a kernel: some rows of each of a long line's slots.

    Attributes:
      first: the first of them, in the first slot.
      count: slots.
      height: rows of a slot.
    """

    first: Any
    count: Any
    height: int

    def each(self, add: Callable, start):
        """Folds `add(rows, result) -> result` over the slots, in order."""

        def step(n, result):
            return add(pl.ds(self.first + n * self.height, ROWS), result)

        return lax.fori_loop(0, self.count, step, start)


def merge_rows(program: tuple, long_lines: LongLines, partial: list, before: list, *results, merged, height):
    """The kernel: `merged(slots, partial)` gives what is stored of a long line, in place of what is there."""
    del before
    rank, piece = divided(program[0], height // ROWS)
    slots = _Slots(long_lines.first[rank] * height + piece * ROWS, long_lines.count[rank], height)
    rows = pl.ds(long_lines.line[rank] * height + piece * ROWS, ROWS)
    values = merged(slots, partial)
    pl.when(slots.count > 0)(lambda: store_rows(results, rows, values))


def merged_softmax(slots: _Slots, partial: list):
    """Out and lse over the keys of all chunks."""
    out, lse = partial

    def add(rows, found):
        return strongly_typed(_with_chunk, found, out[rows, :], lse[rows])

    return normalize(slots.each(add, Partial.empty((ROWS, out.shape[1]), jnp.float32)))


def _with_chunk(found: Partial, out, lse) -> Partial:
    return merge(found, Partial.of(out, lse))


def merged_sums(slots: _Slots, partial: list):
    """The sums of all chunks, one after the other."""
    return [
        slots.each(lambda rows, total, ref=ref: total + ref[rows, :], jnp.zeros((ROWS, ref.shape[1])))
        for ref in partial
    ]
