"""NVIDIA cards as XLA's compiler needs to know them, which then needs none; and their devices.

The compiler runs where its wheels are, without a driver or a card: `make gpu-check` puts them into a folder
apart, since JAX looks for a card wherever it finds them among its packages, and complains. The numbers are
those of NVIDIA's data sheets and of the compute capability's table in the CUDA C++ Programming Guide, those
of memory its driver's.
"""

import importlib.util
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.experimental import topologies

KIB, GIB = 2**10, 2**30
Result = TypeVar("Result")


@dataclass(frozen=True)
class Card:
    """One kind of card.

    Attributes:
      name: as the driver calls it.
      capability: its compute capability.
      cores: streaming multiprocessors (SMs).
      lanes: float32 units of one.
      clock: GHz, boosted.
      shared: bytes of shared memory of an SM, of which a program gets 1 KiB less.
      threads: that an SM holds.
      memory: bytes, less what the driver keeps.
      bandwidth: of memory, bytes a second.
      cache: bytes of L2.
      tensor: multiply-adds of bfloat16 that one SM's tensor cores do in a cycle, dense.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    lanes: int
    clock: float
    shared: int
    threads: int
    memory: int
    bandwidth: int
    cache: int
    tensor: int

    @property
    def architecture(self) -> str:
        """As `ptxas -arch` takes it."""
        return "sm_90a" if self.capability == (9, 0) else "sm_{}{}".format(*self.capability)

    @property
    def description(self) -> str:
        """The text of XLA's `GpuTargetConfigProto`."""
        major, minor = self.capability
        feature = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
        limit = 2**31 - 1
        return f"""gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: {48 * KIB}
  shared_memory_per_core: {self.shared}
  shared_memory_per_block_optin: {self.shared - KIB}
  threads_per_core_limit: {self.threads}
  core_count: {self.cores}
  fpus_per_core: {self.lanes}
  block_dim_limit_x: {limit}
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  memory_bandwidth: {self.bandwidth}
  l2_cache_size: {self.cache}
  clock_rate_ghz: {self.clock}
  device_memory_size: {self.memory}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}
}}
platform_name: "CUDA"
device_description_str: "{self.name}"
"""


CARDS = {
    "h100": Card(
        name="NVIDIA H100 80GB HBM3",
        capability=(9, 0),
        cores=132,
        lanes=128,
        clock=1.98,
        shared=228 * KIB,
        threads=2048,
        memory=84_942_979_072,
        bandwidth=3_352 * 10**9,
        cache=50 * KIB**2,
        tensor=4096 // 2,
    ),
    "a100": Card(
        name="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        cores=108,
        lanes=64,
        clock=1.41,
        shared=164 * KIB,
        threads=2048,
        memory=85_100_068_864,
        bandwidth=2_039 * 10**9,
        cache=40 * KIB**2,
        tensor=1024,
    ),
    "l4": Card(
        name="NVIDIA L4",
        capability=(8, 9),
        cores=58,
        lanes=128,
        clock=2.04,
        shared=100 * KIB,
        threads=1536,
        memory=22 * GIB,
        bandwidth=300 * 10**9,
        cache=48 * KIB**2,
        tensor=512,
    ),
}
"""name -> the card."""


COMPILER = Path(sys.prefix, "gpu-check")
"""Where `make gpu-check` puts the compiler's wheels, for `compiler_environment`."""


def missing_compiler() -> str | None:
    """Why programs cannot be compiled for a card here; None where they can."""
    plugins = "jax_cuda12_plugin", "jax_cuda13_plugin"
    if any(importlib.util.find_spec(name) or (COMPILER / name).is_dir() for name in plugins):
        return None
    return "the GPU's compiler is not installed: make gpu-check; no GPU is needed"


def devices_of_card(card: str, count: int = 1) -> list[Any]:
    """So many of a card, by its name in `CARDS`; JAX computes on the CPU from here on, in this process.

    Raises:
      ImportError: the compiler is not installed.
      ValueError: the card is unknown.
    """
    if why := missing_compiler():
        raise ImportError(why)
    if card not in CARDS:
        raise ValueError(f"card must be one of {', '.join(CARDS)}, got {card!r}")
    jax.config.update("jax_platforms", "cpu")
    described = topologies.get_topology_desc(
        platform="cuda", target_config=CARDS[card].description, topology=f"1x1x{count}"
    )
    return list(described.devices)


def memory_for_programs(card: str) -> int:
    """Bytes that JAX takes of a card: three quarters, or the share that the environment names."""
    names = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"  # the second is the older
    share = next((os.environ[name] for name in names if os.environ.get(name)), "0.75")
    return int(CARDS[card].memory * float(share))


def compiler_environment() -> dict[str, str]:
    """The environment of a process that compiles: JAX looks for the compiler's tools when it is imported."""
    paths = filter(None, [str(COMPILER), os.environ.get("PYTHONPATH")])
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"}


def in_compiler_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """What a function of a module returns in a process of its own, which finds the compiler.

    Raises:
      ImportError: the compiler is not installed.
      RuntimeError: the process ended before the function did, with its last words.
      Exception: what the function raises.
    """
    if why := missing_compiler():
        raise ImportError(why)
    command, call = [sys.executable, "-m", "train.aot.cards"], pickle.dumps((function, arguments))
    done = subprocess.run(command, input=call, env=compiler_environment(), capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the compiler's process ended: {done.stderr[-4000:].decode(errors='replace')}")
    result = pickle.loads(done.stdout)
    if isinstance(result, Exception):
        raise result
    return result


def _serve():
    """The process's part of `in_compiler_process`."""
    function, arguments = pickle.load(sys.stdin.buffer)
    try:
        result = function(*arguments)
    except Exception as error:
        result = error
    pickle.dump(result, sys.stdout.buffer)


if __name__ == "__main__":
    _serve()
