"""The real GPU compiler takes the kernels, for a Hopper, an Ampere and an Ada card; no GPU is needed."""

from pathlib import Path

import pytest
from cases import MASKS
from slow import mostly

from benchmarks.gpu_compile import compiled, tool
from train.aot.cards import CARDS, missing_compiler

pytestmark = pytest.mark.skipif(
    missing_compiler() is not None or tool("nvdisasm") is None,
    reason="the GPU's compiler and nvdisasm are not installed: make gpu-check",
)
FILE = Path(__file__).with_name("gpu_programs.py")
SWEEPS = {"dynmask_forward", "dynmask_dq", "dynmask_dkv"}
MERGES = {f"{name}_merge" for name in SWEEPS}
KERNELS = {"dynmask_lists", *SWEEPS, *MERGES}
SIXTEEN_BITS = "bfloat16", "float16"


@pytest.fixture(autouse=True)
def _names_of_the_tests(monkeypatch):
    """The programs import the masks of `cases.py`, in a process of their own."""
    monkeypatch.setenv("PYTHONPATH", str(FILE.parents[2]))


OLDER = {("dynmask_dkv", 256)}
"""Whose tiles have too few rows for a Hopper's own instruction."""


def check(card: str, program, dtype: str = "bfloat16", head_dim: int = 128, *, most: int = 0):
    """No kernel spills or wants more shared memory than there is, and products are the tensor cores'.

    `most`: bytes that a kernel may spill.
    """
    for name, kernel in program.kernels.items():
        if kernel.loading:
            check_warpgroups(kernel, most)
        else:
            assert kernel.spills <= most, name
            assert most or not kernel.code.count("STL"), name
        assert kernel.shared <= CARDS[card].shared - 1024, name
        if name in {*SWEEPS, "dynmask_dbias"}:
            hopper = card == "h100" and (name, head_dim) not in OLDER
            tensor = kernel.code.count("HGMMA" if hopper else "HMMA")
            assert (tensor > 0) == (dtype in SIXTEEN_BITS), name


def check_warpgroups(kernel, most: int):
    """Their loops spill nothing, outside of them four addresses of barriers may be; registers suffice."""
    assert kernel.spills <= max(most, 16)
    assert most or not any(each.operation in ("LDL", "STL") for body in kernel.code.loops for each in body)
    asked = [
        each.operands.split(",")[-1] for each in kernel.code.instructions if each.operation == "USETMAXREG"
    ]
    computing, loading = sorted((int(number, 16) for number in asked), reverse=True)
    groups = kernel.threads // 128 - 1
    # A program has the registers that it begins with: for more it would wait for ever.
    assert computing * groups + loading <= kernel.registers * (groups + 1)


CASES = [
    (card, dtype, dim) for card in CARDS for dtype in ("bfloat16", "float32") for dim in (32, 64, 128, 256)
]
BY_DEFAULT = [("h100", "bfloat16", 128), ("a100", "float32", 64)]


@pytest.mark.parametrize(("card", "dtype", "head_dim"), mostly(CASES, BY_DEFAULT))
def test_attention_and_its_gradient(card, dtype, head_dim):
    program = compiled(card, f"{FILE}:attention_and_gradient", {"dtype": dtype, "head_dim": head_dim})
    assert program.kernels.keys() == KERNELS
    check(card, program, dtype, head_dim)
    # Nothing waits for the host: no loop, no branch.
    assert not any(each.startswith(("kWhile", "kConditional")) for each in program.launches)


@pytest.mark.slow  # of the trace, in `test_gpu_long_lines`
def test_no_merge_where_programs_abound():
    """One program keeps the card busy: every line stays whole."""
    grains = [[128, 128, 8, 2], [64, 64, 4, 2], [64, 32, 4, 2]]
    program = compiled("h100", f"{FILE}:attention_and_gradient", {"grains": grains, "busy": 1})
    assert program.kernels.keys() == KERNELS - MERGES
    check("h100", program)


@pytest.mark.slow
@pytest.mark.parametrize(("head_dim", "value_dim"), [(80, 80), (96, 96), (192, 128), (128, 192)])
def test_head_dims_that_are_filled_up(head_dim, value_dim):
    options = {"head_dim": head_dim, "value_dim": value_dim}
    check("a100", compiled("a100", f"{FILE}:attention_and_gradient", options))


def test_a_spill_is_seen():
    """A tile that is too large for an Ampere's registers."""
    grains = [[128, 128, 8, 2], [64, 64, 8, 2], [64, 64, 8, 2]]
    options = {"grains": grains, "gradient": False}
    program = compiled("a100", f"{FILE}:attention_and_gradient", options)
    assert program.kernels["dynmask_forward"].spills > 0
    with pytest.raises(AssertionError, match="dynmask"):
        check("a100", program)


@pytest.mark.parametrize("card", mostly(CARDS, ["h100"]))
def test_every_option(card):
    program = compiled(card, f"{FILE}:scores_and_gradient")
    assert program.kernels.keys() == {*KERNELS, "dynmask_dbias"}
    check(card, program, most=64)  # dk and dv, 56 bytes on an H100: see docs/gpu.md


@pytest.mark.parametrize(
    "names", mostly([["strided", "unreadable"], [*MASKS]], [["strided", "unreadable"]]), ids=len
)
def test_every_mask(names):
    program = compiled("a100", f"{FILE}:masks", {"names": names})
    assert program.kernels.keys() >= KERNELS
    check("a100", program, head_dim=64)


@pytest.mark.parametrize(("heads", "key_heads"), mostly([(4, 4), (6, 2), (3, 1)], [(6, 2)]))
def test_few_queries_and_any_group(heads, key_heads):
    """One query: its line is cut into chunks. Blocks are filled up, and x64 is on."""
    program = compiled("h100", f"{FILE}:decoding", {"heads": [heads, key_heads]})
    assert program.kernels.keys() == {"dynmask_lists", "dynmask_forward", "dynmask_forward_merge"}
    for kernel in program.kernels.values():
        assert kernel.spills == 0


@pytest.mark.parametrize("tokens", mostly([131_072, 1_048_576], [131_072]))
def test_lists_are_one_launch_a_pass_and_few_bytes(tokens):
    program = compiled("h100", f"{FILE}:lists", {"tokens": tokens})
    assert program.kernels.keys() == {"dynmask_lists"}
    assert sum("dynmask_lists" in each for each in program.launches) == 2
    assert len(program.launches) < 20, "beside the two, what sorts the lines"
    assert not any(each.startswith(("kWhile", "kConditional")) for each in program.launches)
    blocks = tokens // 128
    # Of each code a byte is read, and four are written where it is active; columns are turned once.
    assert program.output_bytes < 2 * 4 * (blocks + 1024) * blocks + 2**20
    assert program.temporary_bytes < 2 * blocks**2 + 2**20


@pytest.mark.slow  # tests/trainer/aot/test_compile.py compiles one of two, in a whole train step
def test_a_ring_of_eight_cards():
    program = compiled("h100", f"{FILE}:over_cards")
    assert program.kernels.keys() >= KERNELS


@pytest.mark.slow  # likewise
@pytest.mark.parametrize("card", CARDS)
def test_the_whole_train_step(card):
    program = compiled(card, f"{FILE}:train_step")
    assert program.kernels.keys() == KERNELS
    assert program.temporary_bytes + program.argument_bytes < CARDS[card].memory
