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
import numpy as np
from jax import lax
from jax._src.pallas.triton.lowering import triton_lowering_rules  # no public name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

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
    """

    body: Callable
    name: str
    grid: tuple[int, ...]
    operands: Any
    results: Any
    shapes: Any
    warps: int
    stages: int


def strongly_typed(function: Callable, *arguments):
    """`function(*arguments)` of arrays, its literals with a dtype of their own, and what they make computed.

    Where a selection's literals have none, as in `jnp.where(seen, 0.5, 0.0)`, Triton's lowering takes them
    for booleans, like its condition (JAX 0.7 to 0.12).
    """
    leaves, structure = jax.tree.flatten(arguments)

    def flat(*leaves):
        return function(*jax.tree.unflatten(structure, leaves))

    traced, shapes = jax.make_jaxpr(flat, return_shape=True)(*leaves)
    return jax.tree.unflatten(jax.tree.structure(shapes), _evaluated(traced.jaxpr, traced.consts, leaves))


def _known(primitive, given: list, parameters: dict) -> np.ndarray:
    """What an operation makes of literals, of which Triton's lowering cannot negate one, say."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # with JAX_PLATFORMS=cuda there is no other than the card
        device = None
    with jax.default_device(device), jax.ensure_compile_time_eval():
        return np.asarray(primitive.bind(*given, **parameters))


_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}
"""The operations that call a traced function, and what holds it: here it is written out."""
LOWERED = frozenset(primitive.name for primitive in triton_lowering_rules) | _CALLS.keys()
"""The names of the operations that Triton's lowering has."""


def _evaluated(jaxpr, consts, arguments) -> list:
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))

    def value(atom):
        return np.asarray(atom.val, atom.aval.dtype) if hasattr(atom, "val") else values[atom]

    for equation in jaxpr.eqns:
        given, primitive = list(map(value, equation.invars)), equation.primitive
        if primitive.name in _CALLS:
            inner = equation.params[_CALLS[primitive.name]]
            found = _evaluated(inner.jaxpr, inner.consts, given)
        else:
            known = all(isinstance(each, np.ndarray) for each in given) and not equation.outvars[0].aval.shape
            found = (
                _known(primitive, given, equation.params)
                if known
                else primitive.bind(*given, **equation.params)
            )
            found = found if primitive.multiple_results else [found]
        values.update(zip(equation.outvars, found, strict=True))
    return list(map(value, jaxpr.outvars))


def launch(kernel: Launch, *operands):
    """Runs the kernel: compiled where the program is for an NVIDIA card, interpreted elsewhere."""
    compiled, interpreted = (functools.partial(_call, kernel, interpret=flag) for flag in (False, True))
    return lax.platform_dependent(*operands, cuda=compiled, default=interpreted)


def _call(kernel: Launch, *operands, interpret: bool):
    params = None if interpret else plt.CompilerParams(num_warps=kernel.warps, num_stages=kernel.stages)
    shapes = jax.tree.map(lambda x: shape_like(x.shape, x.dtype, operands), kernel.shapes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*pallas-triton.*")
        call = pl.pallas_call(
            functools.partial(_body, kernel, interpret),
            grid=kernel.grid,
            in_specs=kernel.operands,
            out_specs=kernel.results,
            out_shape=shapes,
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
