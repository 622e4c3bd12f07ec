"""Pallas kernels for NVIDIA cards through Triton: all that touches that lowering is here.

Triton serves Ampere, Ada, Hopper and Blackwell on every version of JAX we support. From 0.11 JAX warns that
it is to be removed: by then Mosaic GPU runs on Ampere too, and a kernel moves there one at a time.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.pallas.triton.lowering import triton_lowering_rules  # no public name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from dynmask_jax.backends.tile_expressions import CALLS
from dynmask_jax.vma import shape_like

load, store = plt.load, plt.store


@dataclass(frozen=True)
class Launch:
    """A kernel and how it is launched.

    Attributes:
      body: `(program, *operands, *results) -> None`: its number along each axis of the grid, and refs.
      name: in profiles.
      grid: programs along each axis, the first fastest.
      operands, results: their `BlockSpec`s, in the structures of what is given and what comes out.
      shapes: of the results.
      warps: of 32 threads, in a program.
      stages: how many blocks of keys are on their way from memory at once.
      in_place: how many of the last operands are written over by the results, each by one of its type.
    """

    body: Callable
    name: str
    grid: tuple[int, ...]
    operands: Any
    results: Any
    shapes: Any
    warps: int
    stages: int
    in_place: int = 0


LOWERED = frozenset(primitive.name for primitive in triton_lowering_rules) | CALLS.keys()
"""The names of the operations that Triton's lowering has."""


def launch(kernel: Launch, *operands):
    """Runs the kernel: compiled where the program is for an NVIDIA card, interpreted elsewhere."""
    compiled, interpreted = (functools.partial(_call, kernel, interpret=flag) for flag in (False, True))
    return lax.platform_dependent(*operands, cuda=compiled, default=interpreted)


def _call(kernel: Launch, *operands, interpret: bool):
    params = None if interpret else plt.CompilerParams(num_warps=kernel.warps, num_stages=kernel.stages)
    shapes = jax.tree.map(lambda x: shape_like(x.shape, x.dtype, operands), kernel.shapes)
    first = len(jax.tree.leaves(operands)) - kernel.in_place
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*pallas-triton.*")
        call = pl.pallas_call(
            functools.partial(_body, kernel, interpret),
            grid=kernel.grid,
            in_specs=kernel.operands,
            out_specs=kernel.results,
            out_shape=shapes,
            input_output_aliases={first + n: n for n in range(kernel.in_place)},
            name=kernel.name,
            compiler_params=params,
            interpret=interpret,
        )
        return call(*operands)


def _body(kernel: Launch, interpret: bool, *refs):
    program = tuple(pl.program_id(axis) for axis in range(len(kernel.grid)))
    if not interpret:
        kernel.body(program, *refs)
        return

    def once(done):
        kernel.body(program, *refs)
        return ~done

    # Inside `shard_map` the interpreter minds which operands vary over mesh axes, but not in a loop.
    lax.while_loop(lambda done: ~done, once, jnp.asarray(False))
