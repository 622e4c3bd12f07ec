"""The codes of a plan's blocks: what they mean, a loop over those of one code, and their picture."""

import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dynmask_jax.array_typing import Array, Int
from dynmask_jax.vma import vary_like

SKIP, TEST, FULL = 0, 1, 2
ACTIVE = TEST, FULL


def over_blocks(codes: Int[Array, " blocks"], wanted: tuple[int, ...], add: Callable, start):
    """Folds `add(block, result) -> result` over the blocks of one line with a wanted code, in order.

    One line is a row or a column of a plan's codes. Blocks of other codes cost nothing but a look at
    the line, which is cheap beside a block of attention: lists of the active blocks, made beforehand,
    took ten times as long to make as the codes themselves (383 ms against 30 at a million tokens).
    """
    place = jnp.arange(codes.shape[0], dtype=jnp.int32)

    def first(least):
        left = jnp.where(place >= least, codes, -1)
        found = functools.reduce(operator.or_, (left == code for code in wanted))
        return jnp.min(jnp.where(found, place, codes.shape[0]))

    def body(state):
        block, result = state
        return first(block + 1), add(block, result)

    start = vary_like(start, codes)
    return jax.lax.while_loop(lambda state: state[0] < codes.shape[0], body, (first(0), start))[1]


def picture(codes: Int[np.ndarray, "Tb Sb"]) -> list[str]:
    """A line of text for each line of blocks: `.` skip, `+` test, `#` full."""
    return ["".join(".+#"[code] for code in line) for line in _shrunk(codes)]


def _shrunk(codes, most: int = 64):
    """At most 64 x 64 cells; a cell that stands for several blocks is skip or full where all are."""
    for axis in (0, 1):
        groups = np.array_split(codes, min(most, codes.shape[axis]), axis=axis)
        low, high = (np.stack([f(g, axis=axis) for g in groups], axis=axis) for f in (np.min, np.max))
        codes = np.where(low == high, low, TEST)
    return codes
