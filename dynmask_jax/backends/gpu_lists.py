"""The lists of blocks that the GPU kernels work through, made from a plan's codes on the card."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dynmask_jax.array_typing import Array, Int, pytree, static
from dynmask_jax.backends.triton import Launch, launch, load, store
from dynmask_jax.block_codes import FULL, SKIP, TEST

WIDTH = 1_024
"""Codes that a program looks at in one step."""


@pytree
class Lists:
    """For each line of a plan's blocks, which of its columns are to be computed.

    Attributes:
      columns: `[R, L, C + width]`: of each line the full ones from the front on, in order, and those to test
        from place C − 1 backwards; what is between is not written.
      full, test: how many there are of either, `[R, L]`.
      order: the lines, the longest first, `[R, L]`: so that no long one is left for the end.
      end: C.
    """

    columns: Int[Array, "R L places"]
    full: Int[Array, "R L"]
    test: Int[Array, "R L"]
    order: Int[Array, "R L"]
    end: int = static()


def lists_of(codes: Int[Array, "R L C"]) -> Lists:
    """The lists of a plan's codes: one launch, that reads each code and writes the active ones; and a sort.

    Their memory is that of all codes as int32.
    """
    rows, lines, columns = codes.shape
    width = min(WIDTH, max(16, pl.next_power_of_2(columns)))

    def line(*shape):
        return pl.BlockSpec((None, None, *shape), lambda line, row: (row, line, 0))

    kernel = Launch(
        functools.partial(_kernel, width=width, columns=columns),
        name="dynmask_lists",
        grid=(lines, rows),
        operands=[line(columns)],
        results=[line(columns + width), line(2)],
        shapes=[
            jax.ShapeDtypeStruct((rows, lines, columns + width), jnp.int32),
            jax.ShapeDtypeStruct((rows, lines, 2), jnp.int32),
        ],
        warps=4,
        stages=1,
    )
    places, counts = launch(kernel, codes)
    full, test = counts[:, :, 0], counts[:, :, 1]
    order = jnp.argsort(-(full + test), axis=1, stable=True).astype(jnp.int32)
    return Lists(places, full, test, order, columns)


def _kernel(program, codes, places, counts, *, width: int, columns: int):
    del program  # the refs are its line's
    lane = lax.iota(jnp.int32, width)

    def step(n, found):
        at = n * width + lane
        code = load(codes.at[pl.ds(n * width, width)], mask=at < columns, other=SKIP).astype(jnp.int32)
        is_full, is_test = code == FULL, code == TEST
        before = [jnp.cumsum(each.astype(jnp.int32)) for each in (is_full, is_test)]
        # A lane that writes nothing has a place of its own all the same: the interpreter writes there.
        nowhere = columns + lane
        forwards = jnp.where(is_full, found[0] + before[0] - 1, nowhere)
        backwards = jnp.where(is_test, columns - found[1] - before[1], nowhere)
        store(places.at[forwards], at, mask=is_full)
        store(places.at[backwards], at, mask=is_test)
        return tuple(n + each.sum(dtype=jnp.int32) for n, each in zip(found, (is_full, is_test), strict=True))

    full, test = lax.fori_loop(0, -(-columns // width), step, (jnp.int32(0), jnp.int32(0)))
    counts[0], counts[1] = full, test
