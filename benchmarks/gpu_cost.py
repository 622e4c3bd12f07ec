"""What a tile of attention costs in the machine code for an NVIDIA card, beside JAX's own kernel.

Needs the GPU's compiler (`make gpu-check`), no GPU; the same versions give the same numbers. See
`LEGEND` for what the columns mean.
"""

import subprocess
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import groupby
from operator import itemgetter

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha

from benchmarks.gpu_compile import Kernel, compiled, tool
from benchmarks.markdown import table
from benchmarks.sass import by_unit
from dynmask_jax import Causal, Tokens, Window, attention, plan
from dynmask_jax.backends.gpu_options import AMPERE, HOPPER
from train.aot.cards import CARDS, Card, missing_compiler

HEADS, BLOCK, TOKENS = 8, 128, 4_096
MATMULS = {"forward": 2, "dq": 3, "dkv": 4, "backward": 7}
JAX_TILES = BlockSizes.get_default()


@dataclass(frozen=True)
class Settings:
    """What is compiled: attention in bfloat16 and its gradient, for every card with every head dim."""

    cards: tuple[str, ...]
    head_dims: tuple[int, ...]


QUICK, FULL = Settings(("h100",), (128,)), Settings(tuple(CARDS), (64, 128, 256))


def ours(head_dim: int):
    """Our gradient under a causal window whose length is data: the program of a whole curriculum."""

    def attend(q, k, v, window):
        seen = plan(Causal() & Window(window), Tokens.sequence(TOKENS), block_q=BLOCK, block_k=BLOCK)
        return attention(q, k, v, seen, backend="gpu")

    array = jax.ShapeDtypeStruct((1, TOKENS, HEADS, head_dim), jnp.bfloat16)
    return _gradient(attend), (array, array, array, jax.ShapeDtypeStruct((), jnp.int32))


def theirs(head_dim: int):
    """JAX's kernel's gradient, causal, with its own tiles."""
    array = jax.ShapeDtypeStruct((1, TOKENS, HEADS, head_dim), jnp.bfloat16)
    scale = head_dim**-0.5
    return _gradient(lambda q, k, v: mha(q, k, v, None, sm_scale=scale, causal=True)), (array,) * 3


def _gradient(attend):
    return jax.grad(lambda *arrays: attend(*arrays).astype(jnp.float32).sum(), (0, 1, 2))


def measure(settings: Settings, repeats: int) -> dict:
    """The rows, compiled and read; repeats change nothing. Where the compiler is missing, that."""
    del repeats
    if missing_compiler() or tool("nvdisasm") is None:
        return {"repeats": None, "compiler": missing_compiler() or "nvdisasm is not installed", "rows": []}
    rows = [
        row
        for card in settings.cards
        for head_dim in settings.head_dims
        for row in (*_our_rows(card, head_dim), *_their_rows(card, head_dim))
    ]
    return {"repeats": None, "compiler": f"XLA of jaxlib {version('jaxlib')}, {_assembler()}", "rows": rows}


