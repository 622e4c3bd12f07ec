"""What the TPU kernels share: blocks in lines and columns, and the call itself.

A kernel works through a plan line by line. Forward a *line* is a block of queries and its *columns* are
blocks of keys; backward it is the other way round. The active blocks of all lines form one flat list, a
grid axis whose length is data: what the mask hides costs nothing, and a new mask is no new program. A
line's tokens lie along sublanes and its column's along lanes, so a tile is `[line, column]` in every
kernel.

Blocks of any size will do: each is filled up to whole vector registers of 128 lanes.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dynmask_jax.array_typing import Array, Int, pytree
from dynmask_jax.backends.kernel_tile import scalars
from dynmask_jax.backends.tpu_blocks import LANES, token_blocks
from dynmask_jax.backends.tpu_lists import active_blocks
from dynmask_jax.backends.tpu_strips import strips_of
from dynmask_jax.backends.tpu_sums import Buffers, Sums
from dynmask_jax.block_codes import TEST
from dynmask_jax.plans import Plan
from dynmask_jax.vma import shape_like, vary_like

MOST_BLOCKS = 2**15
"""Entries of the flat list in one call: four int32 each, where scalar memory holds 1 MiB. A plan with
more blocks is worked through in groups of lines."""


@pytree
class Lines:
    """Lines of a plan, to be worked through.

    Attributes:
      codes: the plan's, `[L, C]`: all lines of all rows, and the columns of one row.
      strips: of each block, `[L, C]`, see `strips_of`; or None.
      start: number of the first of those columns over all rows, `[L]`.
      tokens: of each line, `[L, fields, line]`; see `token_blocks`.
      arrays: a pytree of arrays `[O, heads, L, …]`, of which a kernel gets the line's block.
    """

    codes: Int[Array, "L C"]
    strips: Int[Array, "L C"] | None
    start: Int[Array, " L"]
    tokens: Int[Array, "L fields line"]
    arrays: Any

    @classmethod
    def of_queries(cls, plan: Plan, arrays) -> "Lines":
        """All blocks of queries of all rows of a plan."""
        return cls._of(_blocks(plan), token_blocks(plan.q_tokens, plan.block_q), arrays)

    @classmethod
    def of_keys(cls, plan: Plan, words, arrays) -> "Lines":
        """All blocks of keys of all rows of a plan, with their words for dropout, or None."""
        tokens = token_blocks(plan.kv_tokens, plan.block_k, words)
        return cls._of(jax.tree.map(lambda x: x.swapaxes(1, 2), _blocks(plan)), tokens, arrays)

    @classmethod
    def _of(cls, blocks: tuple, tokens, arrays) -> "Lines":
        rows, lines, columns = blocks[0].shape
        start = jnp.repeat(jnp.arange(rows, dtype=jnp.int32) * columns, lines)
        codes, strips = jax.tree.map(lambda x: x.reshape(-1, columns), blocks)
        return cls(codes, strips, start, tokens, arrays)


def _blocks(plan: Plan) -> tuple[Int[Array, "R Tb Sb"], Int[Array, "R Tb Sb"] | None]:
    """The plan's codes and strips. A block of keys that is filled up is never full: its filling is hidden."""
    codes = jnp.minimum(plan.codes, TEST) if plan.block_k % LANES else plan.codes
    return codes, strips_of(plan)


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
      inner: how many heads of the columns each works through, one after the other: G backward.
      column_head: `(head, inner) -> head` of the columns.
      out: the shapes and dtypes of one block of results.
      scratch: those of what is kept in vector memory over a line.
      sums: those of a block of sums over lines, one for each column and head of the columns, or None.
        With sums, the body gets `(out, Sums)` in the place of out.
    """

    body: Callable
    name: str
    heads: int
    inner: int
    column_head: Callable
    out: Any
    scratch: Any
    sums: Any = None

    def no_sums(self, lines: Lines, columns: Columns):
        """Sums of nothing, `[O, heads, C, …]`, that vary over devices as the results will."""
        if self.sums is None:
            return None
        outer, columns_heads, blocks = jax.tree.leaves(columns.arrays)[0].shape[:3]
        shape = outer, columns_heads, blocks, *self.sums.shape
        return vary_like(jnp.zeros(shape, self.sums.dtype), lines, columns)


def sweep(kernel: Kernel, numbers: Any, lines: Lines, columns: Columns) -> Any:
    """Runs the kernel over all lines: results `[O, heads, L, …]`, in the structure of `kernel.out`.

    With `kernel.sums`, the pair of results and sums `[O, heads, C, …]`.
    """
    run = functools.partial(_on_platform, kernel)
    if kernel.sums is not None:
        # A kernel that copies parts of an array by itself cannot be given an axis more by `vmap`.
        run = sequential_vmap(run)
    run = functools.partial(run, numbers, columns)
    size = max(1, MOST_BLOCKS // lines.codes.shape[1])
    count = lines.codes.shape[0]
    sums = kernel.no_sums(lines, columns)
    if count <= size:
        sums, out = run(sums, lines)
    else:
        groups = -(-count // size)
        sums, out = lax.scan(run, sums, _split(lines, groups, -(-count // groups)))
        out = jax.tree.map(lambda x: _joined(x)[:, :, :count], out)
    return out if sums is None else (out, sums)


def _on_platform(kernel, numbers, columns, sums, lines: Lines):
    """Compiled where the program is for a TPU, interpreted elsewhere."""
    compiled, interpreted = (functools.partial(_call, kernel, interpret=flag) for flag in (False, True))
    return lax.platform_dependent(numbers, columns, sums, lines, tpu=compiled, default=interpreted)


def _split(lines: Lines, groups: int, size: int) -> Lines:
    """The lines in groups, stacked; the last is filled up with lines that show nothing."""

    def split(x, axis):
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, groups * size - x.shape[axis])
        x = jnp.pad(x, padding)
        x = x.reshape(*x.shape[:axis], groups, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    blocks = lines.codes, lines.strips, lines.start, lines.tokens
    codes, strips, start, tokens = jax.tree.map(lambda x: split(x, 0), blocks)
    return Lines(codes, strips, start, tokens, jax.tree.map(lambda x: split(x, 2), lines.arrays))


def _joined(x: Array) -> Array:
    """`[groups, O, heads, size, …]` as `[O, heads, groups · size, …]`."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _call(kernel: Kernel, numbers: Any, columns: Columns, sums, lines: Lines, *, interpret: bool):
    active, length = active_blocks(lines.codes, lines.start, lines.strips)
    operands = (
        jax.tree.map(scalars, numbers),
        (lines.tokens, columns.tokens),
        lines.arrays,
        columns.arrays,
    )
    blocks = jax.tree.leaves(lines.arrays)[0].shape[0], kernel.heads, lines.codes.shape[0]
    out = jax.tree.map(lambda x: shape_like((*blocks, *x.shape), x.dtype, active, operands), kernel.out)
    aliases = {}
    if sums is not None:
        active = active.with_turns(kernel.inner)
        aliases = {len(jax.tree.leaves((active, operands))): 0}
        if not interpret:
            # Small arrays XLA would lay into vector memory, where copies from and to them are loops.
            sums = pltpu.with_memory_space_constraint(sums, pltpu.HBM)
    call = pl.pallas_call(
        functools.partial(_body, kernel.body),
        out_shape=[jax.tree.map(lambda x: shape_like(x.shape, x.dtype, x), sums), out],
        grid_spec=_grid(kernel, length, operands, sums, out),
        name=kernel.name,
        interpret=interpret,
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            # Blocks are found by the list, which holds none beyond the arrays; checks take 60 cycles a step.
            disable_bounds_checks=True,
        ),
    )
    return call(active, *operands, sums)


