"""What the kernels for Hopper share: a line's tiles that come in stages, and a warpgroup that computes.

Lines and columns are as in `gpu_lines`. Of a program's tile each warpgroup that computes has 64 tokens; one
more brings the tiles of the columns into shared memory, some of them ahead.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dynmask_jax.backends import mosaic
from dynmask_jax.backends.gpu_lines import Layout, Line, Side, divided
from dynmask_jax.backends.kernel_tile import Numbers


@dataclass(frozen=True)
class Stream:
    """Parts of the columns' tiles that come together: in a few stages, each used again and again.

    Attributes:
      sources: of a tile, where it is in memory: `(turn, tokens) -> refs`.
      buffers: refs in that structure, of shared memory, `[stages, …]`.
      full, free: barriers, one a stage: that it has come, that all warpgroups have done with it.
    """

    sources: Callable
    buffers: Any
    full: Any
    free: Any

    @property
    def width(self) -> int:
        """Of its first matrices."""
        return next(x.shape[-1] for x in jax.tree.leaves(self.buffers) if len(x.shape) == 3)

    def bring(self, slot, turn, tokens, *, again):
        """Begins to fill a stage, once it is free again."""
        pl.when(again)(lambda: mosaic.wait(self.free.at[slot]))
        copy = functools.partial(mosaic.bring, barrier=self.full.at[slot])
        sources = self.sources(turn, tokens)
        jax.tree.map(lambda source, buffer: copy(source, buffer.at[slot]), sources, self.buffers)

    def arrived(self, slot):
        """The tile in a stage, as soon as it is there."""
        mosaic.wait(self.full.at[slot])
        return jax.tree.map(lambda buffer: buffer.at[slot], self.buffers)

    def done(self, slot):
        """This warpgroup has done with a stage."""
        mosaic.arrive(self.free.at[slot])


@dataclass(frozen=True)
class Turns:
    """The tiles of a program's blocks, one after another; those of full blocks come first.

    Attributes:
      line: the line.
      times: how often each tile comes, for turn 0, 1, ….
      first_full, first_test: where the blocks begin among the line's full ones, and among those to test.
      full_blocks: how many of the first kind there are.
      full, all: how many tiles there are, turns counted.
    """

    line: Line
    times: int
    first_full: Any
    first_test: Any
    full_blocks: Any
    full: Any
    all: Any

    @classmethod
    def of(cls, line: Line, times: int) -> "Turns":
        """Of a line."""
        chunks, each = line.chunks, line.layout.column.tiles * times
        first_full, first_test = chunks.full[0][line.place], chunks.test[0][line.place]
        full, test = chunks.full[1][line.place] - first_full, chunks.test[1][line.place] - first_test
        return cls(line, times, first_full, first_test, full, full * each, (full + test) * each)

    def place(self, number):
        """Of a tile: its turn, its block, and its part of the block."""
        line, chunks = self.line, self.line.chunks
        rest, turn = divided(number, self.times)
        at, part = divided(rest, line.layout.column.tiles)
        test = chunks.end - 1 - self.first_test - (at - self.full_blocks)
        place = jnp.where(at < self.full_blocks, self.first_full + at, test)
        return turn, chunks.columns[line.block, place], part


@dataclass(frozen=True)
class Worker:
    """In a kernel: a warpgroup that computes, and what it has.

    Attributes:
      number: of the warpgroup.
      line, turns: of the program.
      numbers: refs.
      lines: refs to the warpgroup's own tokens of the line, in shared memory; arrays are `[64, H]`.
      first, second: streams of the columns: tokens, words and the first half of the arrays; the other half.
      order: a barrier at which the warpgroups take turns, or None where there is but one.
    """

    number: Any
    line: Line
    turns: Turns
    numbers: Numbers
    lines: Side
    first: Stream
    second: Stream
    order: Any

    def each(self, add: Callable, start):
        """Folds `add(slot, turn, real, result) -> result` along the line.

        `real` is None in full blocks; in others it says which places of the tile hold a token, True where
        all do.
        """
        layout, turns = self.line.layout, self.turns

        def step(number, result, *, test: bool):
            turn, block, part = turns.place(number)
            real = layout.column.real(block, part) if test else None
            return add(stage_of(layout, number), turn, real, result)

        start = lax.fori_loop(0, turns.full, functools.partial(step, test=False), start)
        return lax.fori_loop(turns.full, turns.all, functools.partial(step, test=True), start)

    def switch(self):
        """Lets the other warpgroup have the tensor cores, and waits for its turn."""
        if self.order is not None:
            mosaic.arrive(self.order)
            mosaic.wait(self.order)

    def switch_if(self, number: int):
        """`switch`, of one warpgroup alone."""
        pl.when(self.number == number)(self.switch)


def stage_of(layout: Layout, number):
    """The stage of a tile."""
    return divided(number, layout.grain.stages)[1]
