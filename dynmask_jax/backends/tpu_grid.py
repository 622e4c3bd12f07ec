"""What the TPU kernels share: blocks in lines, the flat list of active ones, the call itself.

A kernel works through a plan line by line. Forward and for dq a *line* is a block of queries and its
*columns* are blocks of keys; for dk and dv it is the other way round. The active blocks of all lines
form one flat list, a grid axis whose length is data: what the mask hides costs nothing, and a new mask
is no new program. A line's tokens lie along sublanes and its column's along lanes, so a tile is
`[line, column]` in every kernel.

Blocks of any size will do: each is filled up to whole vector registers of 128 lanes.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dynmask_jax.array_typing import Array, Int, pytree
from dynmask_jax.backends.kernel_tile import scalars
from dynmask_jax.backends.tpu_blocks import LANES, token_blocks
from dynmask_jax.block_codes import SKIP, TEST
from dynmask_jax.plans import Plan
from dynmask_jax.vma import shape_like

MOST_BLOCKS = 2**15
"""Entries of the flat list in one call: three int32 each, where scalar memory holds 1 MiB. A plan with
more blocks is worked through in groups of lines."""


@pytree
class Active:
    """The flat list of active blocks, in the order in which they are computed.

    Attributes:
      line, column: `[n]` int32, which block on either side.
      flags: `[n]` int32: the plan's code, plus 4 where a line begins and 8 where it ends.

    A line without an active block has one entry all the same, of code skip: its zeros are written.
    """

    line: Int[Array, " n"]
    column: Int[Array, " n"]
    flags: Int[Array, " n"]

    def at(self, step):
        """In the kernel: the code, whether the line begins here, and whether it ends here."""
        flags = self.flags[step]
        return flags & 3, (flags & 4) != 0, (flags & 8) != 0


@pytree
class Lines:
    """Lines of a plan, to be worked through.

    Attributes:
      codes: the plan's, `[L, C]`: all lines of all rows, and the columns of one row.
      start: number of the first of those columns over all rows, `[L]`.
      tokens: of each line, `[L, fields, line]`; see `token_blocks`.
      arrays: a pytree of arrays `[O, heads, L, …]`, of which a kernel gets the line's block.
    """

    codes: Int[Array, "L C"]
    start: Int[Array, " L"]
    tokens: Int[Array, "L fields line"]
    arrays: Any

    @classmethod
    def of_queries(cls, plan: Plan, arrays) -> "Lines":
        """All blocks of queries of all rows of a plan."""
        # A block of keys that is filled up is never full: its filling must be hidden.
        codes = jnp.minimum(plan.codes, TEST) if plan.block_k % LANES else plan.codes
        return cls._of(codes, token_blocks(plan.q_tokens, plan.block_q), arrays)

    @classmethod
    def of_keys(cls, plan: Plan, words, arrays) -> "Lines":
        """All blocks of keys of all rows of a plan, with their words for dropout, or None."""
        tokens = token_blocks(plan.kv_tokens, plan.block_k, words)
        return cls._of(plan.codes.swapaxes(1, 2), tokens, arrays)

    @classmethod
    def _of(cls, codes: Int[Array, "R lines columns"], tokens, arrays) -> "Lines":
        rows, lines, columns = codes.shape
        start = jnp.repeat(jnp.arange(rows, dtype=jnp.int32) * columns, lines)
        return cls(codes.reshape(-1, columns), start, tokens, arrays)


@pytree
class Columns:
    """What lines attend to: tokens `[C, fields, column]` and arrays `[O, heads, C, …]`, over all rows."""

    tokens: Int[Array, "C fields column"]
    arrays: Any


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel and how it is called.

    Attributes:
      body: `(active, numbers, tokens, line, column, out, scratch) -> None`, all of them refs, in the
        structures of the fields below; numbers are those of mask and scores, `[1, 1]` or `[1, N]` in
        scalar memory, and tokens is the pair of line's and column's.
      name: in profiles.
      heads: how many heads the lines have.
      inner: how many heads of the columns each works through, one after the other: G for dk and dv.
      column_head: `(head, inner) -> head` of the columns.
      out: the shapes and dtypes of one block of results.
      scratch: those of what is kept in vector memory over a line.
    """

    body: Callable
    name: str
    heads: int
    inner: int
    column_head: Callable
    out: Any
    scratch: Any


