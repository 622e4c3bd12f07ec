"""What a layout is weighed with: a machine's speed, the shape of the heads, and what travels when.

Times are estimates from data sheets, good enough to tell one layout from another, not to promise a
step's time.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp


@dataclass(frozen=True)
class Pass:
    """Floating-point operations of a pair and head: for each dimension of queries and keys, and of values."""

    of_keys: int
    of_values: int


FORWARD, BACKWARD = Pass(2, 2), Pass(6, 4)
"""Products of 2 operations: q·k and the weighted values; q·k again, dq, dk; and d_out·v, dv."""


@dataclass(frozen=True)
class Machine:
    """A device's numbers.

    Attributes:
      name: as it is sold.
      flops: operations a second in bfloat16, at its best.
      link: bytes a second to a neighbour, one way.
      switched: any device reaches any other over one port (NVLink, PCIe); else devices form a torus, and
        each has a link of its own to the next and to the previous one of a ring.
      share: of `flops` that attention reaches.
      float32: operations a second of float32 products, where these are slower (TF32 on GPUs). None: as
        `flops`; a TPU multiplies float32 in one bfloat16 pass, unless a higher precision is asked for.
      cores: TensorCores of a TPU chip, which some runtimes show as devices of their own.
    """

    name: str
    flops: float
    link: float
    switched: bool = False
    share: float = 0.5
    float32: float | None = None
    cores: int = 1


V4 = Machine("TPU v4", flops=275e12, link=50e9, cores=2)
V5E = Machine("TPU v5e", flops=197e12, link=50e9)
V5P = Machine("TPU v5p", flops=459e12, link=100e9, cores=2)
V6E = Machine("TPU v6e", flops=918e12, link=100e9)
V7X = Machine("TPU7x", flops=2307e12, link=100e9, cores=2)


def _gpu(name: str, flops: float, link: float) -> Machine:
    return Machine(name, flops, link, switched=True, float32=flops / 2)


A100 = _gpu("A100 SXM, NVLink", 312e12, 300e9)
A100_PCIE = _gpu("A100, PCIe 4", 312e12, 32e9)
H100 = _gpu("H100 SXM, NVLink", 989.4e12, 450e9)
H200 = _gpu("H200 SXM, NVLink", 989.4e12, 450e9)

MACHINES: dict[str, Machine] = {
    "TPU v4": V4,
    "TPU v5 lite": V5E,
    "TPU v5e": V5E,
    "TPU v5": V5P,
    "TPU v5p": V5P,
    "TPU v6 lite": V6E,
    "TPU v6e": V6E,
    "TPU7x": V7X,
    "NVIDIA A100-SXM4-40GB": A100,
    "NVIDIA A100-SXM4-80GB": A100,
    "NVIDIA A100-PCIE-40GB": A100_PCIE,
    "NVIDIA A100 80GB PCIe": A100_PCIE,
    "NVIDIA H100 80GB HBM3": H100,
    "NVIDIA H100 PCIe": _gpu("H100, PCIe 5", 756e12, 64e9),
    "NVIDIA H100 NVL": _gpu("H100 NVL, PCIe 5", 835.5e12, 64e9),
    "NVIDIA H200": H200,
    "NVIDIA H200 NVL": _gpu("H200 NVL, PCIe 5", 835.5e12, 64e9),
}
"""JAX's `device_kind` -> the machine.

Sources: Google Cloud's page on each TPU's architecture (docs.cloud.google.com/tpu/docs/v5p and the like;
a link has half of the chip's bandwidth both ways, over its 4 or 6 links), and NVIDIA's data sheets of the
A100, H100 and H200 (dense figures, half of those with sparsity; half of the bandwidth both ways). Cards for a
PCIe slot have PCIe's: an NVLink bridge joins two of them, or four, and a ring over more passes the slot.
"""


def machine_of(device: Any) -> Machine:
    """The machine of a JAX device; of kinds that are not in `MACHINES` an H100 for a GPU, else a TPU v5p."""
    return MACHINES.get(device.device_kind, H100 if device.platform == "gpu" else V5P)


@dataclass(frozen=True)
class Heads:
    """The shape of a layer's attention.

    Attributes:
      query: N, query heads; key: K, key heads; dim: H, the size of each.
      value_dim: V, the size of values; None: as keys.
      dtype: what queries, keys and values are kept in; gradients of keys and values travel in float32.
    """

    query: int = 32
    key: int = 8
    dim: int = 128
    dtype: Any = jnp.bfloat16
    value_dim: int | None = None

    def __post_init__(self):
        for name in ("query", "key", "dim", "value_dim"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"heads.{name} must be at least 1, got {getattr(self, name)}")
        if self.query % self.key:
            raise ValueError(f"query heads ({self.query}) must be a multiple of key heads ({self.key})")

    @property
    def values(self) -> int:
        """V."""
        return self.dim if self.value_dim is None else self.value_dim

    def flops(self, each: Pass) -> int:
        """Of a pair, in all heads."""
        return self.query * (each.of_keys * self.dim + each.of_values * self.values)

    def bytes(self, tokens: int, heads: int, *, dtype: Any = None) -> int:
        """Bytes of `[tokens, heads, dim]` and `[tokens, heads, value_dim]` together."""
        size = jnp.dtype(self.dtype if dtype is None else dtype).itemsize
        return tokens * heads * (self.dim + self.values) * size
