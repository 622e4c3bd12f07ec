"""A run small enough for a test, its text, and records like those that it logs."""

import math
import random
from pathlib import Path

from train.config.operation import Evaluation
from train.config.run import Run
from train.config.sections import Curriculum, Data, Model, Optimizer
from train.step.curriculum import growth

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


def records_of(
    run: Run,
    *,
    every: int = 0,
    needles: bool = False,
    bytes_per_token: float = 1.0,
    positions: dict[str, float | None] | None = None,
    log_every: int = 1,
) -> list[dict]:
    """Records like those of a run: windows of its curriculum, a falling loss, one compilation.

    `positions` are shares of a validation's loss; by default a little falls with each bucket.
    """
    grown = growth(run)
    shares = {"0": 1.25, "64": 1.0, "128": 0.75} if positions is None else positions

    def validation(step: int) -> dict:
        return _validation_record(run, step, shares, bytes_per_token, needles)

    records = [validation(0)]
    for step in range(run.steps):
        if step % log_every == 0 or step == run.steps - 1:
            window = int(grown.window(min(step, grown.steps)))
            records.append(_step_record(run, step, window, bytes_per_token))
        if step + 1 == run.steps or (every and (step + 1) % every == 0):
            records.append(validation(step + 1))
    return records


def _validation_record(
    run: Run, step: int, shares: dict[str, float | None], bytes_per_token: float, needles: bool
) -> dict:
    bits = 2 + 6 * math.exp(-4 * step / run.steps)
    nats = bits * math.log(2) * bytes_per_token
    record = {"step": step, "validation_loss": nats, "validation_bits_per_byte": bits}
    record["positions"] = {start: share and share * nats for start, share in shares.items()}
    if needles:
        record["needle"] = {"depths": [0.0, 1.0], "found": [0.25, 0.75], "gain": [0.5, step / run.steps]}
    return record


def _step_record(run: Run, step: int, window: int, bytes_per_token: float) -> dict:
    bits, timed = 2 + 6 * math.exp(-5 * step / run.steps), step > 0
    return {
        "step": step,
        "loss": bits * math.log(2) * bytes_per_token,
        "bits_per_byte": bits,
        "exposure": window / run.data.length,
        "window": window,
        "padding": 0.25,
        "gradient_norm": 1.0,
        "learning_rate": 1e-3,
        "skipped": 0,
        "seconds": 0.5 + window / run.data.length if timed else 9.0,
        "input_seconds": 0.01,
        "tokens_per_second": 1000.0 if timed else None,
        "mfu": 0.125 if timed else None,
    }
