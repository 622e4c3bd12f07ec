"""The README's examples run as printed, and its tables name what there is."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dynmask_jax
from dynmask_jax import Mask

README = (Path(__file__).parents[2] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PRINTED = [
    [
        "step    0: loss",
        "6% of pairs visible",
        "step 1000: loss",
        "50% of pairs visible",
        "+.......",
        "#######+",
    ],
    ["(2, 128, 32)"],
    ["(2, 128, 32)"],
    ["512 queries x 512 keys in blocks of 8 x 8", "blocks skipped", "(Causal() & Predicate(near, 108))"],
    ["((8, 32), ())"],
    ["step 0: 1 hops, each device sends 0.12 MiB", "step 12: 2 hops", "step 50: 5 hops", "step 100: 7 hops"],
]


@pytest.mark.parametrize(("example", "expected"), list(zip(EXAMPLES, PRINTED, strict=True)))
def test_an_example_runs_as_printed(example, expected, tmp_path, compiles_as_here):
    """In a process of its own, as a user's would be: warnings are errors there too."""
    command, environment = [sys.executable, "-W", "error", "-c", example], os.environ | compiles_as_here
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    for words in expected:
        assert words in ran.stdout


def test_every_shipped_mask_and_schedule_is_named():
    shipped = {n for n, v in vars(dynmask_jax).items() if isinstance(v, type) and issubclass(v, Mask)} - {
        "Mask"
    }
    assert len(shipped) == 11
    for name in shipped:
        assert f"| `{name}(" in README
    for name in ("constant", "linear", "exponential", "sine", "root", "cubic", "staircase"):
        assert f"`{name}`" in README


def test_every_linked_file_exists():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    for link in links:
        assert (Path(__file__).parents[2] / link).exists(), link
