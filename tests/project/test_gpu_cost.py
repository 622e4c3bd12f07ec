"""The reader of a GPU kernel's machine code, and the table of its costs, without the compiler."""

import json
from pathlib import Path

import jax
import pytest

from benchmarks import gpu_compile, gpu_cost, peers, report
from benchmarks.gpu_compile import Kernel
from benchmarks.sass import Code, Instruction, by_unit
from train.aot.cards import CARDS

LINES = [
    "MOV R0, R1",
    ".L_x_0:",
    "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24",
    "@!P1 BRA `(.L_x_1)",
    "FSEL R1, R1, -INF , !P2",
    "FSEL R2, R2, -INF , !P2",
    ".L_x_1:",
    "MUFU.EX2 R3, R1",
    "@P2 BRA `(.L_x_0)",
    "EXIT",
]
"""A loop with a branch around the mask, which nvdisasm would print so."""


def code(lines: list[str]) -> Code:
    """From the instructions alone, with the places that nvdisasm adds."""
    return Code.of("\n".join(x if x[0] == "." else f"  /*{16 * n:04x}*/ {x} ;" for n, x in enumerate(lines)))


def kernel(lines: list[str], threads: int = 384, loading: int = 128) -> Kernel:
    return Kernel(registers=168, spills=0, shared=2**17, threads=threads, loading=loading, code=code(lines))