def sweep(kernel: Kernel, numbers: Any, lines: Lines, columns: Columns):
    """Runs the kernel over all lines: results `[O, heads, L, …]`, in the structure of `kernel.out`."""
    run = functools.partial(_on_platform, kernel, numbers, columns)
    size = max(1, MOST_BLOCKS // lines.codes.shape[1])
    count = lines.codes.shape[0]
    if count <= size:
        return run(lines)
    groups = -(-count // size)
    grouped = _split(lines, groups, -(-count // groups))
    out = lax.map(run, grouped)
    return jax.tree.map(lambda x: _joined(x)[:, :, :count], out)


def _on_platform(kernel, numbers, columns, lines: Lines):
    """Compiled where the program is for a TPU, interpreted elsewhere."""
    compiled, interpreted = (functools.partial(_call, kernel, interpret=flag) for flag in (False, True))
    return lax.platform_dependent(numbers, columns, lines, tpu=compiled, default=interpreted)


def _split(lines: Lines, groups: int, size: int) -> Lines:
    """The lines in groups, stacked; the last is filled up with lines that show nothing."""

    def split(x, axis):
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, groups * size - x.shape[axis])
        x = jnp.pad(x, padding)
        x = x.reshape(*x.shape[:axis], groups, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    codes, start, tokens = (split(x, 0) for x in (lines.codes, lines.start, lines.tokens))
    return Lines(codes, start, tokens, jax.tree.map(lambda x: split(x, 2), lines.arrays))


def _joined(x: Array) -> Array:
    """`[groups, O, heads, size, …]` as `[O, heads, groups · size, …]`."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _call(kernel: Kernel, numbers: Any, columns: Columns, lines: Lines, *, interpret: bool):
    active, length = active_blocks(lines.codes, lines.start)
    outer = jax.tree.leaves(lines.arrays)[0].shape[0]
    numbers = jax.tree.map(scalars, numbers)
    operands = (numbers, (lines.tokens, columns.tokens), lines.arrays, columns.arrays)

    def of_line(x):
        return _block(x, lambda o, h, s, g, active: (o, h, active.line[s]))

    def of_column(x):
        return _block(x, lambda o, h, s, g, active: (o, kernel.column_head(h, g), active.column[s]))

    blocks = kernel.heads, lines.codes.shape[0]
    out = jax.tree.map(
        lambda x: shape_like((outer, *blocks, *x.shape), x.dtype, active, operands), kernel.out
    )
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(outer, kernel.heads, length, kernel.inner),
        in_specs=[
            jax.tree.map(_in_scalar_memory, numbers),
            (of_line(lines.tokens), of_column(columns.tokens)),
            jax.tree.map(of_line, lines.arrays),
            jax.tree.map(of_column, columns.arrays),
        ],
        out_specs=[jax.tree.map(of_line, out)],
        scratch_shapes=[jax.tree.map(lambda x: pltpu.VMEM(x.shape, x.dtype), kernel.scratch)],
    )
    call = pl.pallas_call(
        kernel.body,
        out_shape=[out],
        grid_spec=grid,
        name=kernel.name,
        interpret=interpret,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
        ),
    )
    return call(active, *operands)[0]


def _block(x, place: Callable) -> pl.BlockSpec:
    """One block of `[O, heads, blocks, a, b]` at the place (o, head, block).

    Tokens, `[blocks, a, b]`, have no o and no head: of the place the last is theirs.
    """
    leading = x.ndim - 2
    shape = (*[None] * leading, *x.shape[leading:])
    return pl.BlockSpec(shape, lambda *at: (*place(*at)[-leading:], *_origin()))


def _in_scalar_memory(leaf) -> pl.BlockSpec:
    return pl.BlockSpec(leaf.shape, lambda *_: _origin(), memory_space=pltpu.SMEM)


def _origin():
    """Where a block begins that is whole in both axes. Under x64 a plain 0 has 64 bits: Mosaic refuses."""
    return jnp.int32(0), jnp.int32(0)


def active_blocks(codes: Int[Array, "L C"], start: Int[Array, " L"]) -> tuple[Active, Int[Array, ""]]:
    """The list for these lines, and how long it is; the rest of it is not looked at."""
    columns = codes.shape[1]
    place = jnp.arange(columns, dtype=jnp.int32)
    active = codes != SKIP
    first = jnp.argmax(active, axis=1).astype(jnp.int32)  # 0 where none is
    last = jnp.max(jnp.where(active, place, 0), axis=1)
    begins, ends = (place[None, :] == x[:, None] for x in (first, last))
    flags = codes.astype(jnp.int32) + jnp.where(begins, 4, 0) + jnp.where(ends, 8, 0)
    listed = (active | begins).reshape(-1)
    at = jnp.nonzero(listed, size=listed.size, fill_value=0)[0].astype(jnp.int32)
    line = at // columns
    return Active(line, start[line] + at % columns, flags.reshape(-1)[at]), listed.sum(dtype=jnp.int32)


def block_type(shape: tuple[int, ...], dtype=jnp.float32) -> Any:
    """The type of a block of results, or of what is kept over a line, in the place of an array."""
    return jax.ShapeDtypeStruct(shape, dtype)
