"""The reader of TPU schedules, on a kernel written by hand in the compiler's format."""

from dataclasses import asdict, replace

import pytest

from benchmarks import tpu_schedule
from benchmarks.tpu_compile import read
from benchmarks.tpu_schedule import MXU_RATE, Program, Settings, measure, rows_of, section
from benchmarks.vliw import Kernel, blocks_of, folded, utilization_of

# One delay slot, as on v4. The grid's loop is 0x1 to 0x10: a full block at 0x5, and at 0xa a partial one,
# whose inner loop goes from 0 to 8 by 2.
SCHEDULE = """\
= control target key start
LB: loop body
PF: predicated region fallthrough
= control target key end

     0   :  { %s1 = smov 0  ;;  %s2 = inlined_call_operand.hbm [shape: bf16[8,4096,128]
dynamic_base_bounds: (8, 512, 1)] } /* Start region 1 */
   0x1 LB: > { %s3 = sphi %s1, %s6 } /* Start region 9 */
   0x2   : > { %p1 = scmp.ne.s32.totalorder %s3, 2 }
   0x3   : > { %10 = sbr.rel (%p1) target bundleno = 7 (0x7), region = 4 } /* Start region 2 */
   0x4   :  {} /* End region 2 */
   0x5   : > { %11 = vmatmul.bf16.gmra.mxu0 %v1 } /* Start region 3 */
   0x6   :  {} /* End region 3 */
   0x7 PF: > { %p2 = scmp.ne.s32.totalorder %s3, 1 } /* Start/End empty region 4 :: Start region 5 */
   0x8   : > { %12 = sbr.rel (%p2) target bundleno = 14 (0xe), region = 8 }
   0x9   :  {} /* End region 5 */
   0xa LB: >> { %s4 = sphi %s1, %s5  ;;  %13 = vmatmul.bf16.gmra.mxu0 %v1 } /* Start region 6
    second_minor_factor: 1 :: Start region 7 */
   0xb   : >> { %s5 = sadd.s32 2, %s4  ;;  %vm1 = vcmp.ge.s32 %v1, %v2  ;;  %vm2 = vcmp.lt.s32 %v1, %v3 }
   0xc   : >> { %p3 = scmp.ge.s32.totalorder %s5, 8 /* loop exit test */
 ;;  %14 = sbr.rel (!%p3) target bundleno = 10 (0xa), region = 7 }
   0xd   :  {} /* End region 6 :: End region 7 */
   0xe PF: > { %s6 = sadd.s32 1, %s3  ;;  %p4 = scmp.ge.s32.totalorder %s6, 514 /* loop exit test */ }
   0xf   : > { %15 = sbr.rel (!%p4) target bundleno = 1 (0x1), region = 9 } /* Start/End empty region 8 */
  0x10   :  {} /* End region 9 */
  0x11   :  { %16 = vsyncpa [#allocation6], 1 } /* End region 1 */
"""

FOLDED_AWAY = ("   0x6 ", "   0x9 ", "   0xd ")

UTILIZATION = """\
== CAPACTIY:
MXU, XLU, VALU, EUP, VLOAD, VSTORE, VSTORE:SPILL
    4    3    2    1    3    1    1
== UTILIZATION:
""" + "\n".join(
    "4 0 1 0 0 1 1" if at in (5, 6) else "2 0 2 0 0 0 0" if at in (10, 11) else "0 0 0 0 0 0 0"
    for at in range(18)
)


def final() -> str:
    """The schedule with three waits folded away, and addresses that count on without them."""
    lines = [line for line in SCHEDULE.splitlines() if not line.startswith(FOLDED_AWAY)]
    address = iter(range(18))
    return "\n".join(
        f"  {next(address):#x}  {line[6:]}" if line[:6].strip().startswith(("0x", "0")) else line
        for line in lines
    )


def kernel(schedule: str = SCHEDULE) -> Kernel:
    blocks = blocks_of(schedule)
    return Kernel(blocks, folded(blocks, schedule, final()), utilization_of(UTILIZATION))


