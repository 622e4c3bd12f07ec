"""Every benchmark at a toy size, and the table that is made of its results. No time is claimed here."""

import json
import os
import runpy
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest

from benchmarks import (
    balance,
    block_masks,
    card,
    causal,
    compile_time,
    curriculum,
    decode,
    exposure,
    flashmask,
    gpu_cost,
    grain,
    loss,
    markdown,
    memory,
    peers,
    plans,
    report,
    scores,
    topologies,
    torch_peers,
    tpu_schedule,
    trainer,
)
from benchmarks.__main__ import BENCHMARKS, KNOWN, main, measured
from benchmarks.calls import BOTH, FORWARD, WAYS, Size, both_ways, compiled
from benchmarks.timing import attempt, compared, machine, medians
from dynmask_jax import LAYOUTS, Causal, Tokens, Window, attention, mask_tensor
from dynmask_jax import balance as simulate
from train.config.presets import PRESETS, TOPOLOGIES
from train.parallel.mesh import AXES

DECODING = decode.Settings(2, 16, 2, 1, 8, 16, 64, ("local", "global"), 4, prompt=6, tokens=3, batches=(2,))
TOYS = {
    "causal": causal.Settings(32, 2, 8),
    "exposure": exposure.Settings((32, 64), parts=(1, 4), heads=2, head_dim=8, most_pairs=1_000),
    "grain": grain.Settings((64,), masks=("causal", "packed rows"), fixed=(16, 32), heads=2, head_dim=8),
    "memory": memory.Settings((32,), window=16, heads=2, head_dim=8),
    "curriculum": curriculum.Settings(32, 2, 8, steps=10, points=3, start=4, chunk=8, layers=1),
    "trainer": trainer.Settings(64, 1, 16, 2, 1, 16, steps=1, window=16, block=16),
    "loss": loss.Settings((64, 128), vocabulary=256, width=8, chunk=32),
    "decode": DECODING,
    "flashmask": flashmask.Settings(64, 2, 8, patterns=("causal", "document")),
    "scores": scores.Settings(32, 2, 8),
    "plans": plans.Settings((64,), ours=(128,)),
    "compile_time": compile_time.Settings(layers=1, tokens=16),
    "tpu_schedule": tpu_schedule.Settings((), (), ()),
    "gpu_cost": gpu_cost.Settings((), ()),
    "balance": balance.Settings(1_024, devices=8, block=8, chunk=100, stages=(0, 300, balance.END)),
    "topologies": topologies.Settings(()),
    "card": card.Settings(
        heads=2,
        lengths=(64,),
        head_dims=(16,),
        parts=(4,),
        masks=("nothing",),
        twelve=flashmask.Settings(64, 2, 8, patterns=("causal",)),
        blocks=(64,),
        tiles=((16, 16, 4, 1), (64, 64, 2)),
    ),
}


NO_MEDIANS = ("memory", "loss", "tpu_schedule", "gpu_cost", "balance", "topologies")


@pytest.fixture(scope="module")
def results():
    """The toy results of each benchmark, once for all tests, as where no other package is installed."""
    with pytest.MonkeyPatch.context() as patch:
        without_peers(patch)
        return {name: measured(name, settings, repeats=1) for name, settings in TOYS.items()}


def without_peers(patch):
    """As where none is installed: compiling one takes longer than all of this."""
    patch.setattr(peers, "missing", lambda package: peers.NOT_INSTALLED)


def test_rounds_call_every_function_in_turn():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    assert set(medians(functions, repeats=3)) == {"a", "b"}
    assert "".join(calls) == "ab" + "aabb" * 3, "once to compile, then rounds; short calls warm up"


def test_what_is_not_there_is_named_among_the_times():
    times = compared({"ours": {"forward": lambda: None}, "theirs": {"forward": "not installed"}}, repeats=1)
    assert times["ours"]["forward"] >= 0
    assert times["theirs"] == {"forward": "not installed"}


