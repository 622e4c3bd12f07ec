"""Pallas kernels for Hopper through Mosaic GPU: all that touches that lowering is here.

A program is some warpgroups of 128 threads that compute, and one that brings what they need from memory.
Matrices are multiplied asynchronously (wgmma) from shared memory, into which they are copied as blocks
(TMA). On other platforms the kernels are interpreted, in tests, with every access checked for races.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dynmask_jax.backends.kernel_tile import dot
from dynmask_jax.errors import Unsupported
from dynmask_jax.platforms import present_platform

ROWS = 64
"""Rows of the products that one warpgroup computes."""
LEAST_VERSION = (0, 11, 2)
"""Of JAX: from it on Mosaic GPU has an interpreter, without which nothing shows that a kernel is right."""


def missing() -> str | None:
    """What Mosaic GPU lacks here, or None."""
    version = jax.__version_info__
    if version < LEAST_VERSION:
        return "JAX {}.{}.{} or newer (this is {})".format(*LEAST_VERSION, jax.__version__)
    try:
        from jax._src.lib import cuda_versions  # no public name
    except ImportError:
        return None
    # JAX's own attention kernel refuses masks there: ptxas miscompiles them.
    if cuda_versions is not None and 12080 <= cuda_versions.cuda_runtime_get_version() < 12091:
        return "a CUDA other than 12.8.0 to 12.9.0, whose ptxas miscompiles kernels with masks"
    return None


def interpreted() -> bool:
    """Whether kernels are interpreted: wherever the program is not for a card."""
    return present_platform() != "gpu"


def _gpu() -> Any:
    """Mosaic GPU's part of Pallas, which is imported where it is used alone: it is not on every platform."""
    if (why := missing()) is not None:
        raise Unsupported(f"a kernel of warpgroups needs {why}; a Grain takes another kernel")
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu


@dataclass(frozen=True)
class Launch:
    """A kernel and how it is launched.

    Attributes:
      body: `(program, operands, results, scratch) -> None`: its number along each axis of the grid, refs to
        whole arrays, and the scratch.
      name: in profiles.
      grid: programs along each axis, the first fastest.
      warpgroups: that compute.
      results: types.
      scratch: what `shared`, and `barriers` make.
    """

    body: Callable
    name: str
    grid: tuple[int, int, int]
    warpgroups: int
    results: Any
    scratch: Any


AXES = "line", "head", "row"


def launch(kernel: Launch, operands):
    """Runs the kernel: results in the structure of its types."""
    gpu = _gpu()
    given, structure = jax.tree.flatten(operands)
    types, of_results = jax.tree.flatten(kernel.results)
    allocated, of_scratch = jax.tree.flatten(kernel.scratch)

    def body(*refs):
        parts = refs[: len(given)], refs[len(given) : -len(allocated)], refs[-len(allocated) :]
        trees = (structure, of_results, of_scratch)
        refs_of = (jax.tree.unflatten(tree, part) for tree, part in zip(trees, parts, strict=True))
        kernel.body(tuple(map(lax.axis_index, AXES)), *refs_of)

    body.__name__ = kernel.name
    extra = {"interpret": gpu.InterpretGPUParams(detect_races=True)} if interpreted() else {}
    call = gpu.kernel(
        body,
        out_type=types,
        scratch_types=allocated,
        grid=kernel.grid[::-1],  # of a card's axes the last one here is the fastest
        grid_names=AXES[::-1],
        num_threads=kernel.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=gpu.CompilerParams(approx_math=True),
        **extra,
    )
    return jax.tree.unflatten(of_results, call(*given))


