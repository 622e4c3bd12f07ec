"""The train step compiled for devices that are not there: what the program says, and what is refused."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from train.aot import cards, topology
from train.aot.cards import CARDS, in_compiler_process, memory_for_programs, missing_compiler
from train.aot.collectives import Transfer, summarize_transfers, transfers
from train.aot.hlo import bytes_of, parse
from train.aot.target import cards_of
from train.cli import main
from train.commands.compile import with_preset
from train.config.presets import PRESETS, TOPOLOGIES

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed"
)
needs_compiler = pytest.mark.skipif(missing_compiler() is not None, reason=missing_compiler() or "")

TEXT = Path(__file__).with_name("scheduled.hlo").read_text()
"""Written by hand: a ring whose hops are data, and three layers with a gather and a reduction each."""


def test_transfers_and_what_runs_meanwhile():
    ring, gathered, reduced = transfers(parse(TEXT))
    assert (ring.kind, ring.bytes, ring.devices) == ("collective-permute", 8 * 128 * 2, 4)
    assert ring.between == {"dynmask_forward": 1, "others": 1}
    assert (ring.asynchronous, ring.overlaps, ring.by_data, ring.times) == (True, True, True, 1)
    assert (gathered.kind, gathered.bytes, gathered.devices) == ("all-gather", 3 * 8 * 128 * 2, 4)
    assert gathered.between == {"products": 1}
    assert (gathered.overlaps, gathered.by_data, gathered.times) == (True, False, 3)
    assert (reduced.kind, reduced.bytes, reduced.devices) == ("all-reduce", 2 * 8 * 8 * 4 * 3 // 4, 4)
    assert (reduced.asynchronous, reduced.overlaps, reduced.times) == (False, False, 3)


def test_a_permute_that_is_done_at_once_overlaps_nothing():
    lines = TEXT.split("\n")
    kernel = next(line for line in lines if "tpu_custom_call" in line)
    early = [line for line in lines if line != kernel]
    early.insert(early.index(next(line for line in early if "-start = " in line)), kernel)
    ring, *_ = transfers(parse("\n".join(early)))
    assert ring.between == {"others": 1}
    assert ring.asynchronous
    assert not ring.overlaps


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("{{0,1},{2,3}}", 2),
        ("[4,8]<=[8,4]T(1,0)", 8),
        ("mesh['axis_0'=2,'axis_1'=4], device_ids=([2,4]T(1,0)) {'axis_0','axis_1'}", 8),
        ("mesh['axis_0'=8,'axis_1'=4] {'axis_0':(1)2,'axis_1'}", 8),
    ],
)
def test_ways_to_name_devices(groups, devices):
    text = TEXT.replace("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", groups)
    assert transfers(parse(text))[-1].devices == devices


@pytest.mark.parametrize(
    ("opcode", "type_", "sent"),
    [
        ("reduce-scatter", "(f32[2]{0}, f32[1]{0})", 36),
        ("reduce-scatter-start", "((f32[8]{0}, f32[4]{0}), (f32[2]{0}, f32[1]{0}))", 36),
        ("all-gather", "(f32[8]{0}, f32[4]{0})", 36),
        ("all-gather-start", "((f32[2]{0}, f32[1]{0}), (f32[8]{0}, f32[4]{0}))", 36),
        ("all-reduce", "(f32[8]{0}, f32[4]{0})", 72),
        ("all-reduce-start", "(f32[8]{0}, f32[4]{0})", 72),
        ("all-to-all-start", "((f32[8]{0}, f32[4]{0}), (f32[8]{0}, f32[4]{0}))", 36),
        ("collective-permute-start", "((f32[8]{0}, f32[4]{0}), (f32[8]{0}, f32[4]{0}))", 48),
    ],
)
def test_what_a_device_sends(opcode, type_, sent):
    """Twelve numbers in two arrays, over four devices: at once, or with a start and an end."""
    groups = (
        "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}"
        if "permute" in opcode
        else "replica_groups=[1,4]<=[4]"
    )
    done = opcode.replace("-start", "-done")
    lines = [f"  %{opcode} = {type_} {opcode}(%p, %p), {groups}", f"  %last = f32[2]{{0}} {done}(%{opcode})"]
    head = [
        "HloModule m, is_scheduled=true",
        "",
        "ENTRY %main (p: f32[8]) -> f32[2] {",
        "  %p = f32[8]{0} parameter(0)",
    ]
    text = "\n".join([*head, *(lines if done != opcode else lines[:1]), "}"])
    assert [each.bytes for each in transfers(parse(text))] == [sent]


def test_text_that_is_not_understood_is_refused():
    with pytest.raises(ValueError, match="not scheduled"):
        parse(TEXT.replace("is_scheduled=true, ", ""))
    with pytest.raises(ValueError, match="has a start and no end"):
        transfers(parse(TEXT.replace("collective-permute-done(", "copy(")))
    with pytest.raises(ValueError, match="names its devices in a way that is not known"):
        transfers(parse(TEXT.replace("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", "?")))


@pytest.mark.parametrize(
    ("target", "name"), [("__gpu$xla.gpu.triton", "pallas_call"), ("mosaic_gpu_v2", "mpmd_map")]
)
def test_a_gpus_kernel_and_the_times_of_its_loops(target, name):
    """XLA names every Pallas kernel alike there, and counts a loop's turns itself."""
    kernel = re.search(r'custom_call_target="tpu_custom_call".*', TEXT)
    assert kernel is not None
    named = f'custom_call_target="{target}", metadata={{op_name="jit(f)/cond/dynmask_dq/{name}"}}'
    ring, gathered, _ = transfers(parse(TEXT.replace(kernel[0], named)))
    assert ring.between == {"dynmask_dq": 1, "others": 1}
    assert gathered.times == 3
    counted = re.sub(r"(body=%layer\w*)", r'\1, backend_config={"known_trip_count":{"n":"7"}}', TEXT)
    assert counted != TEXT
    assert [each.times for each in transfers(parse(counted))] == [1, 7, 7]