def test_a_peer_that_fails_says_why_and_one_of_ours_raises():
    def broken():
        raise ValueError("no compiler\nand more")

    assert attempt(broken) == "ValueError: no compiler"
    assert attempt(machine) is machine
    with pytest.raises(ValueError, match="no compiler"):
        compared({"ours": {"forward": broken}}, repeats=1)


@pytest.mark.slow
def test_every_benchmark_has_a_toy_a_section_and_results(results):
    assert TOYS.keys() == KNOWN.keys() == results.keys()
    assert list(KNOWN) == list(report.SECTIONS)
    for name, found in results.items():
        text = report.section(name, found)
        assert text.startswith(f"## {report.SECTIONS[name][0]}\n")
        assert ("medians of 1 rounds" in text) == (name not in NO_MEDIANS), (
            "a peak is no median, and what is counted is always the same"
        )
        assert f"jax {found['machine']['jax']}" in text


@pytest.mark.slow
def test_peers_that_are_not_installed_are_named(results):
    times = results["causal"]["times"]
    named = [name for name, ways in times.items() if ways[FORWARD] == "not installed"]
    assert named == [
        "tokamax, xla",
        "tokamax, xla_chunked",
        "PyTorch SDPA, is_causal",
        "PyTorch SDPA, dense mask",
        "PyTorch FlexAttention",
    ]
    assert "| PyTorch FlexAttention | not installed | – | not installed | – |" in causal.section(
        results["causal"]
    )
    assert {row["times"]["create_block_mask"] for row in results["plans"]["rows"][:3]} == {"not installed"}
    assert {row["times"][flashmask.FLEX][FORWARD] for row in results["flashmask"]["rows"]} == {
        "not installed"
    }


@pytest.mark.slow
def test_windows_share_one_compilation_and_large_ones_are_left_out(results):
    rows = results["exposure"]["rows"]
    assert [(row["tokens"], row["window"]) for row in rows] == [(32, 32), (32, 8), (64, 16)]
    assert all(row["compilations"] == dict.fromkeys(WAYS, 1) for row in rows)
    assert rows[1]["exposure"] == pytest.approx(sum(min(i + 1, 8) for i in range(32)) / (32 * 33 / 2))
    assert exposure.bound(0.5, 16_384) == pytest.approx(0.615)


def test_packed_rows_are_short_documents_that_fill_the_sequence():
    pattern = grain.packed_rows(8_192)
    sizes = np.bincount(np.asarray(pattern.tokens.segment))
    sizes = sizes[sizes > 0]
    assert sizes.sum() == 8_192
    assert (sizes <= 1_500).all()
    assert (sizes[:-1] >= 300).all(), "the last is what is left"


@pytest.mark.slow
def test_the_chosen_grain_stands_beside_the_best_of_the_fixed_ones(results):
    rows = results["grain"]["rows"]
    assert [row["mask"] for row in rows] == ["causal", "packed rows"]
    assert rows[0]["exposure"] == pytest.approx(65 / 128)
    row = rows[0] | {"times": {"chosen": 3.3, "16": 3.0, "32": 6.0}, "exposure": 0.5, "computed": 1.0}
    assert (
        "| 64 tokens, causal | 50.0% | 100.0% | 0.0% | 3.30 s | 3.00 s | 6.00 s | 1.10× |"
        in grain.section(results["grain"] | {"rows": [row]})
    )


def test_the_exposure_table_gives_shares_of_the_full_masks_time():
    row = {"tokens": 64, "pairs": 1_000, "compilations": {}}
    full = {**row, "window": 64, "exposure": 1.0, "times": {FORWARD: 2.0, BOTH: 8.0}}
    half = {**row, "window": 32, "exposure": 0.5, "times": {FORWARD: 1.0, BOTH: 5.0}}
    settings = TOYS["exposure"].__dict__
    text = exposure.section({"settings": settings, "fine_cost": 1.5, "rows": [full, half]})
    assert "| 64 tokens, window 32 | 50.0% | 67.5% | 1 s | 50.0% | 5 s | 62.5% | 5,000 s |" in text


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own(results):
    (row,) = results["memory"]["rows"]
    assert row["arrays"] == 4 * (32 * 2 * 8) * 4
    assert row["temporaries"] > 0
    assert row["jax_nn_temporaries"] > 32 * 32 * 2 * 4
    assert row["added"] is None or row["added"] >= 0


