"""What the kernels for Hopper share: a line's tiles brought in stages, and the launch over all lines.

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
from dynmask_jax.backends.gpu_chunks import IN_LINE, IN_SLOT
from dynmask_jax.backends.gpu_lines import Kernel, Layout, Line, Side, divided
from dynmask_jax.backends.kernel_tile import Numbers
from dynmask_jax.backends.mosaic import ROWS


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
            return add(_slot(layout, number), turn, real, result)

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


def launch_warpgroups(kernel: Kernel, operands: tuple, types: list) -> list:
    """The kernel's results, those that are partial after the others, as Mosaic GPU compiles it.

    Args:
      kernel: its layout's grain is `Warpgroups`.
      operands: chunks, numbers, and both sides, as `gpu_sweep` has them.
      types: of the results, `[B, T, N, H]` and `[B, T, N]`.
    """
    chunks, numbers, lines, columns = operands
    lines, columns = map(_by_heads, (lines, columns))
    layout, (batch, _, heads, *_) = kernel.layout, types[0].shape
    streams = _streams(columns)
    results = [jax.ShapeDtypeStruct(_swapped(x.shape), x.dtype) for x in types]
    program = _Program(kernel, _reused(results, lines), max(1, _heads(columns) // heads))
    groups = layout.line.tile // ROWS
    grid = layout.programs, heads, batch
    scratch = _scratch(program, lines, streams, results)
    made = mosaic.Launch(program.run, kernel.name, grid, groups, results, scratch)
    found = mosaic.launch(made, (chunks, numbers, lines, streams))
    return [x.swapaxes(1, 2) if x.ndim == 3 else x for x in found]


def _by_heads(side: Side) -> Side:
    """A side whose words and arrays `[B, T, N]` are `[B, N, T]`: vectors that lie side by side in memory."""

    def swapped(x):
        return x.swapaxes(1, 2) if x.ndim == 3 else x

    return Side(side.tokens, *(tuple(map(swapped, xs)) for xs in (side.words, side.arrays)))


def _swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if len(shape) == 4 else (shape[0], shape[2], shape[1])


def _streams(columns: Side) -> tuple[Side, tuple]:
    half = len(columns.arrays) // 2
    return Side(columns.tokens, columns.words, columns.arrays[:half]), columns.arrays[half:]


def _slot(layout: Layout, number):
    """The stage of a tile."""
    return divided(number, layout.grain.stages)[1]


def _reused(results: list, lines: Side) -> dict[int, int]:
    """Results -> arrays of the line in whose shared memory they leave: no tile is left that reads these."""
    kinds = [(x.shape[3:], x.dtype) if x.ndim == 4 else None for x in lines.arrays]
    found = {}
    for number, x in enumerate(results):
        kind = (x.shape[3:], x.dtype)
        place = next((n for n, each in enumerate(kinds) if each == kind and n not in found.values()), None)
        if len(x.shape) == 4 and place is not None:
            found[number] = place
    return found


def _scratch(program: "_Program", lines: Side, streams: tuple, results: list) -> dict:
    """Shared memory and barriers of a program."""
    layout = program.kernel.layout
    groups, stages = layout.line.tile // ROWS, layout.grain.stages

    def of_stage(x):
        return mosaic.shared((stages, layout.column.tile, *x.shape[3:]), x.dtype)

    def of_group(x):
        return mosaic.shared((groups, ROWS, *x.shape[3:]), x.dtype)

    whole = results[: program.whole(results)]
    gates = [
        mosaic.barriers(stages, arrivals)
        for stream in streams
        for arrivals in (len(jax.tree.leaves(stream)), groups)
    ]
    return {
        "lines": jax.tree.map(of_group, lines),
        "streams": jax.tree.map(of_stage, streams),
        "results": [None if n in program.reused else of_group(x) for n, x in enumerate(whole)],
        "gates": gates,
        "own": mosaic.barriers(groups, len(jax.tree.leaves(lines))),
        "order": mosaic.barriers(1, groups) if groups > 1 else None,
    }


@dataclass(frozen=True)
class _Program:
    """What a program does: all its warpgroups.

    Attributes:
      kernel: it.
      reused: as `_reused` gives.
      times: how many heads of the columns belong to one of the lines; 1 where it is the other way round.
    """

    kernel: Kernel
    reused: dict[int, int]
    times: int

    def whole(self, results) -> int:
        """How many of the results are of whole lines; as many others are of chunks, or none."""
        merges = self.kernel.merged is not None and self.kernel.layout.slots > 0
        return len(results) // (2 if merges else 1)

    def run(self, program: tuple, operands: tuple, results: list, scratch: dict):
        """The kernel's body."""
        (number, head, row), (chunks, numbers, lines, streams) = program, operands
        at_row = jax.tree.map(lambda ref: ref.at[_row(ref, row)], chunks)
        layout, gates = self.kernel.layout, scratch["gates"]

        def turns():
            # Each role reads it anew: what both know would take registers that the one that brings has not.
            return Turns.of(Line.of((number, head), at_row, layout), self.times)

        group = max(1, _heads(lines) // _heads(streams))

        def sources(refs, turn, tokens):
            # Of the columns' heads the one that the line's belongs to, or, by turns, all that belong to it.
            own = lax.div(head, jnp.int32(group)) if group > 1 else head * self.times + turn
            return jax.tree.map(lambda ref: _of_head(ref, row, own, tokens), refs)

        come = [
            Stream(functools.partial(sources, refs), buffers, gates[2 * n], gates[2 * n + 1])
            for n, (refs, buffers) in enumerate(zip(streams, scratch["streams"], strict=True))
        ]

        def compute(group):
            own = turns()
            line = own.line
            tokens = pl.ds(line.start + group * ROWS, ROWS)
            mine = jax.tree.map(lambda buffer: buffer.at[group], scratch["lines"])
            gate = scratch["own"].at[group]
            of_line = jax.tree.map(lambda ref: _of_head(ref, row, head, tokens), lines)
            jax.tree.map(lambda source, buffer: mosaic.bring(source, buffer, gate), of_line, mine)
            mosaic.wait(gate)
            order = None if scratch["order"] is None else scratch["order"].at[0]
            values = self.kernel.body(Worker(group, line, own, numbers, mine, come[0], come[1], order))
            buffers = [
                mine.arrays[self.reused[n]] if n in self.reused else buffer.at[group]
                for n, buffer in enumerate(scratch["results"])
            ]
            self._store(line, group, values, buffers, [_Target(ref, row, head) for ref in results])

        mosaic.roles(layout.line.tile // ROWS, compute, lambda: _bring(turns(), come))

    def _store(self, line: Line, group, values, buffers, targets: list["_Target"]):
        """A line's values go to the first results; those of a slot to the others, the partial ones."""
        chunks, layout, count = line.chunks, line.layout, self.whole(targets)

        def whole():
            pairs = []
            for value, buffer, target in zip(values, buffers, targets[:count], strict=True):
                buffer[...] = value.astype(buffer.dtype)
                pairs.append((buffer, target.at(pl.ds(line.start + group * ROWS, ROWS))))
            mosaic.send(pairs)

        def partial():
            rows = pl.ds(line.program * layout.line.tile + group * ROWS, ROWS)
            for value, target in zip(values, targets[count:], strict=True):
                mosaic.store(target.at(rows), value)

        if count == len(targets):
            whole()
            return
        pl.when(chunks.stores[line.place] == IN_LINE)(whole)
        pl.when(chunks.stores[line.place] == IN_SLOT)(partial)


def _bring(turns: Turns, streams: list[Stream]):
    """What the warpgroup does that does not compute."""
    layout = turns.line.layout

    def step(number, _):
        turn, block, part = turns.place(number)
        tokens = pl.ds(layout.column.place(block, part), layout.column.tile)
        for stream in streams:
            stream.bring(_slot(layout, number), turn, tokens, again=number >= layout.grain.stages)

    def drain(number, _):
        for stream in streams:
            mosaic.wait(stream.free.at[_slot(layout, number)])

    lax.fori_loop(0, turns.all, step, None)
    # Nobody leaves while a barrier has yet to open.
    lax.fori_loop(jnp.maximum(turns.all - layout.grain.stages, 0), turns.all, drain, None)


@dataclass(frozen=True)
class _Target:
    """Where results of one row and head go."""

    ref: Any
    row: Any
    head: Any

    def at(self, tokens):
        """Of these tokens."""
        return _of_head(self.ref, self.row, self.head, tokens)


def _of_head(ref, row, head, tokens):
    """One row and head of `[R, T]`, `[B, N, T]` or `[B, T, N, H]`."""
    row = _row(ref, row)
    if len(ref.shape) == 2:
        return ref.at[row, tokens]
    return ref.at[row, head, tokens] if len(ref.shape) == 3 else ref.at[row, tokens, head]


def _row(ref, row):
    """The row of a plan for a sequence: its own, or the one for all."""
    return 0 if ref.shape[0] == 1 else row


def _heads(side) -> int:
    """Of a side's arrays."""
    return next(x.shape[2] for x in jax.tree.leaves(side) if len(x.shape) == 4)
