"""What is chosen by platform: a table, and the platform of a call made now."""

from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Platform:
    """What is used on a platform where the caller names nothing else.

    Attributes:
      backend: the name of the attention backend.
      blocks: queries and keys in a block of a plan.
    """

    backend: str
    blocks: tuple[int, int]


PLATFORMS = {
    "cpu": Platform("xla", (512, 512)),
    "tpu": Platform("tpu", (512, 512)),
    # All lines of blocks are in memory at once, each with a tile.
    "gpu": Platform("xla_wide", (128, 128)),
}
"""JAX's name of a platform -> its defaults; on others the defaults are those of "cpu"."""


def defaults_of(platform: str | None = None) -> Platform:
    """The row of `PLATFORMS` for a platform; None: for the present one."""
    return PLATFORMS.get(present_platform() if platform is None else platform, PLATFORMS["cpu"])


def present_platform() -> str:
    """ "cpu", "gpu" or "tpu": that of `jax.default_device`, where it is set, or else JAX's default."""
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform
