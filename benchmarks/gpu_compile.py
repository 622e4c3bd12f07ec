"""Compiles for an NVIDIA card that is not there, and reads what its kernels take.

    python -m benchmarks.gpu_compile h100 module:function '{"option": 1}'

The function (of a module, or of a file: `file.py:function`) returns a callable and its arguments' shapes, as
for `tpu_compile`. A process for each program: Pallas may end one that asks for another card than it assumes.
"""

import json
import os
import re
import shutil
import site
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.sass import Code
from benchmarks.tpu_compile import program_on
from train.aot.cards import CARDS, COMPILER, devices_of_card

_PALLAS = r"(?:dynmask|mha)_\w+"
"""The kernels that are no fusions of XLA's: ours, and those of JAX's `pallas.ops.gpu.attention`."""


@dataclass(frozen=True)
class Kernel:
    """One kernel, compiled.

    Attributes:
      registers: of a thread.
      spills: bytes that it stores for want of registers.
      shared: bytes of shared memory of a program.
      threads: of a program.
      code: its instructions.
    """

    registers: int
    spills: int
    shared: int
    threads: int
    code: Code = field(repr=False)


@dataclass(frozen=True)
class Compiled:
    """A program: its Pallas kernels by name, what it launches (kind and name), and its memory in bytes."""

    kernels: dict[str, Kernel]
    launches: list[str]
    temporary_bytes: int
    argument_bytes: int
    output_bytes: int


def compiled(card: str, target: str, options: dict | None = None) -> Compiled:
    """Compiles in a process of its own; see the module's text.

    Raises:
      RuntimeError: it does not compile, with the compiler's words.
    """
    with tempfile.TemporaryDirectory() as dumps:
        flags = f"--xla_dump_to={dumps} --xla_dump_emitter_re=ptx"
        command = [sys.executable, "-m", "benchmarks.gpu_compile", card, target, json.dumps(options or {})]
        settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "TF_CPP_MIN_LOG_LEVEL": "3"}
        paths = [str(COMPILER), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | settings | {"PYTHONPATH": os.pathsep.join(paths)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{target} does not compile for {card}:\n{done.stderr[-4000:]}")
        return _read(Path(dumps), CARDS[card].architecture, json.loads(done.stdout.splitlines()[-1]))


def _read(dumps: Path, architecture: str, memory: dict) -> Compiled:
    thunks = "\n".join(path.read_text(encoding="utf-8") for path in sorted(dumps.glob("*thunk_sequence.txt")))
    found = re.findall(r"^\s*\d+: (k\w+)(?: \[.*?\] (\S+))?", thunks, re.MULTILINE)
    launches = [f"{kind} {name}".strip() for kind, name in found]
    if not launches:
        raise RuntimeError(f"no launch is found in what XLA says of the program:\n{thunks[:1000]}")
    kernels = {}
    for path in sorted(dumps.glob("*.ptx")):
        found = re.search(rf"\.entry ({_PALLAS})", path.read_text(encoding="utf-8"))
        if found:
            assert found[1] not in kernels, f"two kernels are called {found[1]}"
            kernels[found[1]] = _kernel(path, architecture, found[1], thunks)
    return Compiled(kernels, launches, **memory)


def _kernel(ptx: Path, architecture: str, name: str, thunks: str) -> Kernel:
    cubin = ptx.with_suffix(".cubin")
    said = _assembled(ptx, cubin, architecture)
    line = next(line for line in thunks.splitlines() if f" {name} " in line)
    command = [tool("nvdisasm") or "nvdisasm", cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8").stdout
    return Kernel(
        registers=_number(r"Used (\d+) registers", said),
        spills=_number(r"(\d+) bytes spill stores", said),
        shared=_number(r"shared_memory: (\d+)", line),
        threads=_number(r"threads: \[(\d+)", line),
        code=Code.of(text),
    )


def _number(pattern: str, text: str) -> int:
    if (found := re.search(pattern, text)) is None:
        raise RuntimeError(f"{pattern} is not in what the compiler says:\n{text[:1000]}")
    return int(found[1])


def _assembled(ptx: Path, cubin: Path, architecture: str) -> str:
    """What ptxas says. XLA writes PTX for the newest one that it finds: the wheel's, or the machine's own."""
    said = ""
    for ptxas in dict.fromkeys(filter(None, (tool("ptxas"), shutil.which("ptxas")))):
        command = [ptxas, "-v", f"-arch={architecture}", ptx, "-o", cubin]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        said = done.stdout + done.stderr
        if done.returncode == 0:
            return said
    raise RuntimeError(f"ptxas: {said[-1000:]}")


def tool(name: str) -> str | None:
    """A program of the CUDA wheels, or of the machine."""
    for folder in (COMPILER, *map(Path, site.getsitepackages())):
        if found := next(folder.glob(f"nvidia/**/bin/{name}"), None):
            return str(found)
    return shutil.which(name)


def _compile_here(card: str, target: str, options: dict) -> dict[str, int]:
    """Compiles the target's program in this process, for one card, or a mesh of them that it names."""
    import jax

    program, placed, mesh = program_on(partial(devices_of_card, card), target, options)
    # A program that asks for the present card finds this one.
    with jax.default_device(mesh.devices.flat[0]), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        memory = jax.jit(program).lower(*placed).compile().memory_analysis()
    names = "temporary_bytes", "argument_bytes", "output_bytes"
    sizes = (getattr(memory, f"{name}_size_in_bytes") for name in ("temp", "argument", "output"))
    return dict(zip(names, sizes, strict=True))


if __name__ == "__main__":
    print(json.dumps(_compile_here(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))))
