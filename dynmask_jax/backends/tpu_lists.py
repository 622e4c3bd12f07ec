"""The flat list of a plan's active blocks, for the TPU kernels: data, in scalar memory."""

import jax.numpy as jnp

from dynmask_jax.array_typing import Array, Int, pytree
from dynmask_jax.backends.tpu_sums import turns
from dynmask_jax.block_codes import SKIP


@pytree
class Active:
    """The flat list of active blocks, in the order in which they are computed.

    Attributes:
      line, column: `[n]` int32, which block on either side.
      flags: `[n]` int32: the plan's code, plus 4 where a line begins and 8 where it ends; of sums over
        lines, see `turns`, 16 where a turn is new, 32 where its sum is recent, and 64 times its number.

    A line without an active block has one entry all the same, of code skip: its zeros are written.
    """

    line: Int[Array, " n"]
    column: Int[Array, " n"]
    flags: Int[Array, " n"]
    strips: Int[Array, " n"] | None

    def at(self, step):
        """In the kernel: the code, whether the line begins here, and whether it ends here."""
        flags = self.flags[step]
        return flags & 3, (flags & 4) != 0, (flags & 8) != 0

    def turn(self, step):
        """In the kernel: the number of the turn, whether it is new, and whether its sum is recent."""
        flags = self.flags[step]
        return flags >> 6, (flags & 16) != 0, (flags & 32) != 0

    def with_turns(self, group: int) -> "Active":
        """The list with the turns of sums over lines, of `group` heads of each column."""
        turn, new, recent = turns(self.column, group)
        flags = self.flags + jnp.where(new, 16, 0) + jnp.where(recent, 32, 0) + (turn << 6)
        return Active(self.line, self.column, flags, self.strips)


def active_blocks(
    codes: Int[Array, "L C"], start: Int[Array, " L"], strips: Int[Array, "L C"] | None = None
) -> tuple[Active, Int[Array, ""]]:
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
    strips = None if strips is None else strips.reshape(-1)[at]
    active = Active(line, start[line] + at % columns, flags.reshape(-1)[at], strips)
    return active, listed.sum(dtype=jnp.int32)
