"""Cycles of one attention block in the TPU compiler's final schedule, beside splash attention's.

Needs libtpu, no TPU; the same versions give the same numbers. See `LEGEND` for what the columns mean.
"""

from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from itertools import groupby, product
from operator import itemgetter

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from benchmarks.markdown import ratio, table
from benchmarks.tpu_compile import kernels
from benchmarks.vliw import Step
from dynmask_jax import ALiBi, Causal, Dropout, Tokens, Window, attention, plan

HEADS, BLOCK = 8, 512

# Multiply-adds per cycle and core: MXUs × rows × columns, from Google Cloud's pages on each TPU version
# (they agree with the published peaks of v4, v5e and v5p at 1.05, 1.5 and 1.75 GHz).
MXU_RATE = {"v4": 4 * 128 * 128, "v5e": 4 * 128 * 128, "v5p": 4 * 128 * 128, "v6e": 2 * 256 * 256}


@dataclass(frozen=True)
class Pass:
    """A kernel of attention: what its name contains, and its matmuls of a block."""

    names: tuple[str, ...]
    matmuls: int


PASSES = {
    "forward": Pass(("fwd", "forward"), 2),
    "dq": Pass(("dq",), 3),
    "dkv": Pass(("dkv",), 4),
}


@dataclass(frozen=True)
class Program:
    """Attention and its gradient in one library, for `tpu_compile`: `target(tokens=, head_dim=, **options)`.

    `paths` are the kinds of block its kernels have branches for, the kind with fewer comparisons first.
    """

    library: str
    target: str
    options: dict[str, str]
    paths: tuple[str, ...]


PROGRAMS = (
    Program("dynmask_jax", "benchmarks.tpu_schedule:ours", {}, ("full", "partial")),
    Program("with ALiBi", "benchmarks.tpu_schedule:ours", {"scores": "bias"}, ("full", "partial")),
    Program("with dropout", "benchmarks.tpu_schedule:ours", {"scores": "dropout"}, ("full", "partial")),
    Program("splash", "benchmarks.tpu_schedule:splash", {"mask": "full"}, ("full",)),
    Program("splash", "benchmarks.tpu_schedule:splash", {"mask": "causal"}, ("partial",)),
)


def ours(tokens: int, head_dim: int, scores: str | None = None):
    """Our gradient under a causal window whose length is data: the program of a whole curriculum.

    `scores` adds a "bias", `ALiBi` of constant slopes, or "dropout" of 0.1.
    """

    def attend(q, k, v, window, seed):
        mask = Causal() & Window(window)
        how = {"bias": ALiBi.for_heads(HEADS), "dropout": Dropout(0.1, seed)}
        return attention(
            q,
            k,
            v,
            plan(mask, Tokens.sequence(tokens), block_q=BLOCK, block_k=BLOCK),
            backend="tpu",
            **({scores: how[scores]} if scores else {}),
        )

    array = jax.ShapeDtypeStruct((1, tokens, HEADS, head_dim), jnp.bfloat16)
    data = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.uint32)
    return gradient(attend), (array, array, array, *data)