@pytest.mark.slow
def test_a_whole_curriculum_is_one_compilation_and_its_cost_a_mean(results):
    for what in ("attention", "train step"):
        assert {each["compilations"] for each in results["curriculum"][what].values()} == {1}
        assert list(results["curriculum"][what]["growing window"]["points"]) == ["0", "3", "6"]
    # Steps 0 … 9: 1, 2, 3 on the way, then level at 4.
    assert curriculum.mean_over_run({0: 1.0, 3: 4.0}, steps=10) == pytest.approx((1 + 2 + 3 + 7 * 4) / 10)


def test_curricula_end_at_the_full_mask():
    settings = TOYS["curriculum"]
    tokens = Tokens.sequence(settings.tokens)
    for name, each in curriculum.curricula(settings).items():
        seen = np.asarray(mask_tensor(each(settings.growth), tokens))
        assert np.array_equal(seen, np.tril(np.ones_like(seen))) == (name != "static chunks")


def test_all_jax_peers_compute_the_same_attention():
    arrays = Size(32, 2, 8).arrays()
    ours = both_ways(compiled(lambda q, k, v: attention(q, k, v, Causal())), *arrays)
    for ways in peers.jax_nn(arrays).values():
        _same(ours, ways, swapped=False)


@pytest.mark.parametrize("dense", [False, True])
def test_torch_computes_the_same_attention(dense):
    pytest.importorskip("torch", reason="torch is not installed")
    arrays = Size(32, 2, 8).arrays()
    mask = mask_tensor(Causal(), Tokens.sequence(32)) if dense else None
    ours = both_ways(compiled(lambda q, k, v: attention(q, k, v, Causal())), *arrays)
    _same(ours, torch_peers.sdpa(arrays, mask), swapped=True)


def _same(ours, theirs, *, swapped):
    def numbers(x):
        return np.asarray(x.detach()).swapaxes(1, 2) if swapped else np.asarray(x)

    np.testing.assert_allclose(numbers(theirs[FORWARD]()), ours[FORWARD](), atol=1e-5)
    gradients = theirs[BOTH]() if swapped else theirs[BOTH]()[1]
    for theirs_one, ours_one in zip(gradients, ours[BOTH]()[1], strict=True):
        np.testing.assert_allclose(numbers(theirs_one), ours_one, atol=1e-5)


def test_decoding_is_timed_by_what_more_tokens_take():
    times = {"prompt, 2 texts": 1.0, "prompt and tokens, 2 texts": 3.0}
    theirs = {"prompt, 2 texts": 0.5, "prompt and tokens, 2 texts": 8.5}
    results = {
        "settings": asdict(replace(DECODING, tokens=5)),
        "times": {decode.OURS: times, decode.THEIRS: theirs},
        "sampling": {"greedy": {"seconds": 0.002}},
    }
    text = decode.section(json.loads(json.dumps(results)))
    assert "| 2 texts | 4.00 | 1.00 | 4.00× | 1 s | 500 ms |" in text
    assert "| greedy | 2 ms |" in text
    results["times"][decode.THEIRS] = dict.fromkeys(times, "not installed")
    assert "| 2 texts | 4.00 | not installed | – | 1 s | not installed |" in decode.section(results)


def test_a_block_mask_that_does_not_fit_is_named_by_its_reason(monkeypatch):
    ended = subprocess.CompletedProcess([], 1, stderr="x\nRuntimeError: can't allocate memory: 17 bytes")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    monkeypatch.setattr(peers, "missing", lambda package: None)
    assert block_masks.call("causal", 2**20, False, limit=1.0) == "out of memory"
    ended.stderr = "x\nValueError: no"
    assert block_masks.call("causal", 2**20, False, limit=1.0) == "ValueError: no"

    def too_slow(*_, **__):
        raise subprocess.TimeoutExpired("x", 1.0)

    monkeypatch.setattr(subprocess, "run", too_slow)
    assert block_masks.call("causal", 2**20, False, limit=1.0) == "over 1 s"


