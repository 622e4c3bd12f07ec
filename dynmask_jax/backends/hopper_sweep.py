"""The launch of a kernel for Hopper over all lines of a plan: shared memory, and who does what in it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dynmask_jax.backends import mosaic
from dynmask_jax.backends.gpu_chunks import IN_LINE, IN_SLOT
from dynmask_jax.backends.gpu_lines import Kernel, Line, Share, Side
from dynmask_jax.backends.hopper_lines import Stream, Turns, Worker, stage_of
from dynmask_jax.backends.mosaic import ROWS


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
    program = _Program(kernel, _reused(results, lines))
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
    """

    kernel: Kernel
    reused: dict[int, int]

    def whole(self, results) -> int:
        """How many of the results are of whole lines; as many others are of chunks, or none."""
        return len(results) // (2 if self.kernel.merges else 1)

    def run(self, program: tuple, operands: tuple, results: list, scratch: dict):
        """The kernel's body."""
        (place, head, row), (chunks, numbers, lines, streams) = program, operands
        at_row = jax.tree.map(lambda ref: ref.at[_row(ref, row)], chunks)
        layout, gates = self.kernel.layout, scratch["gates"]

        def turns():
            # Each role reads it anew: what both know would take registers that the one that brings has not.
            return Turns.of(Line.of((place, head), at_row, layout), share.times)

        share = Share(_heads(lines), _heads(streams))

        def sources(refs, turn, tokens):
            # Of the columns' heads the one that the line's belongs to, or, by turns, all that belong to it.
            own = share.block(head) * share.times + turn
            return jax.tree.map(lambda ref: _of_head(ref, row, own, tokens), refs)

        come = [
            Stream(functools.partial(sources, refs), buffers, gates[2 * n], gates[2 * n + 1])
            for n, (refs, buffers) in enumerate(zip(streams, scratch["streams"], strict=True))
        ]

        def compute(number):
            own = turns()
            line = own.line
            tokens = pl.ds(line.start + number * ROWS, ROWS)
            mine = jax.tree.map(lambda buffer: buffer.at[number], scratch["lines"])
            gate = scratch["own"].at[number]
            of_line = jax.tree.map(lambda ref: _of_head(ref, row, head, tokens), lines)
            jax.tree.map(lambda source, buffer: mosaic.bring(source, buffer, gate), of_line, mine)
            mosaic.wait(gate)
            order = None if scratch["order"] is None else scratch["order"].at[0]
            values = self.kernel.body(Worker(number, line, own, numbers, mine, come[0], come[1], order))
            buffers = [
                mine.arrays[self.reused[n]] if n in self.reused else buffer.at[number]
                for n, buffer in enumerate(scratch["results"])
            ]
            targets = [functools.partial(_of_head, ref, row, head) for ref in results]
            self._store(line, number, values, buffers, targets)

        mosaic.roles(layout.line.tile // ROWS, compute, lambda: _bring(turns(), come))

    def _store(self, line: Line, number, values, buffers, targets: list[Callable]):
        """A line's values go to the first results; those of a slot to the others, the partial ones."""
        chunks, layout, count = line.chunks, line.layout, self.whole(targets)

        def whole():
            pairs = []
            for value, buffer, target in zip(values, buffers, targets[:count], strict=True):
                buffer[...] = value.astype(buffer.dtype)
                pairs.append((buffer, target(pl.ds(line.start + number * ROWS, ROWS))))
            mosaic.send(pairs)

        def partial():
            rows = pl.ds(line.program * layout.line.tile + number * ROWS, ROWS)
            for value, target in zip(values, targets[count:], strict=True):
                mosaic.store(target(rows), value)

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
            stream.bring(stage_of(layout, number), turn, tokens, again=number >= layout.grain.stages)

    def drain(number, _):
        for stream in streams:
            mosaic.wait(stream.free.at[stage_of(layout, number)])

    lax.fori_loop(0, turns.all, step, None)
    # Nobody leaves while a barrier has yet to open.
    lax.fori_loop(jnp.maximum(turns.all - layout.grain.stages, 0), turns.all, drain, None)


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
