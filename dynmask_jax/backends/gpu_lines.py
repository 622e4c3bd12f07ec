"""What the GPU kernels share: operands as refs, how both sides are cut, a line of blocks worked through.

Forward and for dq a *line* is a block of queries and its *columns* are blocks of keys; for dk and dv it is
the other way round. A program takes a part of a line, a tile's height, and goes along the line's list.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dynmask_jax.array_typing import pytree
from dynmask_jax.backends.gpu_blocks import filled_size
from dynmask_jax.backends.gpu_chunks import IN_LINE, IN_SLOT, Chunks
from dynmask_jax.backends.gpu_lists import Lists, lists_of
from dynmask_jax.backends.gpu_options import Grain, Warpgroups
from dynmask_jax.backends.kernel_tile import Tile
from dynmask_jax.block_codes import TEST
from dynmask_jax.plans import Plan
from dynmask_jax.tokens import Tokens


@pytree
class Side:
    """Queries, or keys, of all rows, in the kernel refs to those of one row and head.

    Attributes:
      tokens: `[R, T]`.
      words: for dropout: of queries two, `[B, T, N]`, of keys one, `[R, T]`; or none.
      arrays: `[B, T, N, …]`, with N the heads of this side.
    """

    tokens: Tokens
    words: tuple
    arrays: tuple


@dataclass(frozen=True)
class Axis:
    """How one side is cut: blocks of a plan, filled up, and the tiles in them.

    Attributes:
      length: tokens of the side.
      block: tokens in a block of the plan.
      tile: tokens in a tile, a power of two.
    """

    length: int
    block: int
    tile: int

    @classmethod
    def of(cls, length: int, block: int, most: int) -> "Axis":
        """With tiles of at most so many tokens."""
        return cls(length, block, min(most, filled_size(block)))

    @property
    def tiles(self) -> int:
        """In a block."""
        return filled_size(self.block) // self.tile

    @property
    def blocks(self) -> int:
        """Of the side."""
        return -(-self.length // self.block)

    @property
    def whole(self) -> bool:
        """Whether tiles hold nothing but tokens."""
        return filled_size(self.block) == self.block and self.length % self.block == 0

    def place(self, block, part):
        """Where a tile begins."""
        return block * filled_size(self.block) + part * self.tile

    def real(self, block, part):
        """Which of a tile's places hold a token, `[tile]`; True where all of all tiles do."""
        if self.whole:
            return True
        inside = part * self.tile + lax.iota(jnp.int32, self.tile)
        return (inside < self.block) & (block * self.block + inside < self.length)


