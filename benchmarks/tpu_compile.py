"""Compiles for a TPU that is not there, and reads the schedules of the Pallas kernels in the program.

    python -m benchmarks.tpu_compile v5e:2x2 module:function '{"option": 1}'

The function (of a module, or of a file: `file.py:function`) returns a callable and its arguments' shapes. For
a program of several devices it adds a mesh's axes `{name: size}`, their `AxisType`, and a `PartitionSpec` for
each of the shapes.
libtpu compiles without a device and reads its flags once, at start-up: hence a process for each program.
"""

import importlib
import json
import math
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.vliw import Kernel, blocks_of, folded, utilization_of
from train.aot.topology import WITHOUT_TPU

_WITHOUT_DEVICES = {"JAX_PLATFORMS": "cpu", **WITHOUT_TPU}
_COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
_SUMMARY = "schedule-analysis_final_bundles"
_SCHEDULE, _FINAL = "packed-bundles-post-ra", "final_bundles"
_USE = "pre-delay_hlo-static-per-bundle-utilization"
_DUMPS = _SCHEDULE, _FINAL, _USE
"""What is read; to write what every pass of the compiler leaves behind takes longer than to compile."""


def kernels(topology: str, target: str, options: dict | None = None) -> dict[str, Kernel]:
    """The scheduled Pallas kernels of a program, by name.

    `target` is `module:function` or `file.py:function`, `options` its keyword arguments, and what it
    returns a callable and a tuple of `jax.ShapeDtypeStruct`s. Raises RuntimeError with the compiler's words
    where it does not compile.
    """
    with tempfile.TemporaryDirectory() as dumps:
        flags = f"--xla_jf_dump_to={dumps} --xla_jf_dump_hlo_text=true --xla_jf_dump_llo_text=true"
        flags += f" --xla_jf_dump_llo_pass_label_regex=.*({'|'.join(_DUMPS)}).*"
        _in_a_process(topology, target, options, {"LIBTPU_INIT_ARGS": flags})
        return read(Path(dumps))


@dataclass(frozen=True)
class Facts:
    """What a compiled program says of itself: its Pallas kernels, what moves between devices, its memory."""

    kernels: frozenset[str]
    collectives: frozenset[str]
    temporary_bytes: int
    argument_bytes: int
    output_bytes: int


def facts(topology: str, target: str, options: dict | None = None) -> Facts:
    """Compiles as `kernels` does, and tells what came out. Raises as it does."""
    facts = json.loads(_in_a_process(topology, target, options, {}).splitlines()[-1])
    names = {key: frozenset(facts[key]) for key in ("kernels", "collectives")}
    return Facts(**facts | names)


def _in_a_process(topology: str, target: str, options: dict | None, environment: dict[str, str]) -> str:
    command = [sys.executable, "-m", "benchmarks.tpu_compile", topology, target, json.dumps(options or {})]
    environment = os.environ | _WITHOUT_DEVICES | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{target} does not compile for {topology}:\n{done.stderr[-4000:]}")
    return done.stdout


def read(dumps: Path) -> dict[str, Kernel]:
    """The Pallas kernels in a folder of dumps, by name (with XLA's number where a name comes twice)."""
    found = {}
    for summary in sorted(dumps.glob(f"*-{_SUMMARY}.txt")):
        text = summary.read_text(encoding="utf-8")
        name = re.match(rf"\d+-(.+)-\d+-{_SUMMARY}", summary.name)
        if name is None or name[1] == "TLP" or 'custom_call_target="tpu_custom_call"' not in text:
            continue  # XLA's own fusions, and the program around the kernels
        prefix = summary.name.split(name[1])[0] + name[1]
        short = re.sub(r"\.\d+$", "", name[1])
        schedule, final = (
            _text(dumps, prefix, _SCHEDULE),
            _text(dumps, prefix, _FINAL),
        )
        use = _text(dumps, prefix, _USE)
        blocks = blocks_of(schedule)
        kernel = Kernel(blocks, folded(blocks, schedule, final), utilization_of(use))
        found[name[1] if short in found else short] = kernel
    return found


def _text(dumps: Path, prefix: str, what: str) -> str:
    named = re.compile(re.escape(prefix) + rf"-\d+-{what}\.txt")
    (path,) = [path for path in dumps.iterdir() if named.fullmatch(path.name)]
    return path.read_text(encoding="utf-8")


def compile_for(topology: str, target: str, options: dict):
    """Compiles the target's program in this process, for one device, or those of the mesh that it names."""
    import jax
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    program, placed, mesh = program_on(lambda count: devices[:count], target, options)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(program).lower(*placed).compile()


def program_on(devices_of: Callable, target: str, options: dict):
    """The target's program, its arguments' shapes as they lie on a mesh of its, and the mesh.

    `devices_of(count)` gives the devices; `gpu_compile` takes those of a card.
    """
    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    where, name = target.rsplit(":", 1)
    functions = runpy.run_path(where) if where.endswith(".py") else vars(importlib.import_module(where))
    program, shapes, *layout = functions[name](**options)
    axes, kind, specs = layout or (
        {"device": 1},
        AxisType.Auto,
        jax.tree.map(lambda _: PartitionSpec(), shapes),
    )
    devices = np.array(devices_of(math.prod(axes.values()))).reshape(*axes.values())
    mesh = Mesh(devices, tuple(axes), axis_types=(kind,) * len(axes))

    def at(shape, spec):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(mesh, spec))

    return program, jax.tree.map(at, shapes, specs), mesh


def _facts(program) -> str:
    memory = program.memory_analysis()
    call = r'%(\w+?)(?:\.\d+)? = .*custom_call_target="tpu_custom_call"'
    names = set(re.findall(call, program.as_text()))
    return json.dumps(
        {
            "kernels": sorted(names),
            "collectives": sorted(
                set(re.findall(rf"= \S+ ({_COLLECTIVES})(?:-start)?\(", program.as_text()))
            ),
            "temporary_bytes": memory.temp_size_in_bytes,
            "argument_bytes": memory.argument_size_in_bytes,
            "output_bytes": memory.output_size_in_bytes,
        }
    )


if __name__ == "__main__":
    print(_facts(compile_for(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))))