def splash(mask: str, tokens: int, head_dim: int):
    """Splash attention's gradient: its forward, dq and dkv kernels, and the shapes of q, k and v."""
    shape = (tokens, tokens)
    one_head = splash_mask.CausalMask(shape) if mask == "causal" else splash_mask.FullMask(shape)
    sizes = splash_kernel.BlockSizes(
        block_q=BLOCK,
        block_kv=BLOCK,
        block_kv_compute=BLOCK,
        block_q_dkv=BLOCK,
        block_kv_dkv=BLOCK,
        block_kv_dkv_compute=BLOCK,
        block_q_dq=BLOCK,
        block_kv_dq=BLOCK,
    )
    heads = splash_mask.MultiHeadMask([one_head] * HEADS)
    attend = splash_kernel.make_splash_mha(mask=heads, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    return gradient(attend), (jax.ShapeDtypeStruct((HEADS, tokens, head_dim), jnp.bfloat16),) * 3


def gradient(attend):
    """The gradient of the output's sum by q, k and v."""
    return jax.grad(lambda *args: attend(*args).astype(jnp.float32).sum(), (0, 1, 2))


@dataclass(frozen=True)
class Row:
    """One kernel's step with one kind of block."""

    library: str
    kernel: str
    path: str
    topology: str
    tokens: int
    head_dim: int
    bound: float | None
    step: Step


def rows_of(program: Program, topology: str, tokens: int, head_dim: int) -> list[Row]:
    """Compiles a program and reads its kernels: a row for each of its passes and kinds of block.

    Raises ValueError where a pass has no kernel, or its kernel more or fewer branches than were named.
    """
    found = kernels(topology, program.target, {"tokens": tokens, "head_dim": head_dim} | program.options)
    rows = []
    for way, way_pass in PASSES.items():
        named = [name for name in found if any(part in name for part in way_pass.names)]
        if len(named) != 1:
            raise ValueError(f"{program.library}: one kernel for {way} expected, found {named} in {[*found]}")
        steps = sorted(found[named[0]].steps(), key=lambda step: step.compares)
        if len(steps) != len(program.paths):
            compares = [step.compares for step in steps]
            raise ValueError(
                f"{named[0]}: branches for {program.paths} expected, found {compares} comparisons"
            )
        rate = MXU_RATE.get(topology.split(":")[0])
        bound = rate and way_pass.matmuls * BLOCK * BLOCK * head_dim / rate
        where = (topology, tokens, head_dim, bound)
        rows += [
            Row(program.library, way, path, *where, step)
            for path, step in zip(program.paths, steps, strict=True)
        ]
    return rows


_UNITS = {
    "MXU": "MXU",
    "VALU": "VALU",
    "EUP": "EUP",
    "XLU": "XLU",
    "load": "VLOAD",
    "store": "VSTORE",
    "spill": "VSTORE:SPILL",
}


@dataclass(frozen=True)
class Settings:
    """What is compiled: every topology with every length and head dim."""

    topologies: tuple[str, ...]
    tokens: tuple[int, ...]
    head_dims: tuple[int, ...]


QUICK = Settings(("v5e:2x2",), (4_096,), (128,))
FULL = Settings(("v5e:2x2", "v4:2x2x1", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"), (32_768,), (128, 64))


def measure(settings: Settings, repeats: int) -> dict:
    """The rows, compiled and read; repeats change nothing. Where libtpu is missing, that."""
    del repeats
    if find_spec("libtpu") is None:
        return {"repeats": None, "compiler": "libtpu is not installed", "rows": []}
    shapes = product(settings.topologies, settings.head_dims, settings.tokens)
    rows = [
        asdict(row)
        for topology, head_dim, tokens in shapes
        for program in PROGRAMS
        for row in rows_of(program, topology, tokens, head_dim)
    ]
    return {"repeats": None, "compiler": f"libtpu {version('libtpu')}", "rows": rows}


LEGEND = f"""The TPU compiler's final schedule of one grid step that runs one block of {BLOCK} queries by
{BLOCK} keys, {HEADS} heads, bfloat16, without a TPU and the same each time ({{compiler}}). A full block is
computed without a mask; for splash that is a program without one, since under a mask function it masks every
block that it runs. A partial block is masked.

- cycles: bundles in the schedule with waits counted; bundles: those left when waits are folded into them;
  idle: cycles of the same step with its block skipped, where it can be.
- MXU bound: cycles that the block's matmuls keep the MXUs busy, as compiled: no schedule can be shorter;
  at peak: those matmuls' multiplications over what the chip's MXUs do in a cycle. They part where a matmul is
  narrower than an MXU, as with head dim 64.
- the units: slots used over slots offered in those cycles; spill is the part of store that parks registers.
  Waits for memory, and stalls at run time, are in no schedule and not in these numbers.

What limits them: the backward kernels wait for the MXU most of the time; what is left is the fixed part of
a step (idle) and, on chips with one store slot a bundle, spilled registers. The forward kernel's chain from
product to row maximum to exponential to product leaves the MXU waiting at either end of a block; larger
blocks (`block_q=1024`) hide more of it and skip more coarsely."""


def section(results: dict) -> str:
    """The rows as a table for each topology and shape, splash's beside ours."""
    parts = [LEGEND.format(compiler=results["compiler"])]
    columns = [
        "kernel",
        "block",
        "library",
        "cycles",
        "of splash",
        "bundles",
        "idle",
        "MXU bound",
        "at peak",
        *_UNITS,
    ]
    order = {name: place for place, name in enumerate(PASSES)}
    shape_of = itemgetter("topology", "tokens", "head_dim")
    for shape, group in groupby(results["rows"], shape_of):
        rows = sorted(group, key=lambda row: (order[row["kernel"]], row["path"], row["library"]))
        splash_cycles = {
            (r["kernel"], r["path"]): r["step"]["cycles"] for r in rows if r["library"] == "splash"
        }
        topology, tokens, head_dim = shape
        parts.append(f"{topology}, {tokens:,} tokens, head dim {head_dim}:")
        parts.append(table(columns, [_cells(row, splash_cycles) for row in rows]))
    return "\n\n".join(parts)


def _cells(row: dict, splash_cycles: dict) -> list[str]:
    step = row["step"]
    idle = "–" if step["idle_cycles"] is None else str(step["idle_cycles"])
    theirs = splash_cycles[row["kernel"], row["path"]]
    counts = [str(step["cycles"]), ratio(step["cycles"], theirs), str(step["bundles"]), idle]
    use = [f"{step['use'][unit]:.0%}" for unit in _UNITS.values()]
    bounds = [f"{step['mxu_bound']:.0f}", "–" if row["bound"] is None else f"{row['bound']:.0f}"]
    return [row["kernel"], row["path"], row["library"], *counts, *bounds, *use]
