"""A run's metrics: `metrics.jsonl`, and the progress bar.

Records of two kinds, one JSON object a line. Each train step:

    step                number of the step, from 0
    loss                mean over the batch, nats a token
    bits_per_byte       the same in bits
    exposure            visible pairs ÷ those of the full causal mask, 0…1
    window              tokens of the window or chunk
    tokens_per_second
    seconds             that the step took; the first of a run, or after --resume, compiles too

and each validation:

    step                how many train steps were done before it
    validation_loss, validation_bits_per_byte
"""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from train.step import Metrics

Record = dict[str, Any]


class Log:
    """Writes metrics as they come; use it as a context.

    A step's metrics are read when the next step is already under way, so that the device never waits
    for the log.

    Args:
      path: the file, appended to.
      tokens: in a step.
      bar: shows the progress.
    """

    def __init__(self, path: Path, tokens: int, bar: tqdm):
        self._file = path.open("a")
        self._tokens, self._bar = tokens, bar
        self._pending: tuple[int, Metrics] | None = None
        self._since = time.perf_counter()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error):
        self._file.close()

    def step(self, step: int, metrics: Metrics):
        """Takes what a train step returned, and writes the step before it."""
        self._write_pending()
        self._pending = step, metrics

    def validation(self, steps_done: int, loss: float):
        """Writes a validation's mean loss, in nats a token."""
        bits = bits_per_byte(loss)
        self._write({"step": steps_done, "validation_loss": loss, "validation_bits_per_byte": bits})
        self._bar.write(f"step {steps_done:,}: validation {bits:.3f} bits per byte, at the full mask")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The last step is written first, and what happens within counts for no step's time."""
        self._write_pending()
        yield
        self._since = time.perf_counter()

    def _write_pending(self):
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        loss = float(metrics.loss)  # waits for the step
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        record = {
            "step": step,
            "loss": loss,
            "bits_per_byte": bits_per_byte(loss),
            "exposure": float(metrics.exposure),
            "window": int(metrics.window),
            "tokens_per_second": self._tokens / seconds,
            "seconds": seconds,
        }
        self._write(record)
        self._bar.update()
        self._bar.set_postfix_str(
            f"{record['bits_per_byte']:.3f} bits per byte, exposure {record['exposure']:.1%}", refresh=False
        )

    def _write(self, record: Record):
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()


def bits_per_byte(nats: float) -> float:
    """A loss in nats a byte, in bits."""
    return nats / math.log(2)


def read(path: Path) -> list[Record]:
    """The records of a metrics file, in order; a last line that was cut off is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def rewind(path: Path, steps_done: int):
    """Takes out what was written after `steps_done` train steps: a resumed run writes it again."""
    kept = [r for r in read(path) if r["step"] < steps_done + ("validation_loss" in r)]
    fresh = path.with_suffix(".rewound")
    fresh.write_text("".join(json.dumps(record) + "\n" for record in kept))
    fresh.replace(path)