def test_bytes_of_small_types():
    assert bytes_of("(s4[3]{0}, pred[5]{0}, f8e4m3fn[2,2]{1,0}, f32[], token[])") == 2 + 5 + 4 + 4


def test_kinds_sum_what_is_alike():
    def transfer(**changes) -> Transfer:
        source = (
            "jit(train_step)/transpose(jvp())/checkpoint/rematted_computation/gathered/convert_element_type"
        )
        return replace(Transfer("all-gather", source, 10, 4, (), True, {"products": 2}), **changes)

    again, backward = summarize_transfers(
        (transfer(), transfer(bytes=5), transfer(source="jit(f)/transpose(jvp())/ppermute", between={}))
    )
    assert (again.phase, again.source, again.meanwhile) == ("forward again", "weights", "products")
    assert (again.count, again.bytes) == (2, 15)
    assert (backward.phase, backward.source, backward.meanwhile) == ("backward", "ring of keys", "nothing")


def test_the_preset_of_a_topology():
    assert set(TOPOLOGIES.values()) <= set(PRESETS)
    for words in (["--topology", "v5e:4x4"], ["--topology=v5e:4x4", "--seed", "1"]):
        command, rest = with_preset(words)
        assert (command.run.name, rest) == ("lm-128k", words)
    assert with_preset(["--topology", "v5e:2x2"])[0].run == PRESETS["run"]()
    command, rest = with_preset(["lm-128k", "--seed", "1"])
    assert (command.topology, rest) == ("v5e:4x4", ["--seed", "1"])
    assert with_preset(["demo"])[0].topology is None


