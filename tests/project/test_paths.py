"""Every file and module that the project's own texts name exists."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE = re.compile(
    r"(?<![\w/.-])((?:train|dynmask_jax|tests|benchmarks|docs|notebooks)/[\w/.-]*\w\.(?:py|md|ipynb|png))\b"
)
MODULE = re.compile(
    r"^\s*(?:from ((?:train|dynmask_jax|benchmarks)(?:\.\w+)*) import"
    r"|import ((?:train|dynmask_jax)\.[\w.]+))",
    re.MULTILINE,
)


def texts() -> dict[str, str]:
    listed = subprocess.check_output(
        ["git", "ls-files", "*.py", "*.md", "*.ipynb", "Makefile"], cwd=ROOT, text=True
    )
    return {name: (ROOT / name).read_text() for name in listed.split() if (ROOT / name).exists()}


TEXTS = texts() if (ROOT / ".git").exists() else {}


@pytest.mark.skipif(not TEXTS, reason="not a checkout")
def test_every_file_that_is_named_exists():
    assert len({path for text in TEXTS.values() for path in FILE.findall(text)}) > 10
    missing = {
        f"{name}: {path}"
        for name, text in TEXTS.items()
        for path in FILE.findall(text)
        if name != "tests/project/test_paths.py" and not (ROOT / path).exists()
    }
    assert not missing


@pytest.mark.skipif(not TEXTS, reason="not a checkout")
def test_every_module_that_is_imported_exists():
    modules = {first or second for text in TEXTS.values() for first, second in MODULE.findall(text)}
    assert "train.config.run" in modules
    assert not [name for name in sorted(modules) if importlib.util.find_spec(name) is None]
