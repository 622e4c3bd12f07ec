"""Texts on disk for the tests of the trainer's input."""

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

REAL = Path(__file__).parents[2] / "shared" / "data"


def write_lines(path: Path, records: Iterable[Any]) -> Path:
    """A JSONL file of the records, gzipped where its name says so; bytes are a line as they are."""
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    content = b"".join(line + b"\n" for line in lines)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def real_text(name: str) -> str:
    """The path of a real text beside the repository; the test is skipped where it is absent."""
    if not (REAL / name).exists():
        pytest.skip(f"needs ../shared/data/{name}, real text that is not part of the project")
    return str(REAL / name)
