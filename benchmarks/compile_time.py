"""Time to compile a model of six layers: with its own mask array, and as docs/porting.md ports it.

    python -m benchmarks.compile_time ported 6 1024

prints one measurement. Each is a process of its own, without a compilation cache. What is counted is CPU
seconds of all threads, to which other processes on the machine matter less.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.markdown import ratio, seconds, table

VERSIONS = {"original": "its own mask array", "ported": "`attention` under a plan"}
STAGES = "trace", "lower", "compile"


@dataclass(frozen=True)
class Settings:
    """The model of tests/porting/gemma.py: loss and gradients of its layers, every sixth of them global."""

    layers: int = 6
    tokens: int = 1_024


QUICK = FULL = Settings()


def measure(settings: Settings, repeats: int) -> dict:
    """For each version the medians of CPU seconds to trace, to lower and to compile."""
    found = {version: [] for version in VERSIONS}
    for _ in range(repeats):
        for version, rounds in found.items():
            rounds.append(_in_a_process(version, settings))
    rows = [
        {"version": version} | {stage: statistics.median(each[stage] for each in rounds) for stage in STAGES}
        for version, rounds in found.items()
    ]
    return {"repeats": repeats, "settings": asdict(settings), "rows": rows}


def _in_a_process(version: str, settings: Settings) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.compile_time", version]
    command += [str(settings.layers), str(settings.tokens)]
    environment = {name: value for name, value in os.environ.items() if "COMPILATION_CACHE" not in name}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{version} does not compile:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compile_one(version: str, layers: int, tokens: int) -> dict[str, float]:
    """CPU seconds of each stage, for loss and gradients of one version, in this process."""
    import jax
    import jax.numpy as jnp

    from tests.porting_cases import gradients, original, ported

    kinds = tuple("global" if layer % 6 == 5 else "local_sliding" for layer in range(layers))
    with tempfile.TemporaryDirectory() as folder:
        module = original("gemma") if version == "original" else ported("gemma", Path(folder))
    weights, run = gradients(module, attention_types=kinds, sliding_window_size=tokens // 4)
    whole = jax.ShapeDtypeStruct((2, tokens), jnp.int32)
    batch = dict.fromkeys(("inputs", "targets", "inputs_position", "inputs_segmentation"), whole)
    step = [] if version == "original" else [jax.ShapeDtypeStruct((), jnp.int32)]
    jax.block_until_ready(jnp.ones(3) + 1)  # what JAX does once

    clocks = [time.process_time()]
    traced = jax.jit(run).trace(weights, batch, *step)
    clocks.append(time.process_time())
    lowered = traced.lower()
    clocks.append(time.process_time())
    lowered.compile()
    clocks.append(time.process_time())
    return {stage: clocks[i + 1] - clocks[i] for i, stage in enumerate(STAGES)}


def section(results: dict) -> str:
    """The results as Markdown."""
    settings, rows = results["settings"], results["rows"]
    totals = [sum(row[stage] for stage in STAGES) for row in rows]
    lines = [
        [
            VERSIONS[row["version"]],
            *(seconds(row[stage]) for stage in STAGES),
            seconds(total),
            ratio(total, totals[0]),
        ]
        for row, total in zip(rows, totals, strict=True)
    ]
    columns = [f"{settings['layers']} layers", *STAGES, "in all", "ratio"]
    return (
        "CPU seconds of all threads, for loss and gradients of the Gemma of [porting.md](porting.md) with "
        f"{settings['tokens']:,} tokens and local and global layers; no compilation cache.\n\n"
        f"{table(columns, lines)}"
    )


if __name__ == "__main__":
    print(json.dumps(compile_one(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