@dataclass(frozen=True)
class Layout:
    """What is fixed for all programs of a kernel.

    Attributes:
      tile: what is fixed of their tiles.
      line, column: how both sides are cut.
      grain: threads and stages.
      budget: the most chunks that the long lines of a row are cut into; 0 where every line stays whole.
    """

    tile: Tile
    line: Axis
    column: Axis
    grain: Grain | Warpgroups
    budget: int

    @classmethod
    def of(cls, tile: Tile, plan: Plan, grain: Grain | Warpgroups, heads: int, busy: int) -> "Layout":
        """With lines of queries, or of keys, as the tile has them; heads are those of all lines of a batch.

        Chunks make up at most twice as many programs as keep a card busy, so that the memory of their results
        does not grow with the lines. Where a single line has programs enough, every line stays whole.
        """
        sides = [*zip(plan.lengths, (plan.block_q, plan.block_k), strict=True)]
        line, column = reversed(sides) if tile.keys_first else sides
        line, column = Axis.of(*line, grain.line), Axis.of(*column, grain.column)
        budget = -(-2 * busy // (line.tiles * heads))
        if line.blocks * column.blocks >= 2**31:  # blocks are counted in int32
            budget = 0
        # For a budget of two only a line of more blocks than there are in all would be long.
        return cls(tile, line, column, grain, budget if budget > 2 and column.blocks > 1 else 0)

    @property
    def slots(self) -> int:
        """For chunks of long lines, of each row and head."""
        return min(self.budget, self.line.blocks * self.column.blocks)

    @property
    def long_lines(self) -> int:
        """Of a row, at most: each has two chunks or more."""
        return min(self.slots // 2, self.line.blocks)

    @property
    def programs(self) -> int:
        """Of each head and row: of all slots, then of all lines."""
        return (self.slots + self.line.blocks) * self.line.tiles


@dataclass(frozen=True)
class Kernel:
    """A kernel over all lines of a plan.

    Attributes:
      body: with a `Grain`, `(line, numbers, lines, columns, results) -> None`: the program's line, and refs:
        those of both sides are of one row, and of the heads that it works through. With `Warpgroups`,
        `(worker) -> values`.
      name: in profiles.
      layout: what is fixed.
      merged: what merges the results of a long line's chunks, of `gpu_merge`; None where each program has a
        result of its own, a long line's in chunks too.
    """

    body: Callable
    name: str
    layout: Layout
    merged: Callable | None

    @property
    def merges(self) -> bool:
        """Whether it has partial results, of chunks, beside its own."""
        return self.merged is not None and self.layout.slots > 0


@dataclass(frozen=True)
class Share:
    """Which heads of the columns belong to a head of the lines: one, or several in a row.

    Attributes:
      lines: heads of the lines.
      columns: heads of the columns, a multiple of them or a divisor.
    """

    lines: int
    columns: int

    @property
    def times(self) -> int:
        """How many."""
        return max(1, self.columns // self.lines)

    def block(self, head):
        """The number of their block, of so many heads each."""
        return divided(head, max(1, self.lines // self.columns))[0]


def query_lists(plan: Plan) -> Lists:
    """Of each block of queries its blocks of keys. One of keys that is filled up is never full."""
    codes = plan.codes if filled_size(plan.block_k) == plan.block_k else jnp.minimum(plan.codes, TEST)
    return lists_of(codes)


def key_lists(plan: Plan) -> Lists:
    """Of each block of keys its blocks of queries."""
    return lists_of(plan.codes.swapaxes(1, 2))


@dataclass(frozen=True)
class Line:
    """In a kernel: the line that a program works through, or a chunk of it.

    Attributes:
      program: the number of the program among those of its head.
      head: of the lines.
      place: among slots and lines.
      block: the line's number in its row.
      start: where the program's tile of it begins.
      chunks: refs.
      layout: what is fixed.
    """

    program: Any
    head: Any
    place: Any
    block: Any
    start: Any
    chunks: Chunks
    layout: Layout

    @classmethod
    def of(cls, program: tuple, chunks: Chunks, layout: Layout) -> "Line":
        """Of a program, by its numbers in the grid."""
        place, tile = divided(program[0], layout.line.tiles)
        block = chunks.line[place]
        return cls(program[0], program[1], place, block, layout.line.place(block, tile), chunks, layout)

    @property
    def tokens(self):
        """The slice of them that is the program's."""
        return pl.ds(self.start, self.layout.line.tile)

    def store(self, results: tuple, *values):
        """Stores a line's values in the first results; those of a slot in the others, the partial ones."""
        if not self.layout.slots:
            store_rows(results, self.tokens, values)
            return
        axis, stores = self.layout.line, self.chunks.stores[self.place]
        in_slot = pl.ds(self.program * axis.tile, axis.tile)
        for kind, refs, rows in (
            (IN_LINE, results[: len(values)], self.tokens),
            (IN_SLOT, results[len(values) :], in_slot),
        ):
            # A branch, not a mask: what another branch needs takes no registers here.
            pl.when(stores == kind)(functools.partial(store_rows, refs, rows, values))

    def each(self, add: Callable, start, *, times: int = 1):
        """Folds `add(turn, tile, real, result) -> result` along the program's blocks of the line.

        Full blocks come first. Each tile comes `times` times, for turn 0, 1, …. Of full blocks, where nothing
        is hidden, real is None; of others it says which places of the tile hold a token, True where all do.
        """
        axis, chunks = self.layout.column, self.chunks

        def step(n, result, *, first, test: bool):
            rest, turn = divided(n, times)
            at, part = divided(rest, axis.tiles)
            at += first  # a loop from 0 takes fewer registers than one from `first`
            block = chunks.columns[self.block, chunks.end - 1 - at if test else at]
            real = axis.real(block, part) if test else None
            return add(turn, pl.ds(axis.place(block, part), axis.tile), real, result)

        for bounds, test in ((chunks.full, False), (chunks.test, True)):
            first, last = (bound[self.place] for bound in bounds)
            turns = (last - first) * (times * axis.tiles)
            start = lax.fori_loop(0, turns, functools.partial(step, first=first, test=test), start)
        return start


def store_rows(refs, rows, values):
    """Stores each array, in its ref's dtype, at a slice of the first axis."""
    for ref, value in zip(refs, values, strict=True):
        ref[(rows, *[slice(None)] * (value.ndim - 1))] = value.astype(ref.dtype)


def divided(n, by: int):
    """Quotient and remainder of a number that is not negative. Triton's lowering knows no remainder by 1."""
    if by == 1:
        return n, 0
    return lax.div(n, jnp.int32(by)), lax.rem(n, jnp.int32(by))
