"""What each program of a GPU kernel works through, as data: a whole line of blocks, or a chunk of a long one.

One line that is much longer than the others, as that of the first keys where every query sees them, or the
only one, as where one query decodes, would keep a single program busy while the card idles. Such a line is
cut into chunks, each in a slot with a program of its own; how many slots there are is static.
"""

import jax.numpy as jnp

from dynmask_jax.array_typing import Array, Int, pytree, static
from dynmask_jax.backends.gpu_lists import Lists

NOWHERE, IN_LINE, IN_SLOT = range(3)


@pytree
class Chunks:
    """For each place of a row, slots first and then the lines, the blocks that its programs work through.

    Attributes:
      columns, end: as in `Lists`.
      line: `[R, P]`, P = slots + L.
      full: where the chunk begins and where it ends among the line's full blocks, `[R, P]` each.
      test: likewise among those to test. Unused slots, and lines that are in slots, have no blocks.
      stores: `[R, P]`, where the results go: IN_LINE, IN_SLOT, or NOWHERE, at those same places.
    """

    columns: Int[Array, "R L places"]
    line: Int[Array, "R P"]
    full: tuple[Int[Array, "R P"], Int[Array, "R P"]]
    test: tuple[Int[Array, "R P"], Int[Array, "R P"]]
    stores: Int[Array, "R P"]
    end: int = static()


@pytree
class LongLines:
    """The lines that are cut into chunks, the longest first.

    Attributes:
      line: `[R, K]`, K as many as there can be.
      first: the first of its slots, `[R, K]`.
      count: how many slots it has, `[R, K]`; 0 where no further line is long.
    """

    line: Int[Array, "R K"]
    first: Int[Array, "R K"]
    count: Int[Array, "R K"]


def chunks_of(lists: Lists, budget: int, slots: int, most: int) -> tuple[Chunks, LongLines]:
    """The chunks of all lines, and which lines are in slots.

    Args:
      lists: of a plan's codes.
      budget: so many chunks, at most, make up all long lines of a row; 0 leaves every line whole.
      slots: `budget`, or as many blocks as a row has at most where those are fewer.
      most: lines that can be long, at most.
    """
    length = jnp.take_along_axis(lists.full + lists.test, lists.order, axis=1, mode="clip")
    # Of n > C blocks m = ⌈n/C⌉ < n/C + 1 < 2n/C chunks: all long lines have fewer than 2·Σn/C ≤ budget.
    total, of = length.sum(axis=1, keepdims=True, dtype=jnp.int32), max(budget, 1)
    size = 2 * (total // of) + _up(2 * (total % of), of)  # ⌈2·total/budget⌉, where 2·total may not fit int32
    size = jnp.maximum(1, size) if budget else length[:, :1]
    longest = length[:, :most]
    count = jnp.where(longest > size, _up(longest, size), 0)
    first = jnp.cumsum(count, axis=1, dtype=jnp.int32) - count
    long_lines = LongLines(lists.order[:, :most], first, count)
    return _chunks(lists, size, slots, long_lines), long_lines


def _up(n, by):
    """The quotient, rounded up."""
    return -(-n // by)


def _chunks(lists: Lists, size: Int[Array, "R 1"], slots: int, long_lines: LongLines) -> Chunks:
    """Of at most `size` blocks each, by place."""
    place = jnp.arange(slots + lists.order.shape[1], dtype=jnp.int32)[None, :]
    in_slot, (rank, chunk) = place < slots, _chunk_of_slot(long_lines, place)
    rank, chunk = jnp.where(in_slot, rank, place - slots), jnp.where(in_slot, chunk, 0)
    line = jnp.take_along_axis(lists.order, rank, axis=1, mode="clip")
    full, test = (jnp.take_along_axis(each, line, axis=1, mode="clip") for each in (lists.full, lists.test))
    used = place < long_lines.count.sum(axis=1, keepdims=True, dtype=jnp.int32)
    stores = jnp.where(in_slot, used, full + test <= size)
    count = jnp.where(in_slot, _up(full + test, jnp.maximum(1, size)), 1)

    def before(chunk):
        # Each chunk has its share of the full blocks, and is filled up to `size` with those to test.
        of_full = full * chunk // jnp.maximum(1, count)
        return jnp.where(stores, of_full, 0), jnp.where(stores, jnp.minimum(test, size * chunk - of_full), 0)

    (full_begin, test_begin), (full_end, test_end) = before(chunk), before(chunk + 1)
    bounds = (full_begin, full_end), (test_begin, test_end)
    kind = jnp.where(stores, jnp.where(in_slot, IN_SLOT, IN_LINE), NOWHERE).astype(jnp.int32)
    return Chunks(lists.columns, line, *bounds, kind, lists.end)


def _chunk_of_slot(long_lines: LongLines, slot: Int[Array, "1 S"]) -> tuple:
    """The rank of the slot's line, K for an unused slot, and the number of its chunk, `[R, S]` each."""
    count = long_lines.count[:, None, :]
    passed = (long_lines.first + long_lines.count)[:, None, :] <= slot[:, :, None]
    slots_passed = jnp.where(passed, count, 0).sum(axis=-1, dtype=jnp.int32)
    return passed.sum(axis=-1, dtype=jnp.int32), slot - slots_passed
