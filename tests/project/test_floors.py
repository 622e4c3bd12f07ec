"""The layout: a file imports only from lower floors, and the door opens without Flax."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dynmask_jax

ROOT = Path(__file__).parents[2]
LIBRARY, TRAINER = ROOT / "dynmask_jax", ROOT / "train"
FLOORS = [
    {"array_typing", "errors", "foreign_options", "platforms", "sharding", "vma"},
    {"block_codes", "verdicts"},
    {"grain_choice"},
    {"indexing", "schedules", "spans", "online_softmax", "rotary", "finite"},
    {"context.arcs", "context.layouts", "context.machines", "context.torus"},
    {"tokens", "hashes", "leaves"},
    {"mask_algebra", "dropout"},
    {"bias_algebra"},
    {"biases", "fields_read", "find_codes", "masks", "scores", "tiles"},
    {"curricula", "plans"},
    {
        "backends.backend",
        "backends.blocks",
        "backends.tpu_blocks",
        "backends.gpu_blocks",
        "nonfinite",
        "backends.tpu_sums",
    },
    {
        "backends.by_head",
        "backends.tpu_lists",
        "backends.tpu_strips",
        "backends.kernel_checks",
        "backends.kernel_tile",
        "backends.gpu_options",
        "backends.tile_expressions",
    },
    {"backends.dense", "backends.score_tiles", "backends.tpu_grid", "backends.tpu_tile"},
    {"backends.triton", "backends.mosaic"},
    {"backends.gpu_lists", "backends.gpu_choice"},
    {"backends.grains"},
    {"backends.xla_backward", "backends.tpu_bias", "backends.gpu_chunks"},
    {"backends.xla", "backends.tpu_backward", "backends.gpu_lines"},
    {"backends.tpu"},
    {
        "backends.xla_wide",
        "backends.gpu_sides",
        "backends.gpu_tile",
        "backends.gpu_merge",
        "backends.hopper_lines",
    },
    {"backends.hopper_sweep", "backends.hopper_tile"},
    {"backends.gpu_sweep", "backends.hopper", "backends.hopper_backward"},
    {"backends.gpu_backward"},
    {"backends.gpu"},
    {"calls", "partitioning", "plot_cells"},
    {"find_partitioning", "flax_mask"},
    {"dispatch"},
    {"flax_adapter", "context.sequence_axis"},
    {"context.all_gather", "context.costs", "context.ring", "context.ulysses"},
    {"context.parallel", "context.simulator"},
    {"nnx_attention_fn", "linen", "plot"},
    {"nnx"},
    {"__init__"},
]
"""The library's files, by their dotted names."""
ROOMS = [
    {"__init__", "disk"},
    {"config"},
    {"data"},
    {"parallel"},
    {"model"},
    {"step", "pretrained"},
    {"metrics", "checkpoint", "evaluate"},
    {"report", "aot"},
    {"loop"},
    {"compare"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
"""The trainer's folders, and the files beside them."""


def imports(path: Path, package: str) -> set[str]:
    """The modules of the package that a file imports, wherever in it, by their names below the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.removeprefix(f"{package}.") for name in names if name.startswith(f"{package}.")}
        found |= {"__init__"} if package in names else set()
    return found


def files_of(folder: Path) -> dict[str, Path]:
    """Every file below a folder by its dotted name; of the folders' own doors that of the folder alone."""
    return {
        ".".join(path.relative_to(folder).with_suffix("").parts): path
        for path in folder.rglob("*.py")
        if path.parent == folder or path.name != "__init__.py"
    }


def heights(floors: list[set[str]]) -> dict[str, int]:
    return {name: floor for floor, names in enumerate(floors) for name in names}


def test_every_file_of_the_library_imports_from_lower_floors():
    files, height = files_of(LIBRARY), heights(FLOORS)
    assert set(files) == set(height)
    for name, path in files.items():
        above = {
            other for other in imports(path, "dynmask_jax") & set(height) if height[other] >= height[name]
        }
        assert not above, f"{name} imports from its own floor or above: {above}"


def test_every_room_of_the_trainer_imports_from_lower_floors():
    files, height = files_of(TRAINER), heights(ROOMS)
    assert {name.split(".")[0] for name in files} == set(height)
    for name, path in files.items():
        room = name.split(".")[0]
        rooms = {other.split(".")[0] for other in imports(path, "train")} & set(height) - {room}
        above = {other for other in rooms if height[other] >= height[room]}
        assert not above, f"train/{name.replace('.', '/')}.py imports from its own floor or above: {above}"


@pytest.mark.parametrize(
    "room", sorted(path.name for path in TRAINER.iterdir() if (path / "__init__.py").exists())
)
def test_no_circle_in_a_room(room):
    files = files_of(TRAINER)
    arrows = {
        name: imports(path, "train") & set(files)
        for name, path in files.items()
        if name.startswith(f"{room}.")
    }
    while arrows:
        free = {name for name, others in arrows.items() if not others & set(arrows)}
        assert free, f"these files import each other in a circle: {sorted(arrows)}"
        arrows = {name: others for name, others in arrows.items() if name not in free}


def test_no_module_of_the_library_has_the_name_of_what_the_door_exports():
    """`import dynmask_jax.balance as b` would give the function of that name, not the module."""
    public = {
        name
        for name, value in vars(dynmask_jax).items()
        if getattr(value, "__name__", "") != f"dynmask_jax.{name}"
    }
    assert "balance" in public
    assert not public & {name.split(".")[-1] for name in files_of(LIBRARY) if name != "__init__"}


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
