"""What the schedules of single blocks say of a whole step: causal windows that grow over one sequence."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.exposure import bound, pairs
from benchmarks.markdown import share, table
from benchmarks.tpu_attention import BLOCK, STRIP
from dynmask_jax import Causal, Tokens, Window
from dynmask_jax.backends.tpu_strips import strips_of
from dynmask_jax.block_codes import FULL, TEST
from dynmask_jax.plans import plan_in

TOKENS = 8_192
WINDOWS = tuple(TOKENS // 2**n for n in range(7))
STRIPS = BLOCK // STRIP

WORDS = f"""A step's cycles at each exposure: those of its blocks, summed, over those of the full causal mask,
for causal windows over {TOKENS:,} tokens, forward and backward, head dim 128; beside it the bound that is
aimed at on a CPU, 1.15·e + 0.06. Below 1,024 tokens it is missed: a step's fixed part and the chain of one
strip weigh more there, and strips leave out keys, not queries."""


def counts(window: int) -> dict[int | str, int]:
    """Blocks of a causal window: those in full, "full", and those in part by how many strips they show."""
    found = _blocks(jnp.int32(window))
    return {name: int(number) for name, number in zip(("full", *range(1, STRIPS + 1)), found, strict=True)}


@jax.jit
def _blocks(window):
    tokens = Tokens.sequence(TOKENS)
    blocks, fine = (BLOCK, BLOCK), (STRIP, STRIP)
    plan = plan_in(Causal() & Window(window), tokens, tokens, blocks=blocks, fine=fine)
    words = strips_of(plan)
    assert words is not None, "blocks of 512 have strips"
    shown = jnp.where(plan.codes == TEST, words & 15, 0)
    return [(plan.codes == FULL).sum(), *((shown == number).sum() for number in range(1, STRIPS + 1))]


def section(shapes: dict[tuple, Callable[[str, str], int | None]]) -> str:
    """The table: for each topology and head dim, `cycles(kernel, path)` of our kernels, or None."""
    shapes = {shape: cycles for shape, cycles in shapes.items() if shape[-1] == 128}
    of_windows = {window: counts(window) for window in WINDOWS}
    totals = {shape: _totals(cycles, of_windows) for shape, cycles in shapes.items()}
    lines = []
    for at, window in enumerate(WINDOWS):
        exposure = pairs(TOKENS, window) / pairs(TOKENS, TOKENS)
        cells = [share(total[at] / total[0]) for total in totals.values()]
        lines.append([f"{window:,}", share(exposure), share(bound(exposure, TOKENS)), *cells])
    columns = ["window", "exposure", "bound", *(topology for topology, *_ in totals)]
    return f"{WORDS}\n\n{table(columns, lines)}"


def _totals(cycles, of_windows: dict[int, dict]) -> np.ndarray:
    def of(kernel: str, strips: int | str) -> int:
        path = "full" if strips == "full" else f"{strips} strip" + "s" * (strips != 1)
        return cycles(kernel, path) or cycles(kernel, "partial")

    return np.array(
        [
            sum(number * (of("forward", kind) + of("backward", kind)) for kind, number in found.items())
            for found in of_windows.values()
        ]
    )