@pytest.mark.parametrize(
    ("operation", "variant", "count"),
    [
        ("HMMA", ".16816.F32.BF16", 16 * 8 * 16),
        ("HMMA", ".1688.F32", 16 * 8 * 8),
        ("HGMMA", ".64x256x16.F32.BF16", 64 * 256 * 16 // 4),
        ("FFMA", ".FTZ", 0),
    ],
)
def test_what_a_warp_multiplies(operation, variant, count):
    assert Instruction(operation, variant, "").multiply_adds == count


def test_a_body_without_what_a_branch_leads_around():
    read = code(LINES)
    (body,) = read.loops
    assert by_unit(body) == {"tensor": 1, "special": 1, "float": 2, "memory": 0, "other": 2}
    assert by_unit(read.without_branch(body))["float"] == 0
    without = [each for each in LINES if "L_x_1" not in each]
    read = code(without)
    assert read.without_branch(read.loops[0]) == read.loops[0]


def test_cycles_of_a_loop():
    """Eight of twelve warps compute; each pair needs two products of 64 numbers."""
    compiled = kernel(LINES)
    (body,) = compiled.code.loops
    pairs = 8 * (64 * 128 * 16 // 4) // (2 * 64)
    row = gpu_cost._row(gpu_cost._Loop("forward", "full", pairs, compiled, body), CARDS["h100"], 64)
    assert row["products"] == 1
    assert row["cycles"]["tensor"] == pytest.approx(1000 * 2 * 64 / 2048)
    assert row["cycles"]["special"] == pytest.approx(8 * 32 / 16 / pairs * 1000)
    assert row["cycles"]["issue"] == pytest.approx(8 * len(body) / 4 / pairs * 1000)
    twice = gpu_cost._row(gpu_cost._Loop("forward", "full", pairs // 2, compiled, body), CARDS["h100"], 64)
    assert twice["products"] == 2
    assert twice["cycles"]["tensor"] == pytest.approx(2 * row["cycles"]["tensor"])
    with pytest.raises(ValueError, match="forward, full: 262,144 multiply-adds are too few for a turn"):
        gpu_cost._row(gpu_cost._Loop("forward", "full", pairs + 1, compiled, body), CARDS["h100"], 64)


def test_tokamaxs_kernels_are_told_apart_by_their_products():
    """Mosaic GPU numbers those that have no name."""
    more = [*LINES[:3], *LINES[2:]]
    forward = kernel([*LINES[:-1], *(each.replace("L_x_", "L_y_") for each in LINES)])
    kernels = {"anonymous_1": kernel(more), "anonymous_2": kernel(LINES), "flash_attention_sm90_0": forward}
    read = list(gpu_cost._tokamaxs_mosaic_loops(kernels, CARDS["h100"], 128))
    assert [(loop.kernel, loop.path) for loop in read] == [
        (name, blocks) for name in ("forward", "dq", "dkv") for blocks in ("full", "test")
    ]
    assert {loop.kernel: loop.compiled for loop in read}["dkv"] is kernels["anonymous_1"]
    assert [by_unit(loop.body)["float"] for loop in read] == [2, 2, 0, 2, 0, 2]


def test_our_kernels_of_a_hopper_and_those_for_all_cards(monkeypatch):
    """At head dim 256 the backward pass has none of a Hopper's own: those rows are in the other library."""
    loops = [*LINES[:-1], *(each.replace("L_x_", "L_y_") for each in LINES)]
    kernels = {f"dynmask_{name}": kernel(loops) for name in gpu_cost.MATMULS}
    for head_dim, own in ((64, ["forward", "dq", "dkv"]), (256, ["forward"])):
        for kind, names in (("triton", ["forward", "dq", "dkv"]), ("mosaic", own)):
            read = list(gpu_cost._our_loops(kernels, CARDS["h100"], head_dim, kind=kind))
            assert [loop.kernel for loop in read[::2]] == names
            assert [loop.path for loop in read] == ["full", "test"] * len(names)
    assert {loop.pairs for loop in read} == {128 * 64}
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 1))
    (row,) = gpu_cost._rows("dynmask_jax, mosaic", "h100", 128)
    assert row["refused"] == "needs JAX 0.11.2"


def test_mosaics_dumps_of_a_kernel_have_one_name_and_perhaps_two_numbers(tmp_path):
    """Lowered twice, it is compiled once; those without a name are told apart by their numbers."""

    def dumped(name: str, text: str) -> Path:
        (path := tmp_path / name).write_text(text)
        return path

    assert gpu_compile._unnumbered(Path("dynmask_dkv_12.resources.txt")) == "dynmask_dkv"
    assert gpu_compile._unnumbered(Path("flash_attention_sm90_0.ptx")) == "flash_attention_sm90"
    dumped("dynmask_dkv_2.resources.txt", "of dkv")
    dumped("dynmask_dkv_3.resources.txt", "of dkv")
    assert gpu_compile._resources(tmp_path / "dynmask_dkv_1.ptx") == "of dkv"
    for number in "12":
        dumped(f"anonymous_{number}.resources.txt", number)
    assert gpu_compile._resources(tmp_path / "anonymous_2.ptx") == "2"
    with pytest.raises(RuntimeError, match=r"2 of anonymous_1.+ may belong with anonymous_3\.ptx"):
        gpu_compile._resources(tmp_path / "anonymous_3.ptx")


def test_the_table_says_why_a_library_has_no_row(monkeypatch):
    monkeypatch.setattr(peers, "missing", lambda package: peers.NOT_INSTALLED)
    rows = [row for name in gpu_cost.LIBRARIES[3:] for row in gpu_cost._rows(name, "h100", 128)]
    text = gpu_cost.section({"compiler": "ptxas 1", "tokamax": "not installed", "rows": rows})
    assert "(ptxas 1, tokamax not installed)" in text
    for name in ("triton", "mosaic"):
        assert f"| forward | – | tokamax, {name} | not installed | – |" in text


def test_reasons_of_refusals():
    said = {
        "no gradient": "NotImplementedError: Mosaic GPU backend only supported for sm90 and sm100 GPUs.",
        "shared memory": "INTERNAL: Shared memory size limit exceeded: requested 1, available: 0",
        "does not compile": "anything else",
    }
    assert {reason: gpu_cost._reason(words) for reason, words in said.items()} == {x: x for x in said}


def test_the_guide_to_cards_shows_what_was_counted():
    results = json.loads((report.FOLDER / "gpu_cost.json").read_text())
    text = (report.FOLDER.parent / "gpu.md").read_text()
    assert gpu_cost.bounds(results, "h100", (64, 128)) in text, "docs/gpu.md is not what gpu_cost.json gives"
    assert f"tokamax {results['tokamax']} under its causal mask" in text
    assert {row["products"] for row in results["rows"] if row["library"] in gpu_cost.LIBRARIES[:2]} == {1}
