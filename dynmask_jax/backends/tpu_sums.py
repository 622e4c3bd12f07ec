"""Sums over lines, a block for each column: they lie in HBM, and a kernel adds to one at a time in VMEM.

A kernel along lines of keys comes back to a block of queries with every line of keys that it sees. It
reads the block's sum, adds to it and writes it back, while it computes: of the buffers in VMEM one is
added to while others are written and one is read for the next step. The flat list alone decides in
which order a sum is added up, so the result is the same each time.

A *turn* is one such round trip: a step, or several that add to the same sum one after the other. The
list numbers the turns, and marks those whose sum was written two turns before: what they read must have
arrived, and nothing but the list need be asked to know it.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dynmask_jax.array_typing import Array, Int, pytree

_BUFFERS = 4
"""One is added to, one is being read and two may be on their way to HBM. Three at a time are in use, and
the fourth is there because scalar units divide by 4 in one cycle, and by 3 in twenty."""
_WRITES = 2


def turns(column: Int[Array, " n"], group: int) -> tuple[Int[Array, " n"], ...]:
    """The number of each entry's turn, whether the turn is new, and whether its sum was written two before.

    Args:
      column: of the entries of the flat list.
      group: how many sums of a column each entry adds to, one after the other: then `turn` is that of the
        first of them, the others follow, and all have the other two in common.
    """
    n = column.shape[0]
    changes = (column != jnp.roll(column, 1)).at[0].set(True)
    if group > 1:
        turn = jnp.arange(n, dtype=jnp.int32) * group
        return turn, jnp.ones(n, bool), jnp.logical_not(changes) & (group == 2)
    turn = jnp.cumsum(changes, dtype=jnp.int32) - 1
    columns = jnp.zeros(n, column.dtype).at[turn].set(column)
    return turn, changes, (turn >= 2) & (columns[turn - 2] == column)


@pytree
class Buffers:
    """Where sums are while a kernel adds to them.

    Attributes:
      blocks: `[4, *block]` in vector memory.
      reads, writes: semaphores of the copies from and to HBM, `[4]`.
    """

    blocks: Any
    reads: Any
    writes: Any

    @classmethod
    def of(cls, block) -> "Buffers":
        """The scratch of a kernel whose sums are blocks of this shape and dtype."""
        copies = pltpu.SemaphoreType.DMA((_BUFFERS,))
        return cls(pltpu.VMEM((_BUFFERS, *block.shape), block.dtype), copies, copies)


@dataclasses.dataclass(frozen=True)
class Turn:
    """What a step of a kernel does to sums: its turn's number, and where its sum lies in HBM."""

    number: Array
    new: Array
    recent: Array
    head: Array
    column: Array

    def buffer(self, before: int = 0):
        """Which of the buffers it uses, or the turn does that many turns before."""
        return (self.number - before) & (_BUFFERS - 1)


@dataclasses.dataclass(frozen=True)
class Sums:
    """The sums as one step of a kernel sees them, inside the kernel.

    A step calls `begin`, then may `add`, then calls `end`.

    Attributes:
      array: `[O, heads, C, *block]` in HBM, read and written.
      outer: which o the step works on.
      now, following: the turns of this step and of the next.
      first, last: whether the step is the first, or the last, of its o and its line's head.
    """

    array: Any
    buffers: Buffers
    outer: Array
    now: Turn
    following: Turn
    first: Array
    last: Array

    @classmethod
    def of_step(cls, array, buffers: Buffers, active) -> "Sums":
        """Those of the step `(o, head, entry, inner)` of the grid that is being computed."""
        outer, head, entry, inner = (pl.program_id(axis) for axis in range(4))
        entries, group = pl.num_programs(2), pl.num_programs(3)
        ends = inner == group - 1
        last = ends & (entry == entries - 1)
        after = jnp.where(ends & jnp.logical_not(last), entry + 1, entry), jnp.where(ends, 0, inner + 1)

        def turn(entry, inner):
            number, new, recent = active.turn(entry)
            return Turn(number + inner, new, recent, head * group + inner, active.column[entry])

        first = (entry == 0) & (inner == 0)
        return cls(array, buffers, outer, turn(entry, inner), turn(*after), first, last)

    @property
    def _moves_on(self):
        return self.following.number != self.now.number

    def begin(self):
        """Waits until this step's sum is there, and lets that of the next step be read."""
        pl.when(self.first)(self._copy(self.now, read=True).start)
        pl.when(self.now.new)(self._copy(self.now, read=True).wait)
        on = jnp.logical_not(self.last) & self._moves_on
        writing = (self.following.number > _WRITES) & jnp.logical_not(self.now.recent)
        pl.when(on & writing)(self._written(self.following, _WRITES + 1).wait)
        pl.when(on & self.following.recent)(self._written(self.following, 2).wait)
        pl.when(on)(self._copy(self.following, read=True).start)

    def add(self, block):
        """Adds to this step's sum."""
        self.buffers.blocks[self.now.buffer()] += block

    def end(self):
        """Lets the sum be written, unless the next step adds to it too; after the last step, all of them."""
        number = self.now.number
        pl.when(self.last | self._moves_on)(self._written(self.now).start)

        @pl.when(self.last)
        def _():
            pl.when((number >= 2) & jnp.logical_not(self.now.recent))(self._written(self.now, 2).wait)
            pl.when(number >= 1)(self._written(self.now, 1).wait)
            self._written(self.now).wait()

    def _written(self, turn: Turn, before: int = 0):
        return self._copy(turn, read=False, before=before)

    def _copy(self, turn: Turn, *, read: bool, before: int = 0):
        """A copy of the turn's sum. To be waited for, of that of a turn before: all are of one size."""
        at = turn.buffer(before)
        far, near = self.array.at[self.outer, turn.head, turn.column], self.buffers.blocks.at[at]
        if read:
            return pltpu.make_async_copy(far, near, self.buffers.reads.at[at])
        return pltpu.make_async_copy(near, far, self.buffers.writes.at[at])