def test_numbers_read_well():
    assert [markdown.seconds(x) for x in (0.00012345, 0.0123, 0.5, 1.234, 123.4)] == [
        "0.123 ms",
        "12.3 ms",
        "500 ms",
        "1.23 s",
        "123 s",
    ]
    assert [markdown.ratio(3.0, 2.0), markdown.ratio("not installed", 2.0)] == ["1.50×", "–"]
    assert [markdown.megabytes(n) for n in (None, 3 * 2**20, 2**39)] == ["–", "3 MiB", "512 GiB"]


def test_the_command_measures_writes_and_prints(tmp_path, monkeypatch, capsys):
    without_peers(monkeypatch)
    monkeypatch.setattr(plans, "QUICK", TOYS["plans"])
    folder = tmp_path / "results"
    main(["--only", "plans", "--repeats", "1", "--json", str(folder)])
    assert [path.name for path in folder.iterdir()] == ["plans.json"]
    table = (tmp_path / "results.md").read_text()
    assert table == report.document(folder)
    assert json.loads((folder / "plans.json").read_text())["settings"]["tokens"] == [64]
    assert "## Finding the blocks to skip" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--only", "nothing"])
    with pytest.raises(SystemExit):
        main(["--repeats", "0"])


def test_results_of_no_section_are_refused(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="no section: other"):
        report.document(tmp_path)


def test_the_documentations_table_is_that_of_its_json():
    assert report.table_path(report.FOLDER).read_text() == report.document(report.FOLDER), (
        "docs/benchmarks.md is not what docs/benchmarks/*.json give: run python -m benchmarks --table"
    )


@pytest.fixture(scope="module")
def simulated():
    """The documentation's results of `benchmarks.balance`."""
    return json.loads((report.FOLDER / "balance.json").read_text())


def test_the_picks_at_a_million_tokens_are_even_at_every_stage(simulated):
    assert simulated["settings"] == json.loads(json.dumps(asdict(balance.FULL)))
    picks = {(row["curriculum"], row["stage"]): row["picked"]["imbalance"] for row in simulated["rows"]}
    assert len(picks) == 9 * len(balance.FULL.stages) + 1
    assert picks[balance.FULL_MASK, balance.END] <= 1.05
    assert max(picks.values()) <= 1.15


def test_the_simulators_results_are_those_of_the_code(simulated, monkeypatch):
    kept = (balance.FULL_MASK, "growing window, linear", "reveal, strided")
    every = balance.curricula(balance.FULL)
    monkeypatch.setattr(balance, "curricula", lambda settings: {name: every[name] for name in kept})
    stage = 50
    rows = [
        row for row in simulated["rows"] if row["curriculum"] in kept and row["stage"] in (stage, balance.END)
    ]
    stages = (stage, balance.END)
    assert balance.measure(replace(balance.FULL, stages=stages), repeats=1)["rows"] == rows


def test_the_guide_to_devices_shows_the_simulators_figures(simulated):
    docs = report.FOLDER.parent
    text = (docs / "devices.md").read_text()
    assert balance.summary(simulated) in text, (
        "docs/devices.md is not what docs/benchmarks/balance.json gives"
    )
    example = simulate(Causal() & Window(40_000), 2**17, 8, layouts=LAYOUTS[:3], strategies=["ring"])
    assert str(example) in text
    zigzag, contiguous = (max(row[name]["imbalance"] for row in simulated["rows"]) for name in balance.FIXED)
    assert f"zigzag reaches {zigzag:.2f} and contiguous {contiguous:.2f}" in text
    picture = runpy.run_path(str(docs / "make_pictures.py"))["balance_picture"](simulated)
    assert [ax.get_title() for ax in picture.axes[:3]] == [
        "growing window, linear",
        "growing chunks, linear",
        "reveal, nearest",
    ]
    assert (docs / "balance.png").stat().st_size < 200_000


