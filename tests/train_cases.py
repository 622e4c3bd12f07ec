"""A run small enough for a test, and the text it reads."""

import random
from pathlib import Path

from train.config import Run
from train.sections import Curriculum, Data, Evaluation, Model, Optimizer

MODEL = Model(layers=1, width=16, heads=2, kv_heads=1, hidden=16)


def write_text(folder: Path) -> Path:
    """A file of 4,000 bytes: words of a small vocabulary, so that there is something to learn."""
    words = random.Random(0).choices(["mask", "key", "query", "step"], k=1_000)
    path = folder / "words.txt"
    path.write_text(" ".join(words)[:4_000])
    return path


def small_run(folder: Path, **options) -> Run:
    """A run of 8 steps on rows of 32 tokens, in `folder / "runs" / "small"`."""
    defaults = {
        "name": "small",
        "folder": str(folder / "runs"),
        "steps": 8,
        "block": 8,
        "evaluation": Evaluation(rows=2),
        "model": MODEL,
        "data": Data(paths=(str(write_text(folder)),), length=32, batch=2, rows="chunked"),
        "optimizer": Optimizer(learning_rate=1e-2),
        "curriculum": Curriculum(start=4),
    }
    return Run(**(defaults | options))
