"""Devices of a TPU topology that is not there, for libtpu's compiler, which needs none."""

import importlib.util
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}
"""libtpu asks neither a metadata server nor other hosts what it runs on, and shares the machine."""

EXAMPLES = "v4:2x2x1, v5e:4x4, v5p:8x8x4, v6e:16x16, tpu7x:2x2x1"
_SIZE = r"([\d.]+)([KMGT]?)"
_REFUSALS = rf"Used {_SIZE} of {_SIZE} hbm", rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class OutOfMemory(ValueError):
    """The compiler refuses a program that a device has too little memory for.

    Attributes:
      used: bytes that the program needs of each device.
      limit: bytes that each device has.
    """

    def __init__(self, message: str, used: int, limit: int):
        super().__init__(message)
        self.used, self.limit = used, limit


def devices_of(topology: str) -> list[Any]:
    """The devices of a topology by its name; JAX computes on the CPU from here on, in this process.

    Raises:
      ImportError: libtpu is not installed.
      ValueError: libtpu knows no topology of this name.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            "libtpu, the TPU's compiler, is not installed: pip install -e '.[train,tpu]'; no TPU is needed"
        )
    os.environ.update(WITHOUT_TPU)  # read once, when libtpu is loaded
    jax.config.update("jax_platforms", "cpu")
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # JAX's own, of several types
        raise ValueError(
            f"--topology: libtpu knows no {topology!r}, which is to be a generation and its chips, as"
            f" {EXAMPLES}: {_first_line(error)}"
        ) from error


def memory_of(device: Any) -> int:
    """Bytes of memory that programs have of one device: as the compiler says when it refuses one."""
    mesh = Mesh(np.array([device]), ("device",), axis_types=(AxisType.Auto,))
    here = NamedSharding(mesh, PartitionSpec())
    too_large = jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32, sharding=here)
    try:
        compiled(jax.jit(jnp.tanh).lower(too_large))
    except OutOfMemory as error:
        return error.limit
    raise ValueError(f"the compiler for {device.device_kind} takes a program of 4 TiB: what fits is unknown")


def compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """What the compiler makes of a program.

    Raises:
      OutOfMemory: it does not fit the devices' memory.
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        for said in _REFUSALS:
            if match := re.search(said, str(error)):
                used, limit = (round(float(match[i]) * _UNITS[match[i + 1]]) for i in (1, 3))
                raise OutOfMemory(_first_line(error), used, limit) from error
        raise


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
