"""Every file that the project reads or writes as text names its encoding: a locale may be of any other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = "dynmask_jax", "train", "benchmarks", "docs"
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def without_encoding(tree: ast.AST) -> list[int]:
    """The lines that open a file as text, or read or write it whole, without an encoding."""
    return [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Call) and _is_text(node)]


def _is_text(call: ast.Call) -> bool:
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    owner = getattr(getattr(function, "value", None), "id", "")
    if name not in ("open", "read_text", "write_text") or owner in ("os", "Image"):
        return False
    if any(keyword.arg == "encoding" for keyword in call.keywords):
        return False
    return name != "open" or not any("b" in mode for mode in _strings(call))


def _strings(call: ast.Call) -> list[str]:
    """The arguments that may be a mode."""
    constants = [each for each in ast.walk(call) if isinstance(each, ast.Constant)]
    return [each.value for each in constants if isinstance(each.value, str) and len(each.value) < 4]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_encodings_are_named(path):
    assert without_encoding(ast.parse(path.read_text(encoding="utf-8"))) == []


def test_the_search_finds_what_it_looks_for():
    lines = ['open("a")', 'path.open("w")', 'open("a", "rb")', "path.read_text()", 'x.open(encoding="utf-8")']
    code = "\n".join([*lines, "os.open(p, 0)"])
    assert without_encoding(ast.parse(code)) == [1, 2, 4]
