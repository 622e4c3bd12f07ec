"""What a tile of attention costs in an NVIDIA card's machine code, beside the kernels of JAX and tokamax.

Needs the GPU's compiler (`make gpu-check`), no GPU; the same versions give the same numbers. See
`LEGEND` for what the columns mean. tokamax needs Python 3.12, by which the documentation's table is made.
"""

import importlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import groupby
from operator import itemgetter

import jax
import jax.numpy as jnp

from benchmarks import peers
from benchmarks.gpu_compile import Kernel, compiled, tool
from benchmarks.markdown import table
from benchmarks.sass import Instruction, by_unit
from dynmask_jax import Causal, Tokens, Window, attention, plan
from dynmask_jax.backends import mosaic
from dynmask_jax.backends.gpu import gpu_backend
from dynmask_jax.backends.gpu_options import AMPERE, HOPPER, Grains, Warpgroups, warpgroup_grains
from train.aot.cards import CARDS, Card, missing_compiler

HEADS, BLOCK, TOKENS = 8, 128, 4_096
MATMULS = {"forward": 2, "dq": 3, "dkv": 4}
LIBRARIES = "dynmask_jax, triton", "dynmask_jax, mosaic", "jax", "tokamax, triton", "tokamax, mosaic"


@dataclass(frozen=True)
class Settings:
    """What is compiled: attention in bfloat16 and its gradient, for every card with every head dim."""

    cards: tuple[str, ...]
    head_dims: tuple[int, ...]


QUICK, FULL = Settings(("h100",), (128,)), Settings(tuple(CARDS), (64, 128, 256))


def ours(head_dim: int, card: str, kind: str):
    """Our gradient under a causal window whose length is data: the program of a whole curriculum."""
    backend = gpu_backend(_grains(head_dim, CARDS[card], kind))

    def attend(q, k, v, window):
        seen = plan(Causal() & Window(window), Tokens.sequence(TOKENS), block_q=BLOCK, block_k=BLOCK)
        return attention(q, k, v, seen, backend=backend)

    array = jax.ShapeDtypeStruct((1, TOKENS, HEADS, head_dim), jnp.bfloat16)
    return _gradient(attend), (array, array, array, jax.ShapeDtypeStruct((), jnp.int32))


def _grains(head_dim: int, card: Card, kind: str) -> Grains:
    """Of the kernels for all cards, or of a Hopper's, where the backward pass may have none."""
    grains = (HOPPER if card.capability >= (9, 0) else AMPERE)[head_dim]
    return grains if kind == "triton" else warpgroup_grains(head_dim, grains)


def theirs(head_dim: int):
    """JAX's kernel's gradient, causal, with its own tiles."""
    from jax.experimental.pallas.ops.gpu.attention import mha  # deprecated from JAX 0.12: warns

    array = jax.ShapeDtypeStruct((1, TOKENS, HEADS, head_dim), jnp.bfloat16)
    scale = head_dim**-0.5
    return _gradient(lambda q, k, v: mha(q, k, v, None, sm_scale=scale, causal=True)), (array,) * 3


def tokamaxs(head_dim: int, implementation: str):
    """tokamax's gradient, causal, in the tiles that it chooses for the card, untuned."""
    attend = importlib.import_module("tokamax").dot_product_attention
    array = jax.ShapeDtypeStruct((1, TOKENS, HEADS, head_dim), jnp.bfloat16)
    return _gradient(partial(attend, is_causal=True, implementation=implementation)), (array,) * 3


def _gradient(attend):
    return jax.grad(lambda *arrays: attend(*arrays).astype(jnp.float32).sum(), (0, 1, 2))


def measure(settings: Settings, repeats: int) -> dict:
    """The rows, compiled and read; repeats change nothing. Where the compiler is missing, that."""
    del repeats
    results = {"repeats": None, "tokamax": peers.missing("tokamax") or version("tokamax"), "rows": []}
    if missing_compiler() or tool("nvdisasm") is None:
        return results | {"compiler": missing_compiler() or "nvdisasm is not installed"}
    rows = [
        row
        for card in settings.cards
        for head_dim in settings.head_dims
        for library in LIBRARIES
        if library != "dynmask_jax, mosaic" or CARDS[card].capability == (9, 0)
        for row in _rows(library, card, head_dim)
    ]
    return results | {"compiler": f"XLA of jaxlib {version('jaxlib')}, {_assembler()}", "rows": rows}


