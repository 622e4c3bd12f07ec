"""Cycles of one attention block in the TPU compiler's final schedule, beside splash attention's.

    python -m benchmarks.tpu_schedule [--topology v5e:2x2] [--tokens 4096] [--head-dim 128] [--json FILE]

Needs libtpu, no TPU; the same versions give the same numbers. A row is one grid step that runs one block of
512 queries by 512 keys, 8 heads, bfloat16: a full block (no mask) or a partial one (masked).

- cycles: bundles in the schedule, waits counted; bundles: those left when waits are folded into them;
  idle: cycles of the same step with its block skipped, where it can be.
- MXU: cycles its matmuls keep the MXUs busy, as compiled; bound: those matmuls' multiplications over what
  the chip's MXUs do in a cycle. They part where a matmul is narrower than an MXU.
- the units: slots used over slots offered in those cycles. `spill` is the part of `store` that parks
  registers. Waits for DMA, and stalls at run time, are in no schedule and not in these numbers.

Under a mask function splash masks every block it runs, also the full ones: its partial path is all it has
under a causal mask. Its full path is compiled without a mask.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from benchmarks.tpu_compile import kernels
from benchmarks.vliw import Step
from dynmask_jax import Causal, Tokens, Window, attention, plan

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
    Program("splash", "benchmarks.tpu_schedule:splash", {"mask": "full"}, ("full",)),
    Program("splash", "benchmarks.tpu_schedule:splash", {"mask": "causal"}, ("partial",)),
)


def ours(tokens: int, head_dim: int):
    """Our gradient under a causal window whose length is data: the program of a whole curriculum."""

    def attend(q, k, v, window):
        mask = Causal() & Window(window)
        return attention(
            q, k, v, plan(mask, Tokens.sequence(tokens), block_q=BLOCK, block_k=BLOCK), backend="tpu"
        )

    array = jax.ShapeDtypeStruct((1, tokens, HEADS, head_dim), jnp.bfloat16)
    return gradient(attend), (array, array, array, jax.ShapeDtypeStruct((), jnp.int32))


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


def report(rows: list[Row]) -> str:
    """The rows as text: a table for each topology and shape."""
    lines = []
    for topology, tokens, head_dim in dict.fromkeys((row.topology, row.tokens, row.head_dim) for row in rows):
        lines += ["", f"{topology}, {tokens:,} tokens, {HEADS} heads, head dim {head_dim}, bfloat16"]
        units = "".join(f"{unit:>7}" for unit in _UNITS)
        lines += [
            f"  {'':<8}{'':<9}{'':<13}{'cycles':>7}{'bundles':>8}{'idle':>6}{'MXU':>6}{'bound':>6} {units}"
        ]
        these = [
            row for row in rows if (row.topology, row.tokens, row.head_dim) == (topology, tokens, head_dim)
        ]
        order = [*PASSES]
        these.sort(key=lambda row: (order.index(row.kernel), row.path, row.library))
        lines += [_line(row) for row in these]
    return "\n".join(lines[1:])


def _line(row: Row) -> str:
    step = row.step
    idle = "-" if step.idle_cycles is None else step.idle_cycles
    bound = "-" if row.bound is None else f"{row.bound:.0f}"
    units = "".join(f"{step.use[unit]:>7.0%}" for unit in _UNITS.values())
    name = f"  {row.kernel:<8}{row.path:<9}{row.library:<13}"
    return f"{name}{step.cycles:>7}{step.bundles:>8}{idle:>6}{step.mxu_bound:>6.0f}{bound:>6} {units}"


def main(arguments: list[str] | None = None):
    """Compiles, prints the tables, and writes the JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--topology", nargs="+", default=["v5e:2x2"], help="as libtpu names them")
    parser.add_argument("--tokens", nargs="+", type=int, default=[4_096, 32_768])
    parser.add_argument("--head-dim", nargs="+", type=int, default=[128, 64])
    parser.add_argument("--json", type=Path, help="where to write the rows")
    options = parser.parse_args(arguments)
    shapes = product(options.topology, options.head_dim, options.tokens)
    rows = [
        row
        for topology, head_dim, tokens in shapes
        for program in PROGRAMS
        for row in rows_of(program, topology, tokens, head_dim)
    ]
    print(report(rows))
    if options.json:
        compiler = {name: version(name) for name in ("jax", "libtpu")}
        results = {"compiler": compiler, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
