"""A run small enough for a test, the text it reads, and records like those it leaves."""

import math
import random
from pathlib import Path

from train.config.operation import Evaluation
from train.config.run import Run
from train.config.sections import Curriculum, Data, Model, Optimizer
from train.metrics.record import Record, StepRecord, ValidationRecord
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


def step_record(step: int, loss: float | None = 1.0, **values) -> StepRecord:
    """A record of a train step, with other values where they are given."""
    defaults = {
        "bits_per_byte": loss,
        "exposure": 0.5,
        "window": 8,
        "padding": 0.25,
        "gradient_norm": 1.0,
        "learning_rate": 1e-3,
        "hops": None,
        "bytes_moved": None,
        "skipped": 0,
        "seconds": 0.5,
        "input_seconds": 0.01,
        "tokens_per_second": 1000.0,
        "mfu": 0.125,
    }
    return StepRecord(step=step, loss=loss, **(defaults | values))


def validation_record(step: int, loss: float | None = 5.0, **values) -> ValidationRecord:
    """A record of a validation, with other values where they are given."""
    return ValidationRecord(**({"step": step, "loss": loss, "bits_per_byte": loss, "positions": {}} | values))


def steps_of(records: list[Record]) -> list[StepRecord]:
    """The records of train steps."""
    return [record for record in records if isinstance(record, StepRecord)]


def validations_of(records: list[Record]) -> list[ValidationRecord]:
    """The records of validations."""
    return [record for record in records if isinstance(record, ValidationRecord)]


def records_of(
    run: Run,
    *,
    every: int = 0,
    needles: bool = False,
    bytes_per_token: float = 1.0,
    positions: dict[str, float | None] | None = None,
    log_every: int = 1,
) -> list[Record]:
    """Records like those of a run that learnt: windows of its curriculum, a loss that falls, one compilation.

    `positions` are shares of a validation's loss; by default a little falls with each bucket.
    """
    grown = growth(run)
    shares = {"0": 1.25, "64": 1.0, "128": 0.75} if positions is None else positions

    def validation(step: int) -> ValidationRecord:
        return _falling_validation(run, step, shares, needles, bytes_per_token)

    def trained(step: int) -> StepRecord:
        window = int(grown.window(min(step, grown.steps)))
        bits, timed = 2 + 6 * math.exp(-5 * step / run.steps), step > 0
        return step_record(
            step,
            bits * math.log(2) * bytes_per_token,
            bits_per_byte=bits,
            exposure=window / run.data.length,
            window=window,
            seconds=0.5 + window / run.data.length if timed else 9.0,
            tokens_per_second=1000.0 if timed else None,
            mfu=0.125 if timed else None,
        )

    records = [validation(0)]
    for step in range(run.steps):
        if step % log_every == 0 or step == run.steps - 1:
            records.append(trained(step))
        if step + 1 == run.steps or (every and (step + 1) % every == 0):
            records.append(validation(step + 1))
    return records


def _falling_validation(
    run: Run, step: int, shares, needles: bool, bytes_per_token: float
) -> ValidationRecord:
    bits = 2 + 6 * math.exp(-4 * step / run.steps)
    nats = bits * math.log(2) * bytes_per_token
    gain = {"gain/0.0": 0.5, "gain/1.0": step / run.steps}
    return ValidationRecord(
        step=step,
        loss=nats,
        bits_per_byte=bits,
        positions={start: share and share * nats for start, share in shares.items()},
        evaluators={"needle": {"found/0.0": 0.25, "found/1.0": 0.75, **gain}} if needles else {},
    )
