"""The layout: a file imports only from lower floors, and the door opens without Flax."""

import ast
import subprocess
import sys
from pathlib import Path

import dynmask_jax

PACKAGE = Path(dynmask_jax.__file__).parent
FLOORS = [
    {"array_typing", "errors", "platforms", "varying"},
    {"schedules", "spans", "online_softmax", "scores", "rotary", "finite", "layouts", "machines"},
    {"tokens", "draws", "leaves"},
    {"masks"},
    {"curricula", "plans"},
    {"backends.backend", "backends.blocks", "backends.tpu_grid", "nonfinite"},
    {"backends.dense", "backends.tpu_tile"},
    {"backends.xla_backward", "backends.tpu_backward"},
    {"backends.xla", "backends.tpu"},
    {"backends.xla_wide"},
    {"attention", "cells"},
    {"along", "flax_call", "spread"},
    {"all_gather", "costs", "ring", "ulysses"},
    {"balance", "context_parallel"},
    {"nnx", "linen", "plot"},
    {"__init__"},
]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dynmask_jax"):
            module = (node.module or "").removeprefix("dynmask_jax").lstrip(".")
            found |= {f"{module}.{a.name}" if module == "backends" else module or a.name for a in node.names}
    return found


def test_every_file_stands_on_a_floor_and_imports_from_below():
    files = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
        if path.parent == PACKAGE or path.name != "__init__.py"
    }
    height = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    assert set(files) == set(height)
    for name, path in files.items():
        above = {other for other in imports(path) if height[other] >= height[name]}
        assert not above, f"{name} imports from its own floor or above: {above}"


def test_the_door_needs_neither_flax_nor_matplotlib():
    code = "import sys, dynmask_jax; print({'flax', 'matplotlib', 'optax', 'chex'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_every_public_name_says_what_it_is():
    for name, value in vars(dynmask_jax).items():
        if (
            not name.startswith("_")
            and callable(value)
            and getattr(value, "__module__", "").startswith("dynmask_jax")
        ):
            assert (value.__doc__ or "").strip(), name
            assert not value.__doc__.startswith(f"{name}("), f"{name} has only a generated docstring"
