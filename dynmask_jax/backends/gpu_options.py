"""How the GPU kernels cut their work, by card, head dim and dtype."""

from dataclasses import dataclass, replace

import jax.numpy as jnp

from dynmask_jax.backends.gpu_blocks import LEAST
from dynmask_jax.platforms import compute_capability


@dataclass(frozen=True)
class Grain:
    """The tile of one kernel, and how many threads work on it.

    Attributes:
      line, column: tokens of a tile along a line and across it, powers of two; at most a block's.
      warps: of 32 threads, in a program.
      stages: how many tiles of the columns are on their way from memory at once.

    Raises:
      ValueError: a line, a column or warps that are no power of two; tiles of fewer tokens than a tensor core
        multiplies, 16; no stage.
    """

    line: int
    column: int
    warps: int
    stages: int

    def __post_init__(self):
        for name, least in (("line", LEAST), ("column", LEAST), ("warps", 1)):
            value = getattr(self, name)
            if value < least or value & (value - 1):
                raise ValueError(f"Grain: {name} must be a power of two and at least {least}, got {value}")
        if self.stages < 1:
            raise ValueError(f"Grain: stages must be at least 1, got {self.stages}")


@dataclass(frozen=True)
class Warpgroups:
    """The tile of a kernel of warpgroups: on a Hopper (compute capability 9.0), of 16 bits, JAX 0.11.2 on.

    Attributes:
      line: tokens of a tile along a line: 64 for each warpgroup that computes, of which there are one or two.
      column: across it, a power of two, at least 64.
      stages: how many tiles of the columns are in shared memory at once.

    Raises:
      ValueError: other numbers.
    """

    line: int
    column: int
    stages: int

    def __post_init__(self):
        if self.line not in (64, 128):
            raise ValueError(f"Warpgroups: line must be 64 or 128, got {self.line}")
        if self.column < 64 or self.column & (self.column - 1):
            raise ValueError(f"Warpgroups: column must be a power of two and at least 64, got {self.column}")
        if self.stages < 2:
            raise ValueError(f"Warpgroups: stages must be at least 2, got {self.stages}")


KERNELS = "forward", "dq", "dkv"


@dataclass(frozen=True)
class Grains:
    """Those of all kernels: forward, for dq, and for dk and dv.

    Attributes:
      forward, dq, dkv: a `Grain`, or `Warpgroups` for a Hopper.
      busy: as many programs keep a card busy, about two for each SM of an A100 or H100. A line that would
        take longer than all work takes in so many programs is cut into chunks, a program for each.
    """

    forward: Grain | Warpgroups
    dq: Grain | Warpgroups
    dkv: Grain | Warpgroups
    busy: int = 256

    def __post_init__(self):
        for name in KERNELS:
            if not isinstance(value := getattr(self, name), Grain | Warpgroups):
                raise TypeError(f"Grains: {name} must be a Grain or Warpgroups, got {value!r}")
        if self.busy < 1:
            raise ValueError(f"Grains: busy must be at least 1, got {self.busy}")


HOPPER = {
    64: Grains(Grain(128, 128, 8, 2), Grain(64, 128, 4, 2), Grain(64, 64, 4, 2)),
    128: Grains(Grain(128, 128, 8, 2), Grain(64, 64, 4, 2), Grain(64, 32, 4, 2)),
    256: Grains(Grain(128, 64, 8, 2), Grain(128, 32, 8, 2), Grain(32, 64, 8, 2)),
}
AMPERE = {
    64: Grains(Grain(128, 64, 8, 3), Grain(64, 64, 4, 2), Grain(64, 32, 4, 2)),
    128: Grains(Grain(128, 64, 8, 2), Grain(64, 64, 8, 2), Grain(64, 64, 8, 2)),
    256: Grains(Grain(32, 32, 4, 2), Grain(32, 32, 4, 1), Grain(32, 32, 4, 1)),
}
FLOAT32 = {
    32: Grains(Grain(64, 32, 8, 2), Grain(32, 32, 4, 1), Grain(32, 32, 8, 2)),
    64: Grains(Grain(64, 32, 8, 2), Grain(32, 32, 8, 2), Grain(32, 32, 4, 2)),
    128: Grains(Grain(32, 32, 8, 1), Grain(32, 16, 8, 2), Grain(32, 16, 8, 1)),
    256: Grains(Grain(32, 16, 8, 2), Grain(16, 16, 16, 2), Grain(16, 16, 8, 1)),
}
"""Head dim, at most -> the grains.

Each is, of those that were compiled, the one whose machine code takes the fewest cycles a pair on its busiest
unit, without a spilled register and within the shared memory of the smallest card of its kind (100 KiB, an
L4's). No card has measured them yet. float32 is multiplied in full, on no tensor core: small tiles, whose
operands fit the registers.
"""


def default_grains(head_dim: int, dtype) -> Grains:
    """For the present card; where there is none, as in tests, for a Hopper."""
    table = FLOAT32
    if dtype != jnp.float32:
        capability = compute_capability()
        # Cards of 12.0 are Blackwells for desks, with an L4's shared memory.
        table = HOPPER if capability is None or 9 <= capability < 12 else AMPERE
    return next((grains for most, grains in table.items() if head_dim <= most), table[256])


WARPGROUPS = {
    64: (Warpgroups(128, 128, 2), Warpgroups(128, 64, 2), Warpgroups(128, 64, 2)),
    128: (Warpgroups(128, 128, 2), Warpgroups(128, 64, 2), Warpgroups(128, 64, 2)),
    256: (Warpgroups(128, 64, 2), None, None),
}
"""Head dim, at most -> the tiles of kernels of warpgroups: forward, for dq, for dk and dv.

The greatest that spill no registers in their loops and fit a Hopper's shared memory (227 KiB). At head dim
256 the sums of the backward pass do not fit a warpgroup's registers, at 128 those of dk and dv leave too few
for a soft cap or draws: there the kernels for all cards are taken.
"""


def warpgroup_grains(head_dim: int, otherwise: Grains, *, heavy: bool = False) -> Grains:
    """Those of a Hopper's warpgroups, and others where there is no such kernel.

    `heavy`: with a soft cap or draws.
    """
    size, found = next((most, grains) for most, grains in WARPGROUPS.items() if head_dim <= most)
    kernels = dict(zip(KERNELS, found, strict=True))
    if heavy and size > 64:
        kernels["dkv"] = None
    return replace(otherwise, **{name: grain for name, grain in kernels.items() if grain is not None})