def _grid(kernel: Kernel, length, operands: tuple, sums, out):
    numbers, tokens, lines, columns = operands

    def of_line(x):
        return _block(x, lambda o, h, s, g, active: (o, h, active.line[s]))

    def of_column(x):
        return _block(x, lambda o, h, s, g, active: (o, kernel.column_head(h, g), active.column[s]))

    in_hbm = jax.tree.map(lambda _: pl.BlockSpec(memory_space=pltpu.HBM), sums)
    scratch: Any = [
        jax.tree.map(lambda x: pltpu.VMEM(x.shape, x.dtype), kernel.scratch),
        None if sums is None else Buffers.of(kernel.sums),
    ]
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(jax.tree.leaves(out)[0].shape[0], kernel.heads, length, kernel.inner),
        in_specs=[
            jax.tree.map(_in_scalar_memory, numbers),
            (of_line(tokens[0]), of_column(tokens[1])),
            jax.tree.map(of_line, lines),
            jax.tree.map(of_column, columns),
            in_hbm,
        ],
        out_specs=[in_hbm, jax.tree.map(of_line, out)],
        scratch_shapes=scratch,
    )


def _body(body, active, *refs):
    """The kernel's body, with its sums beside its results where there are any."""
    numbers, tokens, line, column, _, sums, out, state, buffers = refs
    if sums is not None:
        out = out, Sums.of_step(sums, buffers, active)
    body(active, numbers, tokens, line, column, out, state)


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


def block_type(shape: tuple[int, ...], dtype=jnp.float32) -> Any:
    """The type of a block of results, or of what is kept over a line, in the place of an array."""
    return jax.ShapeDtypeStruct(shape, dtype)
