"""What the GPU kernels share: operands as refs, a line of blocks worked through, the launch over all lines.

Forward and for dq a *line* is a block of queries and its *columns* are blocks of keys; for dk and dv it is
the other way round. A program takes a part of a line, a tile's height, and goes along the line's list.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dynmask_jax.array_typing import pytree
from dynmask_jax.backends.gpu_blocks import filled_size
from dynmask_jax.backends.gpu_lists import Lists, lists_of
from dynmask_jax.backends.gpu_options import Grain
from dynmask_jax.backends.kernel_tile import Numbers, scalars
from dynmask_jax.backends.triton import Launch, launch
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
    def filled(self) -> int:
        """Places of all blocks, filled up."""
        return -(-self.length // self.block) * filled_size(self.block)

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
class Cut:
    """Both sides' axes: of the lines and of the columns.

    `parts`: how many programs share a line's list, each with results of its own.
    """

    line: Axis
    column: Axis
    parts: int = 1

    @classmethod
    def of_queries(cls, plan: Plan, grain: Grain) -> "Cut":
        """Lines of queries."""
        (t, s), (queries, keys) = plan.lengths, (plan.block_q, plan.block_k)
        return cls(Axis.of(t, queries, grain.line), Axis.of(s, keys, grain.column))

    @classmethod
    def of_keys(cls, plan: Plan, grain: Grain) -> "Cut":
        """Lines of keys."""
        (t, s), (queries, keys) = plan.lengths, (plan.block_q, plan.block_k)
        return cls(Axis.of(s, keys, grain.line), Axis.of(t, queries, grain.column))


def query_lists(plan: Plan) -> Lists:
    """Of each block of queries its blocks of keys. One of keys that is filled up is never full."""
    codes = plan.codes if filled_size(plan.block_k) == plan.block_k else jnp.minimum(plan.codes, TEST)
    return lists_of(codes)


def key_lists(plan: Plan) -> Lists:
    """Of each block of keys its blocks of queries."""
    return lists_of(plan.codes.swapaxes(1, 2))


@dataclass(frozen=True)
class Line:
    """In a kernel: the line that a program works through.

    Attributes:
      program: the number of the program among those of its head.
      head: of the lines.
      block: its number in its row.
      start: where the program's tile of it begins.
      part: which part of its list is the program's.
      lists: refs.
      cut: how it is cut.
    """

    program: Any
    head: Any
    block: Any
    start: Any
    part: Any
    lists: Lists
    cut: Cut

    @classmethod
    def of(cls, program: tuple, lists: Lists, cut: Cut) -> "Line":
        """Of a program, by its numbers in the grid."""
        rest, part = _divided(program[0], cut.parts)
        place, tile = _divided(rest, cut.line.tiles)
        block = lists.order[place]
        return cls(program[0], program[1], block, cut.line.place(block, tile), part, lists, cut)

    @property
    def tokens(self):
        """The slice of them that is the program's."""
        return pl.ds(self.start, self.cut.line.tile)

    @property
    def results(self):
        """Where the program's results go: after those of all lines for the parts before its own."""
        return pl.ds(self.part * self.cut.line.filled + self.start, self.cut.line.tile)

    def each(self, add: Callable, start, *, times: int = 1):
        """Folds `add(turn, tile, real, result) -> result` along the program's part of the line.

        Full blocks come first. Each tile comes `times` times, for turn 0, 1, …. Of full blocks, where nothing
        is hidden, real is None; of others it says which places of the tile hold a token, True where all do.
        """
        axis, lists = self.cut.column, self.lists

        def step(n, result, *, test: bool):
            rest, turn = _divided(n, times)
            at, part = _divided(rest, axis.tiles)
            block = lists.columns[self.block, lists.end - 1 - at if test else at]
            real = axis.real(block, part) if test else None
            return add(turn, pl.ds(axis.place(block, part), axis.tile), real, result)

        for count, test in ((lists.full, False), (lists.test, True)):
            blocks, turns = count[self.block], times * axis.tiles
            first, last = (
                _divided(blocks * (self.part + more), self.cut.parts)[0] * turns for more in (0, 1)
            )
            start = lax.fori_loop(first, last, functools.partial(step, test=test), start)
        return start


def _divided(n, by: int):
    """Quotient and remainder of a number that is not negative. Triton's lowering knows no remainder by 1."""
    if by == 1:
        return n, 0
    return lax.div(n, jnp.int32(by)), lax.rem(n, jnp.int32(by))


@dataclass(frozen=True)
class Kernel:
    """A kernel over all lines of a plan.

    Attributes:
      body: `(program, lists, numbers, lines, columns, *results) -> None`: the program's numbers in the grid,
        and refs: those of both sides are of one row, and of the heads that it works through.
      name: in profiles.
      cut: how lines and columns are cut.
      grain: its tile and threads.
    """

    body: Callable
    name: str
    cut: Cut
    grain: Grain


def sweep(kernel: Kernel, lists: Lists, numbers: Numbers, lines: Side, columns: Side, results: list):
    """Runs the kernel over all lines, for each head of theirs: arrays of the results' types, `[B, T, N, …]`.

    Of the columns' heads a program gets the one that its own head belongs to, or, where they are more, all
    that belong to it, `[T, G, …]`.
    """
    batch, _, heads = results[0].shape[:3]
    rows, height = lists.full.shape
    row = _row_of(rows)

    def of_row(x):
        return pl.BlockSpec((None, *x.shape[1:]), lambda place, head, b: (row(b), *[0] * (x.ndim - 1)))

    def of_head(x):
        own = _Share(heads, x.shape[2])
        block = (None, x.shape[1], own.block, *x.shape[3:])
        return pl.BlockSpec(block, lambda place, head, b: (b, 0, own.number(head), *[0] * (x.ndim - 3)))

    def of_side(side: Side) -> Side:
        tokens = jax.tree.map(of_row, side.tokens)
        words = tuple(of_row(x) if x.ndim == 2 else of_head(x) for x in side.words)
        return Side(tokens, words, tuple(map(of_head, side.arrays)))

    numbers = jax.tree.map(scalars, numbers)
    whole = jax.tree.map(lambda x: pl.BlockSpec(x.shape, lambda *_: (0, 0)), numbers)
    operands = [jax.tree.map(of_row, lists), whole, of_side(lines), of_side(columns)]
    grid = height * kernel.cut.line.tiles * kernel.cut.parts, heads, batch
    grain = kernel.grain
    made = Launch(
        kernel.body,
        kernel.name,
        grid,
        operands,
        list(map(of_head, results)),
        results,
        grain.warps,
        grain.stages,
    )
    return launch(made, lists, numbers, lines, columns)


def _row_of(rows: int) -> Callable:
    """The plan's row of a sequence."""
    return (lambda b: b) if rows > 1 else (lambda b: 0)


@dataclass(frozen=True)
class _Share:
    """Which heads of an array belong to a head of the lines'."""

    lines: int
    heads: int

    @property
    def block(self) -> int | None:
        """How many, None where it is one."""
        return self.heads // self.lines if self.heads > self.lines else None

    def number(self, head):
        """The number of their block."""
        return head if self.block else head // (self.lines // self.heads)
