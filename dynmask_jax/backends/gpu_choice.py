"""Which kernels a call gets on an NVIDIA card: those for all cards, or those of a Hopper's warpgroups."""

import jax.numpy as jnp

from dynmask_jax.backends import mosaic
from dynmask_jax.backends.gpu_blocks import filled_size
from dynmask_jax.backends.gpu_options import (
    KERNELS,
    Grain,
    Grains,
    Warpgroups,
    default_grains,
    warpgroup_grains,
)
from dynmask_jax.backends.tile_expressions import not_elementwise
from dynmask_jax.errors import Unsupported
from dynmask_jax.fields_read import operations
from dynmask_jax.plans import Plan
from dynmask_jax.platforms import compute_capability
from dynmask_jax.scores import Scores

SHARED, SPARE = 227 * 1024, 4 * 1024
"""Bytes of shared memory of a program on a Hopper, and what barriers and alignment take at most."""


def grains_of(given: Grains | None, scores: Scores, plan: Plan, kind: tuple) -> Grains:
    """The tiles of a call's kernels.

    Args:
      given: by the caller: used or refused. None for those of the table that all cards have.
      scores, plan: of the call.
      kind: head dims of keys and values, and dtype.

    Raises:
      Unsupported: a kernel of warpgroups is given, and cannot compute this call.
    """
    if given is None:
        return default_grains(max(kind[:2]), kind[2])
    asked = {name: grain for name in KERNELS if isinstance(grain := getattr(given, name), Warpgroups)}
    for name, grain in asked.items():
        if why := mosaic.missing() or _hindrance(scores, plan, kind) or _too_great(name, grain, plan, kind):
            raise Unsupported(
                f"backend 'gpu': {name}={grain!r} needs {why}; a Grain takes the kernel for all cards"
            )
    return given


def hopper_grains(given: Grains | None, scores: Scores, plan: Plan, kind: tuple) -> Grains | None:
    """Those of a Hopper's warpgroups, where none are given, the card is one, and the call is one for them."""
    if given is not None or compute_capability() != 9.0 or mosaic.missing() or _hindrance(scores, plan, kind):
        return None
    *head_dims, dtype = kind
    heavy = scores.soft_cap is not None or scores.dropout is not None
    return warpgroup_grains(max(head_dims), default_grains(max(head_dims), dtype), heavy=heavy)


def bias_grain(grains: Grains, head_dim: int, dtype) -> Grain:
    """The tile of the kernel that sums the gradients of a bias: that of dq, if Triton compiles that too."""
    dq = grains.dq if isinstance(grains.dq, Grain) else default_grains(head_dim, dtype).dq
    assert isinstance(dq, Grain), "the defaults for all cards are Triton's"
    return dq


def _too_great(name: str, grain: Warpgroups, plan: Plan, kind: tuple) -> str | None:
    """How much more shared memory a kernel would need than a Hopper has, or None."""
    keys, values = map(filled_size, kind[:2])
    lines, columns = (plan.block_k, plan.block_q) if name == "dkv" else (plan.block_q, plan.block_k)
    line, column = min(grain.line, filled_size(lines)), min(grain.column, filled_size(columns))
    wide = line * keys + grain.stages * column * (keys + values)
    if name != "forward" or keys != values:
        wide += line * values
    needed = 2 * wide + 4 * (6 * line + 5 * grain.stages * column) + SPARE
    if needed <= SHARED:
        return None
    return (
        f"{SHARED // 1024} KiB of shared memory or less, got {-(-needed // 1024)} for {kind[0]} and {kind[1]}"
    )


def _hindrance(scores: Scores, plan: Plan, kind: tuple) -> str | None:
    """What a kernel of warpgroups would need that a call does not have, or None."""
    *head_dims, dtype = kind
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"bfloat16 or float16, got {jnp.dtype(dtype)}"
    if min(blocks := (plan.block_q, plan.block_k)) <= mosaic.ROWS // 2:
        return f"blocks of more than {mosaic.ROWS // 2} tokens, got {blocks}"
    if min(map(filled_size, head_dims)) < mosaic.ROWS:
        return f"head dims of more than {mosaic.ROWS // 2}, got {tuple(head_dims)}"
    for expression in (plan.mask, scores.bias):
        if expression is not None and (others := not_elementwise(operations(expression))):
            return f"masks and biases without {', '.join(others)}, got {expression!r}"
    return None
