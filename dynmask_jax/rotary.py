"""Rotary position embedding, from token positions.

Reference: Su et al. 2021, "RoFormer", arXiv:2104.09864; halves are paired as in GPT-NeoX.
"""

import jax.numpy as jnp

from dynmask_jax.array_typing import Array, Float, Int


def rotary(
    x: Float[Array, "B T N H"], position: Int[Array, "R T"], theta: float = 10_000.0
) -> Float[Array, "B T N H"]:
    """Queries or keys with feature pair (i, i + H/2) turned by position · theta^(−2i/H) radians.

    Args:
      x: `[B, T, N, H]`, H even.
      position: `[R, T]`, R being B or 1, or `[T]`.
      theta: the longest wavelength is about 2π·theta tokens.

    Raises:
      ValueError: an odd head dim.
    """
    return rotate(x, position, frequencies(x.shape[-1], theta))


def frequencies(head_dim: int, theta: float) -> Float[Array, " half"]:
    """theta^(−2i/H) for each feature pair i of a head, radians a token.

    Raises:
      ValueError: an odd head dim.
    """
    if head_dim % 2:
        raise ValueError(f"rotary needs an even head dim, got {head_dim}")
    half = head_dim // 2
    return theta ** (-jnp.arange(half, dtype=jnp.float32) / half)


def rotate(
    x: Float[Array, "B T N H"],
    position: Int[Array, "R T"],
    frequency: Float[Array, " half"],
    factor: float = 1.0,
) -> Float[Array, "B T N H"]:
    """factor times queries or keys with feature pair (i, i + H/2) turned by position · frequency[i]."""
    position = position.reshape(-1, position.shape[-1])
    angle = position.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if factor != 1.0:
        cos, sin = factor * cos, factor * sin
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