def refused(capsys, *words) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["compile", *words])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_without_libtpu(capsys, monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    assert "pip install -e '.[train,tpu]'" in refused(capsys, "lm-128k")


def test_a_preset_or_a_topology_that_is_missing(capsys):
    assert "unknown preset 'lm-64k'; the presets are run, demo" in refused(capsys, "lm-64k")
    assert "compile needs --topology" in refused(capsys, "demo")


@needs_libtpu
def test_a_topology_that_is_unknown_and_a_mesh_of_other_devices(capsys):
    assert "--topology: libtpu knows no 'v9z:2x2'" in refused(capsys, "demo", "--topology", "v9z:2x2")
    said = refused(capsys, "lm-128k", "--mesh.context", "8")
    assert "mesh: 1 × 1 × 8 × 1 (data × fsdp × context × tensor) is of 8 devices, and v5e:4x4 has 16" in said
    said = refused(capsys, "demo", "--topology", "v5e:2x2", "--mesh.context", "8")
    assert "and v5e:2x2 has 4, of 1 hosts" in said


@pytest.mark.parametrize("wrong", ["h100", "h100:0", "h100:2x4", "b200:8", "v100:8", "H100:8", "lm-8k", ":"])
def test_a_card_that_is_unknown_or_not_counted(wrong, capsys):
    said = refused(capsys, "demo", "--topology", wrong)
    assert f"--topology: {wrong!r} is neither a TPU's generation and its chips, as v4:2x2x1" in said
    assert "nor cards and how many, as h100:8; the cards are h100, a100, l4" in said


def test_names_of_cards_and_of_tpus():
    assert [cards_of(name) for name in ("h100:8", "l4:16")] == [("h100", 8), ("l4", 16)]
    assert [cards_of(name) for name in ("v5e:4x4", "v4:2x2x1", "tpu7x:2x2x1")] == [None] * 3


def test_without_the_gpus_compiler(capsys, monkeypatch):
    monkeypatch.setattr(
        cards, "missing_compiler", lambda: "the GPU's compiler is not installed: make gpu-check"
    )
    assert "not installed: make gpu-check" in refused(capsys, "demo", "--topology", "h100:1")


@needs_compiler
def test_a_mesh_of_more_cards_than_there_are(capsys):
    said = refused(capsys, "demo", "--topology", "a100:4", "--mesh.context", "8")
    assert "is of 8 devices, and a100:4 has 4, of 1 hosts" in said


def test_the_memory_that_jax_takes_of_a_card(monkeypatch):
    for name in (names := ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")):
        monkeypatch.delenv(name, raising=False)
    assert memory_for_programs("l4") == CARDS["l4"].memory * 3 // 4
    for name, share in zip(names, (0.5, 0.25), strict=True):
        monkeypatch.setenv(name, str(share))
        assert memory_for_programs("l4") == CARDS["l4"].memory * share
        monkeypatch.delenv(name)


@needs_compiler
def test_a_compilers_process_that_ends_says_why():
    with pytest.raises(RuntimeError, match="the compiler's process ended"):
        in_compiler_process(os._exit, 3)


SMALL = """--mesh.context 2 --mesh.fsdp 2 --block 128 --data.length 2048 --data.batch 2
--model.width 256 --model.heads 2 --model.kv-heads 1 --model.hidden 512 --model.layers 6
--model.dtype bfloat16 --model.remat full --curriculum.start 256"""


def compiled(topology: str, *words) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "train", "compile", "--topology", topology, *shlex.split(SMALL), *words]
    return subprocess.run(
        command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False
    )


@needs_libtpu
def test_a_run_on_a_mesh(tmp_path):
    """The ring's permutes go on while the kernels compute, forward and backward, in every layer."""
    done = compiled("v5e:2x2", "--vocabulary", "512", "--json", str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "4 × TPU v5 lite, mesh 1 × 2 × 2 × 1" in done.stdout
    assert "of 15.75 GiB: it fits" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    weights = 6 * (256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 512 + 2 * 256) + 2 * 512 * 256 + 256
    assert found["weights"] == weights
    # Three float32 numbers of a weight, spread over the four devices; norms are whole, and counts small.
    assert 3 * 4 * weights / 4 <= found["memory"]["state"] < 1.1 * 3 * 4 * weights / 4
    ring = [each for each in found["transfers"] if each["source"].endswith("ppermute")]
    by_data = [each for each in ring if any(loop["times"] is None for loop in each["loops"])]
    hidden = [each for each in by_data if any(name.startswith("dynmask_") for name in each["between"])]
    assert set().union(*(each["between"] for each in hidden)) >= {"dynmask_forward", "dynmask_backward"}
    # Of each arc, keys and values set out home before any visit, and their gradients after the last.
    alone = sorted(each["bytes"] for each in by_data if each not in hidden)
    assert alone == [2 * 1024 * 128] * 4 + [4 * 1024 * 128] * 4
    assert {each["loops"][-2]["times"] for each in by_data} == {6}


PLAIN = "--mesh.context 1 --model.backend dense --data.length 256 --curriculum.start 128"
"""No ring and no kernels: programs that compile sooner."""


@needs_libtpu
def test_a_run_that_does_not_fit(tmp_path):
    width = f"{PLAIN} --mesh.fsdp 4 --data.batch 4 --model.width 32768 --model.heads 256 --model.kv-heads 256"
    width += " --model.hidden 32768"
    done = compiled("v5e:2x2", *shlex.split(width), "--json", str(tmp_path / "found.json"))
    assert done.returncode == 1, done.stderr[-2000:]
    assert "it does not fit" in done.stdout
    assert json.loads((tmp_path / "found.json").read_text())["transfers"] == []


@needs_compiler
def test_a_run_on_cards(tmp_path):
    """The ring's permutes lie around the kernels there, too."""
    done = compiled("h100:4", "--vocabulary", "512", "--json", str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("run for h100:4: 4 × NVIDIA H100 80GB HBM3, mesh 1 × 2 × 2 × 1")
    assert "of 59.33 GiB: it fits" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert 3 * 4 * found["weights"] / 4 <= found["memory"]["state"] < 1.1 * 3 * 4 * found["weights"] / 4
    assert found["memory"]["temporaries"] > found["memory"]["state"]
    ring = [each for each in found["transfers"] if each["source"].endswith("ppermute")]
    kernels = {name for each in ring for name in each["between"] if name.startswith("dynmask_")}
    assert kernels >= {"dynmask_forward", "dynmask_dq"}
    assert {each["loops"][0]["times"] for each in ring} == {6}


@needs_compiler
def test_a_run_that_does_not_fit_a_card():
    """XLA compiles for a card what is too large for it."""
    width = f"{PLAIN} --mesh.fsdp 1 --vocabulary 8388608 --model.width 1024 --model.heads 8"
    done = compiled("l4:1", *shlex.split(width))
    assert done.returncode == 1, done.stderr[-2000:]
    assert "of 16.50 GiB: it does not fit" in done.stdout
