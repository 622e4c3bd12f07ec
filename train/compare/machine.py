"""The machine and the versions that a record was made with."""

import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import jax

import dynmask_jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "grain", "numpy")
CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Machine:
    """A machine and its software.

    Attributes:
      processor: its name, as far as the system tells.
      device: that JAX computes on.
      system: kernel, architecture and Python.
      versions: of this project and of what it computes with.
    """

    processor: str
    device: str
    system: str
    versions: dict[str, str]

    @classmethod
    def here(cls) -> "Machine":
        """This one."""
        device = jax.devices()[0]
        return cls(
            processor=_processor(),
            device=f"{device.device_kind} ({device.platform})",
            system=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
            versions={"dynmask_jax": dynmask_jax.__version__, **{name: version(name) for name in PACKAGES}},
        )


def _processor() -> str:
    """The processor's name; of a Linux that does not say it in `platform`, from its own file."""
    if CPU_INFO.exists():
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()
