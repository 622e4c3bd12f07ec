"""Cycles of one attention block in the TPU compiler's final schedule, beside splash attention's.

Needs libtpu, no TPU; the same versions give the same numbers. See `LEGEND` for what the columns mean.
"""

import functools
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from itertools import groupby, product
from operator import itemgetter

from benchmarks import tpu_windows
from benchmarks.markdown import ratio, table
from benchmarks.tpu_attention import BLOCK, HEADS, STRIP
from benchmarks.tpu_compile import kernels
from benchmarks.vliw import Step

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
    "backward": Pass(("dkv", "backward"), 5),
    "dq": Pass(("dq",), 3),
    "dkv": Pass(("dkv",), 4),
}

FULL_AND_PARTIAL = ("full", "partial")
STRIPS = ("full", "1 strip", "2 strips", "3 strips", "partial")


@dataclass(frozen=True)
class Program:
    """Attention and its gradient in one library, for `tpu_compile`: `target(tokens=, head_dim=, **options)`.

    `paths` are, of each kernel, the kinds of block it has branches for, in the order of their comparisons.
    """

    library: str
    target: str
    options: dict[str, str]
    paths: dict[str, tuple[str, ...]]


def _ours(library: str, forward: tuple[str, ...], backward: tuple[str, ...], **options: str) -> Program:
    return Program(
        library, "benchmarks.tpu_attention:ours", options, {"forward": forward, "backward": backward}
    )


def _splash(library: str, mask: str, path: str, *kernels: str) -> Program:
    options = {"mask": mask, "backward": library}
    return Program("splash", "benchmarks.tpu_attention:splash", options, dict.fromkeys(kernels, (path,)))