@pytest.fixture(scope="module")
def compiled_steps():
    """The documentation's results of `benchmarks.topologies`."""
    return json.loads((report.FOLDER / "topologies.json").read_text())


def test_the_guide_to_devices_shows_what_the_compiler_said(compiled_steps):
    text = (report.FOLDER.parent / "devices.md").read_text()
    assert topologies.memory(compiled_steps) in text, "docs/devices.md is not what topologies.json gives"
    assert topologies.transfers(compiled_steps) in text


def test_presets_fit_their_topologies_and_their_rings_overlap_with_kernels(compiled_steps):
    """Of the program that was compiled last; a change of a preset asks for it anew."""
    assert {row["topology"]: row["run"] for row in compiled_steps["rows"]} == TOPOLOGIES
    for row in compiled_steps["rows"]:
        run = PRESETS[row["run"]]()
        assert row["mesh"] == {axis: getattr(run.mesh, axis) for axis in AXES}
        assert (row["length"], row["rows"]) == (run.data.length, run.data.batch)
        size = row["memory"]
        assert sum(size.values()) - size["limit"] < 0.9 * size["limit"], "a tenth is left"
        ring = _ring(row)
        assert {kind["phase"] for kind in ring} == {"forward", "forward again", "backward"}
        assert {kind["meanwhile"] for kind in ring if kind["phase"] != "backward"} == {"kernels"}


@pytest.mark.parametrize("preset", ["lm-128k", "lm-1m-v5p", "lm-1m-v6e"])
def test_hops_back_overlap_with_kernels_but_the_first_and_last_of_an_arc(compiled_steps, preset):
    (row,) = (row for row in compiled_steps["rows"] if row["run"] == preset)
    back = {kind["meanwhile"]: kind["count"] for kind in _ring(row) if kind["phase"] == "backward"}
    assert back.keys() == {"kernels", "nothing"}
    assert back["kernels"] >= back["nothing"]


def _ring(row: dict) -> list[dict]:
    """The transfers of a ring of keys in a compiled step."""
    return [kind for kind in row["kinds"] if kind["by_data"] and kind["source"] == "ring of keys"]


def test_what_a_card_is_asked_is_answered_without_one_too():
    """At toy sizes, interpreted: its first minutes on a card are not spent on its own errors."""
    with pytest.MonkeyPatch.context() as patch:
        without_peers(patch)
        patch.setattr(card, "TOLERANCE", {np.dtype("bfloat16"): card.TOLERANCE[np.dtype("bfloat16")]})
        found = measured("card", TOYS["card"], repeats=1)
    assert all(row["of_tolerance"] <= 1 for row in found["accuracy"])
    (causal,) = found["causal"]
    assert causal["times"]["dynmask_jax"][BOTH] > 0
    assert isinstance(causal["times"]["jax.nn, cudnn"][FORWARD], str), "why there is no cuDNN here"
    assert [row["exposure"] for row in found["windows"]] == pytest.approx([904 / 2080], abs=1e-4)
    *_, of_warpgroups = found["tiles"]
    assert len(found["tiles"]) == 3
    assert "needs" in of_warpgroups["forward"], "why there are no warpgroups here"
    assert "full causal mask" in report.section("card", found)


def test_a_card_that_is_not_there_is_said(capsys):
    with pytest.raises(SystemExit):
        main(["--device", "gpu"])
    assert "--device gpu: JAX computes on cpu here, and finds no card" in capsys.readouterr().err


def test_the_command_is_one_line_away():
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "benchmarks", "--help"]
    text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert all(name in text for name in BENCHMARKS)


def test_a_package_that_is_not_there_is_missing():
    assert peers.missing("jax") is None
    assert peers.missing("no_such_package") == "not installed"
