"""The real TPU compiler takes the kernels, for every generation of TPU; no TPU is needed."""

import importlib.util
from pathlib import Path

import pytest
from cases import MASKS
from slow import mostly

from benchmarks.tpu_compile import facts
from benchmarks.tpu_schedule import PROGRAMS, STRIPS, rows_of

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed"
)
FILE = Path(__file__).with_name("tpu_programs.py")
TOPOLOGIES = ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]
KERNELS = {"dynmask_forward", "dynmask_backward"}


@pytest.fixture(autouse=True)
def _names_of_the_tests(monkeypatch):
    """The programs import the masks of `cases.py`, in a process of their own."""
    monkeypatch.setenv("PYTHONPATH", str(FILE.parents[2]))


@pytest.mark.parametrize("topology", mostly(TOPOLOGIES, ["v5e:2x2"]))
def test_attention_and_its_gradient(topology):
    """32,768 tokens, 8 heads: memory stays linear in them."""
    found = facts(topology, f"{FILE}:attention_and_gradient")
    assert found.kernels == KERNELS
    one_array = 32_768 * 8 * 128 * 2
    assert found.temporary_bytes < 8 * one_array


@pytest.mark.slow  # the soft cap goes with ALiBi below
@pytest.mark.parametrize(
    "options",
    [
        {"head_dim": 192, "kv_heads": 2},
        {"dtype": "float32", "head_dim": 256, "kv_heads": 2},
        {"head_dim": 64, "kv_heads": 1, "soft_cap": 30.0},
        {"dtype": "float32", "head_dim": 64, "soft_cap": 30.0},
    ],
    ids=lambda options: "+".join(f"{name}_{value}" for name, value in options.items()),
)
def test_every_option(options):
    assert facts("v5e:2x2", f"{FILE}:attention_and_gradient", options).kernels == KERNELS


@pytest.mark.parametrize("topology", mostly(TOPOLOGIES, ["v5e:2x2"]))
def test_alibi_dropout_and_a_soft_cap(topology):
    options = {"bias": True, "learned": True, "rate": 0.1, "soft_cap": 30.0}
    assert facts(topology, f"{FILE}:scores_and_gradient", options).kernels == {*KERNELS, "dynmask_dbias"}


@pytest.mark.parametrize(
    "options",
    mostly(
        [
            {"bias": True, "learned": False, "rate": 0.0, "keys": 192, "values": 128},
            {"bias": False, "learned": False, "rate": 0.1, "keys": 192, "values": 128},
            {"bias": False, "learned": False, "rate": 0.0, "keys": 128, "values": 192},
        ],
        [{"bias": True, "learned": False, "rate": 0.0, "keys": 192, "values": 128}],
    ),
    ids=lambda options: "_".join(name for name, value in options.items() if value),
)
def test_constant_slopes_have_no_kernel_and_values_any_width(options):
    assert facts("v5e:2x2", f"{FILE}:scores_and_gradient", options).kernels == KERNELS


@pytest.mark.parametrize(
    "options",
    mostly(
        [
            {"axes": {"fsdp": 2, "tp": 2}, "kind": "Explicit"},
            {"axes": {"data": 4}, "kind": "Explicit"},
            {"axes": {"data": 2, "tensor": 2}, "kind": "Auto"},
            {"axes": {"x": 2, "y": 2}, "kind": "Auto", "sharding": ["x", None, "y"]},
        ],
        [{"axes": {"fsdp": 2, "tp": 2}, "kind": "Explicit"}],
    ),
    ids=lambda options: "_".join([options["kind"], *options["axes"]]),
)
def test_rows_and_heads_over_devices(options):
    """Nothing of q, k or v moves; what is summed over devices is the loss."""
    found = facts("v5e:2x2", f"{FILE}:attention_over_rows_and_heads", options)
    assert found.kernels == KERNELS
    assert found.collectives <= {"all-reduce"}


SOME = "strided", "random_chunks", "per_head_select", "unreadable"


@pytest.mark.parametrize("names", mostly([[*SOME], [*MASKS]], [[*SOME]]), ids=len)
def test_every_mask(names):
    assert facts("v5e:2x2", f"{FILE}:masks", {"names": names}).kernels == KERNELS


@pytest.mark.parametrize(
    "setting",
    [
        pytest.param({"name": "jax_enable_x64", "value": True}, marks=pytest.mark.slow),
        pytest.param({"name": "jax_default_matmul_precision", "value": "highest"}, marks=pytest.mark.slow),
        {"name": "jax_numpy_dtype_promotion", "value": "strict"},
    ],
    ids=["jax_enable_x64", "jax_default_matmul_precision", "jax_numpy_dtype_promotion"],
)
def test_settings_of_jax(setting):
    assert facts("v5e:2x2", f"{FILE}:under_a_setting", setting).kernels == KERNELS


def test_under_vmap():
    # Where JAX makes a loop of it, over masks, the kernels lose their names.
    assert facts("v5e:2x2", f"{FILE}:under_vmap").kernels


@pytest.mark.slow  # tests/trainer/aot/test_compile.py compiles one, over a mesh
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_whole_train_step(topology):
    """It fits the memory of one device, or the compiler would refuse."""
    assert facts(topology, f"{FILE}:train_step").kernels == KERNELS


def test_a_single_query():
    """No block of queries is whole."""
    assert facts("v5e:2x2", f"{FILE}:decoding").kernels == {"dynmask_forward"}


@pytest.mark.slow
def test_generation():
    found = facts("v5e:2x2", f"{FILE}:generation")
    assert found.kernels == {"dynmask_forward"}


@pytest.mark.slow
def test_a_block_costs_no_more_than_splash_attentions():
    """The compiler's own count, the same each time: see docs/benchmarks.md."""
    programs = [program for program in PROGRAMS if not program.library.startswith("with")]
    rows = [row for program in programs for row in rows_of(program, "v5e:2x2", tokens=32_768, head_dim=128)]
    cycles = {(row.library, row.kernel, row.path): row.step.cycles for row in rows}
    two_kernels = {
        path: cycles["splash", "dq", path] + cycles["splash", "dkv", path] for path in ("full", "partial")
    }
    assert cycles["dynmask_jax", "forward", "full"] <= cycles["splash", "forward", "full"]
    assert cycles["dynmask_jax", "forward", "partial"] <= cycles["splash", "forward", "partial"]
    assert cycles["dynmask_jax", "backward", "full"] <= 0.8 * two_kernels["full"]
    assert cycles["dynmask_jax", "backward", "partial"] <= 0.8 * two_kernels["partial"]
    assert cycles["dynmask_jax", "backward", "full"] <= cycles["splash", "backward", "full"]
    by_strips = [cycles["dynmask_jax", "backward", path] for path in STRIPS[1:]]
    assert by_strips == sorted(by_strips)
    assert by_strips[0] <= 0.55 * by_strips[-1]
