"""What a layout is weighed with: a machine's speed, the shape of the heads, and what travels when.

Times are estimates from data sheets, good enough to tell one layout from another, not to promise a
step's time.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

FORWARD, BACKWARD = 4, 10
"""Floating-point operations of a pair for each of the H dimensions: 2 and 5 products of 2 operations."""


@dataclass(frozen=True)
class Machine:
    """A device's numbers.

    Attributes:
      name: as it is sold.
      flops: operations a second in bfloat16, at its best.
      link: bytes a second to a neighbour, one way.
      switched: any device reaches any other over one port (NVLink); else devices form a torus, and
        each has a link of its own to the next and to the previous one of a ring.
      share: of `flops` that attention reaches.

    Sources: cloud.google.com/tpu/docs/v5e, /v5p and /v6e (197, 459, 918 TFLOP/s; 400, 1,200 and 800
    GB/s both ways over 4, 6 and 4 links); nvidia.com/data-center/h100, SXM (989 TFLOP/s dense, NVLink 900
    GB/s both ways).
    """

    name: str
    flops: float
    link: float
    switched: bool = False
    share: float = 0.5


V5E = Machine("TPU v5e", flops=197e12, link=50e9)
V5P = Machine("TPU v5p", flops=459e12, link=100e9)
V6E = Machine("TPU v6e", flops=918e12, link=100e9)
H100 = Machine("H100 SXM, NVLink", flops=989e12, link=450e9, switched=True)


@dataclass(frozen=True)
class Heads:
    """The shape of a layer's attention.

    Attributes:
      query: N, query heads; key: K, key heads; dim: H, the size of each.
      dtype: what queries, keys and values are kept in; gradients of keys and values travel in float32.
    """

    query: int = 32
    key: int = 8
    dim: int = 128
    dtype: Any = jnp.bfloat16

    def __post_init__(self):
        for name in ("query", "key", "dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"heads.{name} must be at least 1, got {getattr(self, name)}")
        if self.query % self.key:
            raise ValueError(f"query heads ({self.query}) must be a multiple of key heads ({self.key})")

    def bytes(self, tokens: int, heads: int, *, dtype: Any = None) -> int:
        """Bytes of `[tokens, heads, dim]`."""
        return tokens * heads * self.dim * jnp.dtype(self.dtype if dtype is None else dtype).itemsize
