"""Where a call made now would be computed, for what is chosen by platform."""

import jax


def present_platform() -> str:
    """ "cpu", "gpu" or "tpu": that of `jax.default_device`, where it is set, or else JAX's default."""
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform
