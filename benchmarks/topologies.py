"""Train steps compiled for TPU topologies that are not there: memory of a device, and what travels.

Nothing is timed but the compiler: the same each time, and no TPU is needed.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.markdown import table
from train.parallel.mesh import AXES

KEPT = ("topology", "device", "mesh", "weights", "rows", "length", "memory", "kinds", "lowering", "compiling")


@dataclass(frozen=True)
class Settings:
    """What is compiled: words that follow `python -m train compile`, of each run."""

    runs: tuple[str, ...]


SMALL = (
    "run --topology v5e:2x2 --mesh.context 4 --data.length 32768 --block 512 --model.layers 6 "
    "--model.dtype bfloat16 --model.remat full --curriculum.start 1024"
)
QUICK, FULL = Settings((SMALL,)), Settings(("lm-128k", "lm-1m-v5p", "lm-1m-v6e"))


def measure(settings: Settings, repeats: int) -> dict:
    """What `compile` says of each run; repeats change nothing.

    Raises:
      RuntimeError: a run does not compile, in the compiler's words, or does not fit.
    """
    del repeats
    rows = [_compiled(words) for words in settings.runs]
    return {"settings": asdict(settings), "repeats": None, "rows": rows}


def _compiled(words: str) -> dict:
    """One run's, in a process of its own: libtpu holds one topology at a time."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        command = [sys.executable, "-m", "train", "compile", *words.split(), "--json", str(file)]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"compile {words}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        found = json.loads(file.read_text(encoding="utf-8"))
    return {"run": words.split()[0], **{name: found[name] for name in KEPT}}


def section(results: dict) -> str:
    """Memory, then transfers."""
    return (
        "The real train step, compiled by the TPU's own compiler for devices that are not there: "
        "`python -m train compile` and a preset. Vocabularies are of 32,768 tokens.\n\n"
        f"{memory(results)}\n\n{transfers(results)}"
    )


def memory(results: dict) -> str:
    """A line for each run: what a device holds, of how much."""
    columns = ["preset", "devices", f"mesh, {' × '.join(AXES)}", "weights", "tokens in a row, rows"]
    columns += ["state", "temporaries", "in all", "of", "left", "compiled in"]
    return table(columns, [_memory(row) for row in results["rows"]])


def _memory(row: dict) -> list[str]:
    size, devices = row["memory"], 1
    for axis in AXES:
        devices *= row["mesh"][axis]
    total = sum(size[part] for part in ("state", "rows", "temporaries", "results", "program"))
    return [
        row["run"],
        f"{devices} × {row['device']} ({row['topology']})",
        " × ".join(str(row["mesh"][axis]) for axis in AXES),
        f"{row['weights'] / 1e9:.2f}·10⁹",
        f"{row['length']:,} × {row['rows']}",
        *(_gib(each) for each in (size["state"], size["temporaries"], total, size["limit"])),
        f"{1 - total / size['limit']:.0%}",
        f"{row['lowering'] + row['compiling']:.0f} s",
    ]


def transfers(results: dict) -> str:
    """A line for each run and each kind of transfer that sends at least a hundredth of all."""
    columns = ["preset", "for", "collective", "times a step", "GiB sent by a device", "meanwhile"]
    lines = []
    for row in results["rows"]:
        least = 0.01 * sum(kind["bytes"] for kind in row["kinds"])
        lines += [_transfer(row["run"], kind) for kind in row["kinds"] if kind["bytes"] >= least]
    return table(columns, lines)


def _transfer(run: str, kind: dict) -> list[str]:
    return [
        run,
        f"{kind['source']}, {kind['phase']}",
        kind["kind"],
        f"{kind['count']:,}{' a hop' if kind['by_data'] else ''}",
        _gib(kind["bytes"]),
        kind["meanwhile"],
    ]


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
