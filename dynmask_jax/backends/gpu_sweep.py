"""The launch of a GPU kernel over all lines of a plan, and of what merges long lines after it."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dynmask_jax.backends.gpu_blocks import filled_size
from dynmask_jax.backends.gpu_chunks import LongLines, chunks_of
from dynmask_jax.backends.gpu_lines import Kernel, Layout, Line, Share, Side
from dynmask_jax.backends.gpu_lists import Lists
from dynmask_jax.backends.gpu_merge import ROWS, merge_rows
from dynmask_jax.backends.gpu_options import Grain
from dynmask_jax.backends.hopper_sweep import launch_warpgroups
from dynmask_jax.backends.kernel_tile import Numbers, scalars
from dynmask_jax.backends.triton import Launch, launch


def sweep(kernel: Kernel, lists: Lists, numbers: Numbers, lines: Side, columns: Side, results: list) -> list:
    """Runs the kernel over all lines, for each head of theirs: arrays of the results' types, `[B, T, N, …]`.

    Of the columns' heads a program gets the one that its own head belongs to, or, where they are more, all
    that belong to it, `[T, G, …]`.
    """
    layout, rows = kernel.layout, lists.full.shape[0]
    chunks, long_lines = chunks_of(lists, layout.budget, layout.slots, layout.long_lines)
    types = [*results, *(_partial(layout, each) for each in results)] if kernel.merges else results
    launched = _launched if isinstance(layout.grain, Grain) else launch_warpgroups
    found = launched(kernel, (chunks, jax.tree.map(scalars, numbers), lines, columns), types)
    if not kernel.merges:
        return found
    partial, found = found[len(results) :], found[: len(results)]
    return _merge(kernel, _Specs(rows, results[0].shape[2]), long_lines, partial, found)


def _launched(kernel: Kernel, operands: tuple, types: list) -> list:
    """The kernel's results, those that are partial after the others, as Triton compiles it."""
    chunks, numbers, lines, columns = operands
    grain, layout, (batch, _, heads, *_) = kernel.layout.grain, kernel.layout, types[0].shape
    assert isinstance(grain, Grain)
    specs = _Specs(chunks.line.shape[0], heads)
    whole = jax.tree.map(lambda x: pl.BlockSpec(x.shape, lambda *_: (0, 0)), numbers)

    def body(program, chunks, numbers, lines, columns, *results):
        kernel.body(Line.of(program, chunks, layout), numbers, lines, columns, results)

    made = Launch(
        body,
        kernel.name,
        (layout.programs, heads, batch),
        [specs.of_rows(chunks), whole, specs.of_side(lines), specs.of_side(columns)],
        list(map(specs.of_head, types)),
        types,
        grain.warps,
        grain.stages,
    )
    return list(launch(made, *operands))


def _partial(layout: Layout, result: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The type of the slots' results."""
    batch, _, *rest = result.shape
    rows = layout.slots * filled_size(layout.line.block)
    return jax.ShapeDtypeStruct((batch, rows, *rest), jnp.float32)


def _merge(kernel: Kernel, specs: "_Specs", long_lines: LongLines, partial: list, results: list) -> list:
    """The results with those of the long lines, which are written in place."""
    height = filled_size(kernel.layout.line.block)
    batch, _, heads = results[0].shape[:3]
    of_results = list(map(specs.of_head, results))
    made = Launch(
        functools.partial(merge_rows, merged=kernel.merged, height=height),
        f"{kernel.name}_merge",
        (kernel.layout.long_lines * (height // ROWS), heads, batch),
        [specs.of_rows(long_lines), list(map(specs.of_head, partial)), of_results],
        of_results,
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        warps=8,
        stages=2,
        in_place=len(results),
    )
    return list(launch(made, long_lines, partial, results))


@dataclass(frozen=True)
class _Specs:
    """What a program sees of the operands, by its head and its sequence.

    Attributes:
      rows: of the plan.
      heads: of the lines.
    """

    rows: int
    heads: int

    def of_rows(self, tree):
        """Of arrays `[R, …]` the sequence's row of the plan."""

        def spec(x):
            return pl.BlockSpec(
                (None, *x.shape[1:]), lambda place, head, b: (b if self.rows > 1 else 0, *[0] * (x.ndim - 1))
            )

        return jax.tree.map(spec, tree)

    def of_head(self, x):
        """Of an array `[B, T, N, …]` what belongs to the head."""
        own = Share(self.heads, x.shape[2])
        block = (None, x.shape[1], own.times if own.times > 1 else None, *x.shape[3:])
        return pl.BlockSpec(block, lambda place, head, b: (b, 0, own.block(head), *[0] * (len(x.shape) - 3)))

    def of_side(self, side: Side) -> Side:
        """Of a side's arrays."""
        words = tuple(self.of_rows(x) if x.ndim == 2 else self.of_head(x) for x in side.words)
        return Side(self.of_rows(side.tokens), words, tuple(map(self.of_head, side.arrays)))