def test_branches_and_their_delay_slots_cut_the_blocks():
    blocks = blocks_of(SCHEDULE)
    assert [(block.first, block.last) for block in blocks] == [
        (0, 0),
        (1, 4),
        (5, 6),
        (7, 9),
        (10, 13),
        (14, 16),
        (17, 17),
    ]
    assert [block.successors for block in blocks] == [(1,), (2, 3), (3,), (4, 5), (5, 4), (6, 1), ()]
    assert [block.trips for block in blocks] == [None, None, None, None, 4, 514, None]
    assert [block.compares for block in blocks] == [0, 0, 0, 0, 2, 0, 0]


def test_folded_waits_leave_the_blocks_that_waited():
    blocks = blocks_of(SCHEDULE)
    assert folded(blocks, SCHEDULE, final()) == (1, 4, 1, 2, 3, 3, 1)
    assert folded(blocks, SCHEDULE, SCHEDULE) == (1, 4, 2, 3, 4, 3, 1)


def test_a_step_is_the_cheapest_way_through_its_matmuls():
    full, partial = kernel().steps()
    assert (full.cycles, full.bundles, full.idle_cycles, full.compares) == (12, 10, 10, 0)
    assert (partial.cycles, partial.bundles, partial.idle_cycles, partial.compares) == (26, 21, 10, 8)


def test_matmuls_that_nothing_skips_have_no_idle_step():
    unconditional = kernel(SCHEDULE.replace("sbr.rel (%p1) target bundleno = 7 (0x7), region = 4", "smov 0"))
    assert [(step.cycles, step.idle_cycles) for step in unconditional.steps()] == [(12, None), (28, None)]


def test_units_count_as_often_as_their_loop_runs():
    full, partial = kernel().steps()
    assert [full.units[unit] for unit in ("MXU", "VALU", "VSTORE", "XLU")] == [8, 2, 2, 0]
    assert [partial.units[unit] for unit in ("MXU", "VALU", "VSTORE", "XLU")] == [16, 16, 0, 0]
    assert (full.mxu_bound, partial.mxu_bound) == (2, 4)
    assert [full.use[unit] for unit in ("MXU", "VALU", "VSTORE")] == [8 / (12 * 4), 2 / (12 * 2), 2 / 12]


def test_a_loop_without_a_constant_bound_needs_one():
    unknown = kernel(SCHEDULE.replace("%s5, 8 /*", "%s5, %s7 /*"))
    with pytest.raises(ValueError, match="the loop at 0xa has a bound known only at run time"):
        unknown.steps()
    assert unknown.steps(trips=3)[1].cycles == 10 + 3 * 4


def test_a_branch_that_always_goes_does_not_fall_through():
    always = SCHEDULE.replace("sbr.rel (%p1) target", "sbr.rel target")
    assert blocks_of(always)[1].successors == (3,)


def test_dumps_that_do_not_belong_together_are_refused():
    blocks = blocks_of(SCHEDULE)
    with pytest.raises(ValueError, match="13 bundles with work became 12"):
        folded(blocks, SCHEDULE, final().replace("{ %11 = vmatmul.bf16.gmra.mxu0 %v1 }", "{}"))
    with pytest.raises(ValueError, match="17 rows of utilization for 18 bundles"):
        Kernel(blocks, (1,) * 7, utilization_of(UTILIZATION.rsplit("\n", 1)[0]))
    with pytest.raises(ValueError, match="no bundles in the text"):
        blocks_of("ordinal=0 before=1966 after=2320")
    with pytest.raises(ValueError, match="do not all end the same number of bundles"):
        blocks_of(SCHEDULE.replace("/* End region 5 */", ""))


def test_dumps_are_found_by_kernel(tmp_path):
    texts = {
        "64-packed-bundles-post-ra": SCHEDULE,
        "67-pre-delay_hlo-static-per-bundle-utilization": UTILIZATION,
        "70-schedule-analysis_final_bundles": 'custom_call_target="tpu_custom_call"',
        "71-final_bundles": final(),
    }
    for what, text in texts.items():
        (tmp_path / f"17-dynmask_dq.1-{what}.txt").write_text(text)
    (tmp_path / "17-TLP-70-schedule-analysis_final_bundles.txt").write_text(
        texts["70-schedule-analysis_final_bundles"]
    )
    (tmp_path / "17-fusion.2-70-schedule-analysis_final_bundles.txt").write_text("%fusion.2 = fusion(...)")
    found = read(tmp_path)
    assert [*found] == ["dynmask_dq"]
    assert found["dynmask_dq"].steps() == kernel().steps()


