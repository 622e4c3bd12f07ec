"""Compiles for an NVIDIA card that is not there, and reads what its kernels take.

    python -m benchmarks.gpu_compile h100 module:function '{"option": 1}'

The function (of a module, or of a file: `file.py:function`) returns a callable and its arguments' shapes, as
for `tpu_compile`. A process for each program: Pallas may end one that asks for another card than it assumes.
"""

import json
import re
import shutil
import site
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.sass import Code
from benchmarks.tpu_compile import program_on
from train.aot.cards import CARDS, COMPILER, compiler_environment, devices_of_card
from train.aot.target import present

_PALLAS = r"(?:dynmask|mha|pallas)_\w+"
"""Kernels that Triton compiles: ours, those of JAX's `pallas.ops.gpu.attention`, and tokamax's."""
WARPGROUP = 128
"""Threads of one."""


@dataclass(frozen=True)
class Kernel:
    """One kernel, compiled.

    Attributes:
      registers: of a thread.
      spills: bytes that it stores for want of registers.
      shared: bytes of shared memory of a program.
      threads: of a program.
      loading: of these, those that load for the others and take no part in products.
      code: its instructions.
    """

    registers: int
    spills: int
    shared: int
    threads: int
    loading: int
    code: Code = field(repr=False)


@dataclass(frozen=True)
class Compiled:
    """A program: its Pallas kernels by name, what it launches (kind and name), and its memory in bytes.

    Kernels of Mosaic GPU are named by it, and numbered where several have one name: `anonymous_1`.
    """

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
        Path(dumps, "mosaic").mkdir()
        settings = {"XLA_FLAGS": flags, "MOSAIC_GPU_DUMP_TO": f"{dumps}/mosaic", "TF_CPP_MIN_LOG_LEVEL": "3"}
        environment = compiler_environment() | settings
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
            line = next(line for line in thunks.splitlines() if f" {found[1]} " in line)
            shared, threads = _number(r"shared_memory: (\d+)", line), _number(r"threads: \[(\d+)", line)
            kernels[found[1]] = _kernel(path, architecture, shared, threads)
    found = sorted(dumps.glob("mosaic/*.ptx"))
    names = Counter(map(_unnumbered, found))
    for path in found:
        name = _unnumbered(path)
        name = name if names[name] == 1 else path.stem
        assert name not in kernels, f"two kernels are called {name}"
        kernels[name] = _mosaic_kernel(path, architecture)
    return Compiled(kernels, launches, **memory)


def _unnumbered(dump: Path) -> str:
    """A kernel's name: `dynmask_dkv_1.ptx` → `dynmask_dkv`."""
    return re.sub(r"_\d+$", "", dump.name.split(".")[0])


def _kernel(ptx: Path, architecture: str, shared: int, threads: int, loading: int = 0) -> Kernel:
    cubin = ptx.with_suffix(".cubin")
    said = _assembled(ptx, cubin, architecture)
    command = [tool("nvdisasm") or "nvdisasm", cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8").stdout
    return Kernel(
        registers=_number(r"Used (\d+) registers", said),
        spills=_number(r"(\d+) bytes spill stores", said),
        shared=shared,
        threads=threads,
        loading=loading,
        code=Code.of(text),
    )


def _mosaic_kernel(ptx: Path, architecture: str) -> Kernel:
    """A kernel of Mosaic GPU, which XLA sees as a custom call: from what Mosaic itself dumps."""
    resources = _resources(ptx)
    barriers = re.findall(r"num_barriers=(\d+)[^)]*\): (\d+)", resources)
    shared = _number(r"smem_scratch_bytes=(\d+)", resources) + sum(8 * int(n) * int(m) for n, m in barriers)
    text = ptx.read_text(encoding="utf-8")
    # Where one warpgroup loads for the others, it gives its registers to them.
    loading = WARPGROUP if "setmaxnreg.dec" in text else 0
    return _kernel(ptx, architecture, shared, _number(r"\.maxntid (\d+)", text), loading)


def _resources(ptx: Path) -> str:
    """What Mosaic says of a kernel as it lowers it: lowered twice, compiled once, it has two numbers."""
    dumps = {path.name: path.read_text(encoding="utf-8") for path in ptx.parent.glob("*.resources.txt")}
    if (own := dumps.get(f"{ptx.stem}.resources.txt")) is not None:
        return own
    found = {text for name, text in dumps.items() if _unnumbered(Path(name)) == _unnumbered(ptx)}
    if len(found) != 1:
        raise RuntimeError(f"{len(found)} of {', '.join(sorted(dumps))} may belong with {ptx.name}")
    return found.pop()


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
    with present(mesh):
        memory = jax.jit(program).lower(*placed).compile().memory_analysis()
    names = "temporary_bytes", "argument_bytes", "output_bytes"
    sizes = (getattr(memory, f"{name}_size_in_bytes") for name in ("temp", "argument", "output"))
    return dict(zip(names, sizes, strict=True))


if __name__ == "__main__":
    print(json.dumps(_compile_here(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))))