def _assembler() -> str:
    """ptxas and its version."""
    command = [tool("ptxas") or "ptxas", "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return "ptxas " + said.split("release ")[1].split(",")[0]


def _our_rows(card: str, head_dim: int) -> list[dict]:
    grains = (HOPPER if CARDS[card].capability >= (9, 0) else AMPERE)[head_dim]
    program = compiled(card, "benchmarks.gpu_cost:ours", {"head_dim": head_dim})
    rows = []
    for name, grain in (("forward", grains.forward), ("dq", grains.dq), ("dkv", grains.dkv)):
        kernel, pairs = program.kernels[f"dynmask_{name}"], grain.line * grain.column
        for path, body in zip(("full", "test"), kernel.code.loops, strict=True):
            work = _Work(name, path, pairs, head_dim)
            rows.append(_row("dynmask_jax", card, kernel, work, body))
    return rows


def _their_rows(card: str, head_dim: int) -> list[dict]:
    try:
        program = compiled(card, "benchmarks.gpu_cost:theirs", {"head_dim": head_dim})
    except RuntimeError as error:
        why = "shared memory" if "Shared memory size limit exceeded" in str(error) else "does not compile"
        return [{"library": "jax", "card": card, "head_dim": head_dim, "kernel": "forward", "refused": why}]
    forward, backward = program.kernels["mha_forward"], program.kernels["mha_backward"]
    tiles = JAX_TILES
    work = _Work("forward", "causal", tiles.block_q * tiles.block_k, head_dim)
    rows = [_row("jax", card, forward, work, forward.code.loops[0])]
    # One kernel with two loops: for dk and dv, then for dq.
    pairs = (tiles.block_q_dkv or 0) * (tiles.block_kv_dkv or 0)
    for name, body in zip(("dkv", "dq"), backward.code.loops, strict=True):
        rows.append(_row("jax", card, backward, _Work(name, "causal", pairs, head_dim), body))
    return rows


@dataclass(frozen=True)
class _Work:
    """What one turn of a loop computes."""

    kernel: str
    path: str
    pairs: int
    head_dim: int


def _row(library: str, card: str, kernel: Kernel, work: _Work, body: list) -> dict:
    units = by_unit(body)
    return {
        "library": library,
        "card": card,
        **asdict(work),
        "registers": kernel.registers,
        "spills": kernel.spills,
        "shared": kernel.shared,
        "resident": _resident(CARDS[card], kernel),
        "units": units,
        "cycles": _cycles(CARDS[card], kernel, work, units),
    }


def _resident(card: Card, kernel: Kernel) -> int:
    """Programs that an SM holds at once."""
    by_registers = 65_536 // (kernel.registers * kernel.threads)
    return min(by_registers, card.shared // (kernel.shared + 1024), card.threads // kernel.threads)


def _cycles(card: Card, kernel: Kernel, work: _Work, units: dict[str, int]) -> dict[str, float]:
    """Cycles of an SM for a thousand pairs: the least that each unit needs of this code."""
    warps, thousands = kernel.threads // 32, work.pairs / 1000
    return {
        "tensor": work.pairs * work.head_dim * MATMULS[work.kernel] / card.tensor / thousands,
        "special": warps * units["special"] * 32 / 16 / thousands,  # 16 lanes
        "issue": warps * sum(units.values()) / 4 / thousands,  # one instruction a cycle in each quarter
    }


LEGEND = f"""The machine code that NVIDIA's compiler makes of one turn of a kernel's loop, counted, without a
card and the same each time ({{compiler}}). bfloat16, {HEADS} heads, {TOKENS:,} tokens; ours under a causal
window whose length is data, with a loop for full blocks and one for those to test; JAX's own kernel
(`jax.experimental.pallas.ops.gpu.attention`) causal, in the tiles that are its defaults, every block masked.

- registers of a thread, bytes spilled, KiB of shared memory, and how many programs an SM holds with them;
- instructions of a warp in a turn: of the tensor cores, the special-function unit (exponentials), float32,
  memory, and the rest (integers, comparisons, control);
- cycles of an SM for a thousand pairs: the tensor cores' at their peak rate; those of the special-function
  unit; those that issuing all instructions takes, one a cycle in each quarter of an SM. The greatest is a
  bound that no schedule beats. A tile of fewer than 64 rows uses the older `HMMA` on a Hopper, at less than
  the peak. Waiting for memory is in none of these numbers, and no card has measured them yet."""


def section(results: dict) -> str:
    """The rows as a table for each card and head dim."""
    parts = [LEGEND.format(compiler=results["compiler"])]
    columns = ["kernel", "blocks", "library", "registers", "spilled", "KiB", "programs", "tensor", "special"]
    columns += ["float", "memory", "other", "tensor cycles", "special", "issue", "bound"]
    for (card, head_dim), group in groupby(results["rows"], itemgetter("card", "head_dim")):
        rows = sorted(group, key=lambda row: (list(MATMULS).index(row["kernel"]), row["library"] == "jax"))
        parts.append(f"{CARDS[card].name}, head dim {head_dim}:")
        parts.append(table(columns, list(map(_cells, rows))))
    return "\n\n".join(parts)


def _cells(row: dict) -> list[str]:
    if "refused" in row:
        return [row["kernel"], "–", row["library"], row["refused"], *["–"] * 12]
    cycles = row["cycles"]
    counts = [row["registers"], row["spills"], round(row["shared"] / 1024), row["resident"]]
    counts += [row["units"][unit] for unit in ("tensor", "special", "float", "memory", "other")]
    times = [f"{cycles[unit]:.0f}" for unit in ("tensor", "special", "issue")]
    name = [row["kernel"], row["path"], row["library"]]
    return [*name, *map(str, counts), *times, f"{max(cycles.values()):.0f}"]