@pytest.fixture
def compiled(monkeypatch):
    """Stands in for the compiler: the kernels that it is given."""

    def stand_in(*names: str):
        monkeypatch.setattr(tpu_schedule, "kernels", lambda *_: {name: kernel() for name in names})

    return stand_in


PATHS = ("full", "partial")
OURS = Program("dynmask_jax", "nowhere:attention", {}, dict.fromkeys(("forward", "backward"), PATHS))
SPLASH = Program("splash", "nowhere:attention", {}, dict.fromkeys(("forward", "dq", "dkv"), PATHS))
FUSED = Program("splash", "nowhere:attention", {}, {"backward": PATHS})


def test_rows_pair_paths_with_branches_and_bound_with_pass(compiled):
    compiled("splash_dkv", "splash_fwd", "splash_dq")
    rows = rows_of(SPLASH, "v5e:2x2", tokens=4_096, head_dim=128)
    assert [(row.kernel, row.path) for row in rows] == [(way, path) for way in SPLASH.paths for path in PATHS]
    assert [row.step.cycles for row in rows] == [12, 26] * 3
    assert [row.bound for row in rows[::2]] == [1024, 1536, 2048]
    compiled("dynmask_backward", "dynmask_forward")
    rows = rows_of(OURS, "v5e:2x2", tokens=4_096, head_dim=128)
    assert [row.bound for row in rows[::2]] == [1024, 2560]
    assert "tpu7x" not in MXU_RATE
    assert rows_of(OURS, "tpu7x:2x2x1", tokens=4_096, head_dim=128)[0].bound is None


def test_the_tables_put_splash_beside_ours(compiled):
    rows = []
    for program, names in ((OURS, "forward backward"), (SPLASH, "fwd dq dkv"), (FUSED, "dkv")):
        compiled(*names.split())
        rows += rows_of(program, "v5e:2x2", tokens=4_096, head_dim=128)
    rows = [asdict(row) for row in rows]
    for row in rows:
        if row["library"] == "splash":
            row["step"]["cycles"] *= 2
    text = section({"compiler": "libtpu 1", "rows": rows})
    assert "| v5e:2x2 | 128 | 12 | 48 | 0.25× | 24 | 0.50× |" in text
    assert "| v5e:2x2 | 128 | forward | 26 | 26 | 26 | 26 | 12 |" in text
    assert "v5e:2x2, 4,096 tokens, head dim 128:" in text
    assert "| forward | full | dynmask_jax | 12 | 0.50× | 10 | 10 | 2 | 1024 |" in text
    assert "| backward | full | dynmask_jax | 12 | 0.25× | 10 | 10 | 2 | 2560 |" in text
    assert "| dq | full | splash | 24 | 1.00× | 10 | 10 | 2 | 1536 |" in text


def test_the_benchmark_measures_every_shape_or_says_why_not(compiled, monkeypatch):
    compiled("dynmask_forward", "dynmask_backward")
    monkeypatch.setattr(tpu_schedule, "PROGRAMS", (OURS,))
    settings = Settings(("v5e:2x2", "v4:2x2x1"), (4_096,), (128, 64))
    monkeypatch.setattr(tpu_schedule, "find_spec", lambda name: None)
    assert measure(settings, 1) == {"repeats": None, "compiler": "libtpu is not installed", "rows": []}
    monkeypatch.setattr(tpu_schedule, "find_spec", lambda name: name)
    monkeypatch.setattr(tpu_schedule, "version", lambda name: "7")
    results = measure(settings, 1)
    assert results["compiler"] == "libtpu 7"
    shapes = [(row["topology"], row["head_dim"]) for row in results["rows"][:: 2 * len(OURS.paths)]]
    assert shapes == [("v5e:2x2", 128), ("v5e:2x2", 64), ("v4:2x2x1", 128), ("v4:2x2x1", 64)]


def test_rows_refuse_other_kernels_than_named(compiled):
    compiled("dynmask_forward")
    with pytest.raises(ValueError, match="one kernel for backward expected"):
        rows_of(OURS, "v5e:2x2", tokens=4_096, head_dim=128)
    compiled("dynmask_forward", "dynmask_backward")
    with pytest.raises(ValueError, match=r"branches for \('full',\) expected, found \[0, 8\] comparisons"):
        rows_of(replace(OURS, paths={"forward": ("full",)}), "v5e:2x2", tokens=4_096, head_dim=128)