def shared(shape: tuple[int, ...], dtype) -> Any:
    """Shared memory: matrices `[…, rows, columns]` of 16 bits in the order that wgmma reads, or vectors."""
    gpu = _gpu()
    if jnp.dtype(dtype).itemsize == 2:
        wide = min(shape[-1] * 2, 128)
        order = gpu.TilingTransform((8, wide // 2)), gpu.SwizzleTransform(wide)
        return gpu.SMEM(shape, dtype, transforms=order)
    return gpu.SMEM(shape, dtype)


def barriers(count: int, arrivals: int) -> Any:
    """So many barriers, each of which opens when so many have arrived."""
    return _gpu().Barrier(num_arrivals=arrivals, num_barriers=count)


def arrive(barrier):
    """Says that this warpgroup is as far as the barrier."""
    _gpu().barrier_arrive(barrier)


def wait(barrier):
    """Waits until the barrier opens, once more than before."""
    _gpu().barrier_wait(barrier)


def roles(warpgroups: int, compute: Callable, bring: Callable):
    """The warpgroups that compute do `compute(number)`, the one beyond them does `bring()`."""
    gpu, number = _gpu(), lax.axis_index("warpgroup")

    @pl.when(number < warpgroups)
    def _():
        gpu.set_max_registers(_REGISTERS[warpgroups], action="increase")
        compute(number)

    @pl.when(number == warpgroups)
    def _():
        gpu.set_max_registers(_LEAST_REGISTERS, action="decrease")
        bring()


_REGISTERS, _LEAST_REGISTERS = {1: 240, 2: 232}, 40
"""Warpgroups that compute -> registers of each of their threads; and of those that bring.

Three warpgroups begin with 168 registers a thread, 504 in all: more than these and the kernel waits for ever.
"""


def bring(source, target, barrier):
    """Begins to copy from memory to shared memory; the barrier is arrived at when it is done."""
    _gpu().copy_gmem_to_smem(source, target, barrier)


def send(pairs: list[tuple]):
    """Copies from shared memory, once all threads have written it, to memory, and waits."""
    gpu = _gpu()
    gpu.commit_smem()
    for source, target in pairs:
        gpu.copy_smem_to_gmem(source, target)
    gpu.wait_smem_to_gmem(0)


def store(target, value):
    """Writes a product from registers to memory: for what is rare, since threads write little at a time."""
    _gpu().store(target, value.astype(target.dtype), optimized=False)


def have_read():
    """Before a warpgroup lets shared memory be overwritten that it has read, not multiplied."""
    _gpu().commit_smem()


def of_rows(ref):
    """A vector in shared memory, one number for each row of a product."""
    gpu = _gpu()
    return gpu.load(ref, layout=gpu.Layout.WGMMA.reduce(1))


def of_columns(ref):
    """A vector in shared memory, one number for each column of a product."""
    gpu = _gpu()
    return gpu.load(ref, layout=gpu.Layout.WGMMA.reduce(0))


def filled_rows(value: float):
    """One number for each row of a product."""
    gpu = _gpu()
    return gpu.layout_cast(jnp.full(ROWS, value, jnp.float32), gpu.Layout.WGMMA.reduce(1))


def zeros(columns: int):
    """A product, or a sum of products, that is zero."""
    gpu = _gpu()
    return gpu.layout_cast(jnp.zeros((ROWS, columns), jnp.float32), gpu.Layout.WGMMA)


def across(x, like):
    """One number for each row, on all columns."""
    return lax.broadcast_in_dim(x, like.shape, [0])


def down(x, like):
    """One number for each column, on all rows."""
    return lax.broadcast_in_dim(x, like.shape, [1])


def turned(ref):
    """A matrix in shared memory, transposed."""
    return ref.transpose((1, 0))


def product(a, b, meanwhile: Callable[[], None] = lambda: None):
    """a · b of matrices in shared memory, `[rows, columns]`; `meanwhile` happens while it is computed."""
    gpu = _gpu()

    def compute(total):
        gpu.wgmma(total, a, b)
        meanwhile()
        return total[...]

    return pl.run_scoped(compute, gpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def add_product(total, a, b):
    """total + a · b, of a in registers and b in shared memory.

    The compiler alone sees this product: the interpreter has none with an operand in registers.
    """
    gpu = _gpu()
    if interpreted():
        total = total + dot(a, b[...], 1, 0)
        have_read()
        return total
    return pl.run_state(lambda sum_: gpu.wgmma(sum_, a, b))(gpu.ACC.init(total))


def in_order(*values):
    """The values, all of which are computed before what follows."""
    return values if interpreted() else lax.optimization_barrier(values)
