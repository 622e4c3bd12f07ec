"""What is chosen by platform: a table, and the platform of a call made now."""

import re
from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Platform:
    """What is used on a platform where the caller names nothing else.

    Attributes:
      backend: the name of the attention backend.
      blocks: queries and keys in a block of a plan.
      fine: tokens on each side of its small blocks, for lines that show little; None where there are none.
    """

    backend: str
    blocks: tuple[int, int]
    fine: int | None = None


PLATFORMS = {
    "cpu": Platform("xla", (512, 512), fine=64),
    "tpu": Platform("tpu", (512, 512), fine=128),
    "gpu": Platform("gpu", (128, 128)),
}
"""JAX's name of a platform -> its defaults; on others the defaults are those of "cpu"."""
OTHER_CARD = Platform("xla_wide", (128, 128))
"""Of a card that there are no kernels for: AMD's, and NVIDIA's of a compute capability below 8 (T4, V100)."""


def defaults_of(platform: str | None = None) -> Platform:
    """The row of `PLATFORMS` for a platform; None: for the present one."""
    if platform is None and present_platform() == "gpu" and (compute_capability() or 0) < 8:
        return OTHER_CARD
    return PLATFORMS.get(present_platform() if platform is None else platform, PLATFORMS["cpu"])


def present_platform() -> str:
    """ "cpu", "gpu" or "tpu": that of `jax.default_device`, where it is set, or else JAX's default."""
    device = _default_device()
    if device is None:
        return jax.default_backend()
    name = device if isinstance(device, str) else device.platform
    return {"cuda": "gpu"}.get(name, name)


def compute_capability() -> float | None:
    """Of the present NVIDIA card, 8.9 of an L4, say; None of other cards, and on other platforms."""
    if present_platform() != "gpu":
        return None
    device = _default_device()
    if device is None or isinstance(device, str):
        try:
            device = jax.local_devices(backend=device)[0]
        except RuntimeError:  # named, and not there: a program may be compiled for it
            return None
    # That of an AMD card is a name, gfx90a.
    found = re.fullmatch(r"\d+\.\d+", str(getattr(device, "compute_capability", "")))
    return None if found is None else float(found[0])


def _default_device():
    return jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