def _assembler() -> str:
    """ptxas and its version."""
    command = [tool("ptxas") or "ptxas", "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return "ptxas " + said.split("release ")[1].split(",")[0]


def _rows(library: str, card: str, head_dim: int) -> list[dict]:
    """A library's rows; of a peer that is not there or does not compile, one that says so."""
    read, target, options = _PROGRAMS[library]
    where = {"library": library, "card": card, "head_dim": head_dim}
    if why := _missing(library):
        return [where | {"kernel": "forward", "refused": why}]
    if target == "ours":
        options = options | {"card": card}
    try:
        program = compiled(card, f"benchmarks.gpu_cost:{target}", {"head_dim": head_dim, **options})
    except RuntimeError as error:
        if target == "ours":
            raise
        return [where | {"kernel": "forward", "refused": _reason(str(error))}]
    return [
        where | _row(loop, CARDS[card], head_dim) for loop in read(program.kernels, CARDS[card], head_dim)
    ]


def _missing(library: str) -> str | None:
    """Why a library has no kernels here, or None."""
    if library == "dynmask_jax, mosaic" and jax.__version_info__ < mosaic.LEAST_VERSION:
        return "needs JAX " + ".".join(map(str, mosaic.LEAST_VERSION))
    return peers.missing("tokamax") if library.startswith("tokamax") else None


def _reason(error: str) -> str:
    reasons = {
        "Shared memory size limit exceeded": "shared memory",
        "only supported for sm90 and sm100": "no gradient",
    }
    return next((reason for words, reason in reasons.items() if words in error), "does not compile")


@dataclass(frozen=True)
class _Loop:
    """A loop of a kernel: what it computes, for which blocks, and of how many pairs in a turn."""

    kernel: str
    path: str
    pairs: int
    compiled: Kernel
    body: list[Instruction]

    @property
    def warps(self) -> int:
        """How many run it."""
        return (self.compiled.threads - self.compiled.loading) // 32

    @property
    def multiply_adds(self) -> int:
        """On the tensor cores, in a turn."""
        return self.warps * sum(each.multiply_adds for each in self.body)


def _our_loops(kernels: dict[str, Kernel], card: Card, head_dim: int, *, kind: str) -> Iterator[_Loop]:
    """Of the kernels of this kind alone: a Hopper's program may have both."""
    grains = _grains(head_dim, card, kind)
    for name in MATMULS:
        grain = getattr(grains, name)
        if isinstance(grain, Warpgroups) != (kind == "mosaic"):
            continue
        kernel = kernels[f"dynmask_{name}"]
        for blocks, body in zip(("full", "test"), kernel.code.loops, strict=True):
            yield _Loop(name, blocks, grain.line * grain.column, kernel, body)


def _jaxs_loops(kernels: dict[str, Kernel], card: Card, head_dim: int) -> Iterator[_Loop]:
    """Of its two kernels the backward one has a loop for dk and dv, then one for dq."""
    from jax.experimental.pallas.ops.gpu.attention import BlockSizes

    tiles = BlockSizes.get_default()
    forward, backward = kernels["mha_forward"], kernels["mha_backward"]
    yield _Loop("forward", "every", tiles.block_q * tiles.block_k, forward, forward.code.loops[0])
    pairs = (tiles.block_q_dkv or 0) * (tiles.block_kv_dkv or 0)
    for name, body in zip(("dkv", "dq"), backward.code.loops, strict=True):
        yield _Loop(name, "every", pairs, backward, body)


def _tokamaxs_triton_loops(kernels: dict[str, Kernel], card: Card, head_dim: int) -> Iterator[_Loop]:
    """In the tiles of its heuristics, 0.0.17. Forward, the one block to test of a line is in no loop."""
    forward, backward = kernels["pallas_flash_attention_fwd_res"], kernels["pallas_flash_attention_vjp"]
    yield _Loop("forward", "full", 64 * 64, forward, forward.code.loops[0])
    order = (
        ("dkv", "test", 16 * 64),
        ("dkv", "full", 32 * 64),
        ("dq", "test", 64 * 16),
        ("dq", "full", 64 * 32),
    )
    for (name, blocks, pairs), body in zip(order, backward.code.loops, strict=True):
        yield _Loop(name, blocks, pairs, backward, body)


def _tokamaxs_mosaic_loops(kernels: dict[str, Kernel], card: Card, head_dim: int) -> Iterator[_Loop]:
    """In the tiles of its heuristics, 0.0.17. Backward, a branch in the loop leads around the mask."""
    (forward,) = (kernel for name, kernel in kernels.items() if name.startswith("flash_attention"))
    for blocks, body in zip(("full", "test"), forward.code.loops, strict=True):
        yield _Loop("forward", blocks, 128 * (64 if head_dim == 256 else 128), forward, body)
    backward = (kernel for name, kernel in kernels.items() if name.startswith("anonymous"))
    by_products = sorted(backward, key=lambda kernel: by_unit(kernel.code.loops[0])["tensor"])
    for name, kernel in zip(("dq", "dkv"), by_products, strict=True):
        (body,) = kernel.code.loops
        yield _Loop(name, "full", 128 * 64, kernel, kernel.code.without_branch(body))
        yield _Loop(name, "test", 128 * 64, kernel, body)


_PROGRAMS = {
    "dynmask_jax, triton": (partial(_our_loops, kind="triton"), "ours", {"kind": "triton"}),
    "dynmask_jax, mosaic": (partial(_our_loops, kind="mosaic"), "ours", {"kind": "mosaic"}),
    "jax": (_jaxs_loops, "theirs", {}),
    "tokamax, triton": (_tokamaxs_triton_loops, "tokamaxs", {"implementation": "triton"}),
    "tokamax, mosaic": (_tokamaxs_mosaic_loops, "tokamaxs", {"implementation": "mosaic_gpu"}),
}


def _row(loop: _Loop, card: Card, head_dim: int) -> dict:
    kernel, units, of_thousand = loop.compiled, by_unit(loop.body), 1000 / loop.pairs
    needed = MATMULS[loop.kernel] * loop.pairs * head_dim
    if loop.multiply_adds < needed:
        raise ValueError(
            f"{loop.kernel}, {loop.path}: {loop.multiply_adds:,} multiply-adds are too few for a turn"
        )
    return {
        "kernel": loop.kernel,
        "path": loop.path,
        "pairs": loop.pairs,
        "registers": kernel.registers,
        "spills": kernel.spills,
        "shared": kernel.shared,
        "resident": _resident(card, kernel),
        "units": units,
        "products": loop.multiply_adds / needed,
        "cycles": {
            "tensor": of_thousand * loop.multiply_adds / card.tensor,
            "special": of_thousand * loop.warps * units["special"] * 32 / 16,  # 16 lanes
            "issue": of_thousand * loop.warps * sum(units.values()) / 4,  # one a cycle in each quarter
        },
    }


def _resident(card: Card, kernel: Kernel) -> int:
    """Programs that an SM holds at once."""
    by_registers = 65_536 // (kernel.registers * kernel.threads)
    return min(by_registers, card.shared // (kernel.shared + 1024), card.threads // kernel.threads)


LEGEND = f"""The machine code that NVIDIA's compiler makes of one turn of a kernel's loop, counted, without a
card and the same each time ({{versions}}). bfloat16, {HEADS} heads, {TOKENS:,} tokens; ours under a causal
window whose length is data, with a loop for full blocks and one for those to test: through Triton for all
cards, and through Mosaic GPU for a Hopper, which at head dim 256 has none for the backward pass. The others
are causal, in the tiles that they take untuned: JAX's own kernel
(`jax.experimental.pallas.ops.gpu.attention`), which masks every block, and tokamax's two, through Triton and
Mosaic GPU. Forward, tokamax's Triton kernel has one block to test in a line: it is in no loop, and not
counted. Its Mosaic GPU has a gradient on Hopper alone.

- registers of a thread, bytes spilled, KiB of shared memory, and how many programs an SM holds with them;
- instructions of a warp in a turn: of the tensor cores, the special-function unit (exponentials), float32,
  memory, and the rest (integers, comparisons, control);
- cycles of an SM for a thousand pairs: the tensor cores' at their peak rate, for all that they multiply, be
  it the same product in several warps; those of the special-function unit; those that issuing all
  instructions takes, one a cycle in each quarter of an SM, without a warpgroup that loads for the others.
  The greatest is a bound that no schedule beats. A tile of fewer than 64 rows uses the older `HMMA` on a
  Hopper, at less than the peak. Waiting for memory is in none of these numbers, and no card has measured
  them yet."""


def section(results: dict) -> str:
    """The rows as a table for each card and head dim."""
    versions = [results["compiler"], f"tokamax {results['tokamax']}"]
    parts = [LEGEND.format(versions=", ".join(versions))]
    columns = ["kernel", "blocks", "library", "registers", "spilled", "KiB", "programs", "tensor", "special"]
    columns += ["float", "memory", "other", "tensor cycles", "special", "issue", "bound"]
    for (card, head_dim), group in groupby(results["rows"], itemgetter("card", "head_dim")):
        rows = sorted(group, key=_place)
        parts.append(f"{CARDS[card].name}, head dim {head_dim}:")
        parts.append(table(columns, list(map(_cells, rows))))
    return "\n\n".join(parts)


def bounds(results: dict, card: str, head_dims: tuple[int, ...]) -> str:
    """The bounds of full blocks / of blocks to test, ours beside tokamax's, as a table: for docs/gpu.md."""
    found = {
        (row["kernel"], row["head_dim"], row["library"], row["path"]): f"{max(row['cycles'].values()):.0f}"
        for row in results["rows"]
        if row["card"] == card and "refused" not in row
    }
    libraries = [name for name in LIBRARIES if name != "jax"]
    lines = [
        [kernel, str(head_dim)]
        + [
            " / ".join(found.get((kernel, head_dim, name, path), "–") for path in ("full", "test"))
            for name in libraries
        ]
        for head_dim in head_dims
        for kernel in MATMULS
    ]
    return table(["kernel", "head dim", *libraries], lines)


def _place(row: dict) -> tuple[int, int, str]:
    return list(MATMULS).index(row["kernel"]), LIBRARIES.index(row["library"]), row.get("path", "")


def _cells(row: dict) -> list[str]:
    if "refused" in row:
        return [row["kernel"], "–", row["library"], row["refused"], *["–"] * 12]
    cycles = row["cycles"]
    counts = [row["registers"], row["spills"], round(row["shared"] / 1024), row["resident"]]
    counts += [row["units"][unit] for unit in ("tensor", "special", "float", "memory", "other")]
    times = [f"{cycles[unit]:.0f}" for unit in ("tensor", "special", "issue")]
    name = [row["kernel"], row["path"], row["library"]]
    return [*name, *map(str, counts), *times, f"{max(cycles.values()):.0f}"]