PROGRAMS = (
    _ours("dynmask_jax", (*STRIPS[:3], "partial"), STRIPS, strips="of 128"),
    _ours("with ALiBi", FULL_AND_PARTIAL, FULL_AND_PARTIAL, scores="bias"),
    _ours("with dropout", FULL_AND_PARTIAL, FULL_AND_PARTIAL, scores="dropout"),
    _splash("two kernels", "full", "full", "forward", "dq", "dkv"),
    _splash("two kernels", "causal", "partial", "forward", "dq", "dkv"),
    _splash("one kernel", "full", "full", "backward"),
    _splash("one kernel", "causal", "partial", "backward"),
)


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
    for way, paths in program.paths.items():
        way_pass = PASSES[way]
        named = [name for name in found if any(part in name for part in way_pass.names)]
        if len(named) != 1:
            raise ValueError(f"{program.library}: one kernel for {way} expected, found {named} in {[*found]}")
        steps = sorted(found[named[0]].steps(), key=lambda step: step.compares)
        if len(steps) != len(paths):
            compares = [step.compares for step in steps]
            raise ValueError(f"{named[0]}: branches for {paths} expected, found {compares} comparisons")
        rate = MXU_RATE.get(topology.split(":")[0])
        bound = rate and way_pass.matmuls * BLOCK * BLOCK * head_dim / rate
        where = (topology, tokens, head_dim, bound)
        rows += [
            Row(program.library, way, path, *where, step) for path, step in zip(paths, steps, strict=True)
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


# Of fewer tokens the compiler keeps whole arrays in vector memory, where there are no copies to be seen.
QUICK = Settings(("v5e:2x2",), (32_768,), (128,))
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
block that it runs. A partial block is masked, and where the plan has codes of small blocks, only the strips
of {STRIP} keys that show anything are computed.

- cycles: bundles in the schedule with waits counted; bundles: those left when waits are folded into them;
  idle: cycles of the same step with its block skipped, where it can be.
- MXU bound: cycles that the block's matmuls keep the MXUs busy, as compiled: no schedule can be shorter;
  at peak: those matmuls' multiplications over what the chip's MXUs do in a cycle. They part where a matmul is
  narrower than an MXU, as with head dim 64.
- the units: slots used over slots offered in those cycles; spill is the part of store that parks registers.
  Waits for memory, and stalls at run time, are in no schedule and not in these numbers.

Splash has two backward kernels, of seven matmuls together, or with `use_fused_bwd_kernel` one of five.
That one writes a dq for each block of keys and adds them up outside, which takes memory in proportion to the
square of the tokens; ours adds to one float32 dq in HBM, in proportion to the tokens. Backward of a full
block, in cycles:"""

LIMITS = """What limits them: the backward kernel waits for the MXU most of the time; what is left is the
fixed part of a step (idle) and, on chips with one store slot a bundle, spilled registers. Its queries and
gradients lie upright, so that with head dim 64 three of its five matmuls cost half. The forward kernel's
chain from product to row maximum to exponential to product leaves the MXU waiting at either end of a block;
larger blocks (`block_q=1024`) hide more of it and skip more coarsely. That chain takes as long for three
strips as for four, so the forward kernel computes three as a whole block."""


def section(results: dict) -> str:
    """Backward beside splash's, strips, then the rows as a table for each topology and shape."""
    shape_of = itemgetter("topology", "tokens", "head_dim")
    shapes = {shape: _Cycles([*rows]) for shape, rows in groupby(results["rows"], shape_of)}
    columns = ["topology", "head dim", "dynmask_jax", "splash, two kernels", "ours ÷ theirs"]
    columns += ["splash, one kernel", "ours ÷ theirs"]
    parts = [LEGEND.format(compiler=results["compiler"])]
    parts.append(table(columns, [_backward(shape, cycles) for shape, cycles in shapes.items()]))
    parts.append("A partial block of ours, in cycles, by how many of its four strips show anything:")
    columns = ["topology", "head dim", "kernel", "1", "2", "3", "4", "full"]
    lines = [
        _strips(shape, cycles, way) for way in ("forward", "backward") for shape, cycles in shapes.items()
    ]
    parts += [table(columns, lines), LIMITS]
    parts.append(
        tpu_windows.section(
            {
                (topology, head_dim): functools.partial(cycles.find, "dynmask_jax")
                for (topology, _, head_dim), cycles in shapes.items()
            }
        )
    )
    for (topology, tokens, head_dim), cycles in shapes.items():
        parts.append(f"{topology}, {tokens:,} tokens, head dim {head_dim}:")
        parts.append(cycles.table())
    return "\n\n".join(parts)


def _backward(shape: tuple, cycles: "_Cycles") -> list[str]:
    topology, _, head_dim = shape
    mine = cycles.of("dynmask_jax", "backward", "full")
    two, one = cycles.splash("backward", "full"), cycles.of("splash", "backward", "full")
    return [topology, *map(str, (head_dim, mine, two)), ratio(mine, two), str(one), ratio(mine, one)]


def _strips(shape: tuple, cycles: "_Cycles", way: str) -> list[str]:
    topology, _, head_dim = shape
    whole = cycles.of("dynmask_jax", way, "partial")
    found = [cycles.find("dynmask_jax", way, path) or whole for path in (*STRIPS[1:], "full")]
    return [topology, str(head_dim), way, *map(str, found)]


class _Cycles:
    """The rows of one topology and shape."""

    def __init__(self, rows: list[dict]):
        self.rows = rows
        self.known = {(r["library"], r["kernel"], r["path"]): r["step"]["cycles"] for r in rows}

    def find(self, library: str, kernel: str, path: str) -> int | None:
        return self.known.get((library, kernel, path))

    def of(self, library: str, kernel: str, path: str) -> int:
        return self.known[library, kernel, path]

    def splash(self, kernel: str, path: str) -> int:
        """Splash's cycles for the kernel's work, backward in two kernels; for strips, those of all."""
        path = path if path in FULL_AND_PARTIAL else "partial"
        ways = ("dq", "dkv") if kernel == "backward" else (kernel,)
        return sum(self.of("splash", way, path) for way in ways)

    def table(self) -> str:
        columns = ["kernel", "block", "library", "cycles", "of splash", "bundles", "idle"]
        columns += ["MXU bound", "at peak", *_UNITS]
        order = {name: place for place, name in enumerate(PASSES)}
        paths = {name: place for place, name in enumerate(STRIPS)}
        rows = sorted(self.rows, key=lambda r: (order[r["kernel"]], paths[r["path"]], r["library"]))
        return table(columns, [_cells(row, self.splash(row["kernel"], row["path"])) for row in rows])


def _cells(row: dict, theirs: int) -> list[str]:
    step = row["step"]
    idle = "–" if step["idle_cycles"] is None else str(step["idle_cycles"])
    counts = [str(step["cycles"]), ratio(step["cycles"], theirs), str(step["bundles"]), idle]
    use = [f"{step['use'][unit]:.0%}" for unit in _UNITS.values()]
    bounds = [f"{step['mxu_bound']:.0f}", "–" if row["bound"] is None else f"{row['bound']:.0f}"]
    return [row["kernel"], row["path"], row["library"], *counts, *bounds, *use]
