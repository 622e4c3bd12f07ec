"""A run's metrics: makes records of what train steps and validations return, and reads them back."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from time import perf_counter
from typing import Any

import jax

from train.config.run import Run
from train.metrics.mfu import Peak, Work
from train.metrics.record import Record, StepRecord, SummariesRecord, ValidationRecord, from_json, is_step
from train.metrics.writers import Writer, open_writers
from train.step.state import Metrics, bits_per_byte


class Log:
    """Makes records and hands them to the writers; use it as a context.

    A step's metrics are read when the next step is already under way, so that the device never waits
    for the log.

    Args:
      writers: where the records go; closed at the end.
      run: the config.
      work: what a step computes.
      peak: what the devices can do.
    """

    def __init__(self, writers: Sequence[Writer], run: Run, *, work: Work, peak: Peak):
        self._writers, self._run = writers, run
        self._work, self._peak = work, peak
        self._pending: tuple[int, Metrics, float] | None = None
        self._times = _Times()
        self._compiles = True
        self._skipped_in_a_row = 0

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error):
        with ExitStack() as stack:  # each is closed, whatever another one raises
            for writer in self._writers:
                stack.callback(writer.close)

    @property
    def peak(self) -> Peak:
        """What the devices can do, that MFU is a share of."""
        return self._peak

    @property
    def skipped_in_a_row(self) -> int:
        """How many steps were skipped in a row, up to the last step that was read: the one before last."""
        return self._skipped_in_a_row

    def step(self, step: int, metrics: Metrics, waited: float):
        """Takes what a train step returned, and reads the step before it.

        Args:
          step: its number, from 0.
          metrics: as the step returned them, still being computed.
          waited: seconds that its batch took to come.
        """
        self._read_pending()
        self._pending = step, metrics, waited

    def validation(
        self,
        steps_done: int,
        loss: float,
        bits_per_byte: float,
        positions: Mapping[str, float],
        pace_loss: float | None = None,
        evaluators: Mapping[str, Mapping[str, float]] | None = None,
    ):
        """Writes a validation, done after so many train steps; arguments are those of `ValidationRecord`."""
        self._write(
            ValidationRecord(
                step=steps_done,
                loss=_finite(loss),
                bits_per_byte=_finite(bits_per_byte),
                positions=_all_finite(positions),
                pace_loss=None if pace_loss is None else _finite(pace_loss),
                evaluators={name: _all_finite(found) for name, found in (evaluators or {}).items()},
            )
        )

    def rouge(self, steps_done: int, rouge: Mapping[str, Mapping[str, float]]):
        """Writes the scores of summaries: by who wrote them, the model or the baseline, and measure."""
        self._write(SummariesRecord(steps_done, rouge))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The last step is read first, and what happens within counts for no step's time."""
        self._read_pending()
        yield
        self._times.go_on()

    def _read_pending(self):
        if self._pending is None:
            return
        step, metrics, waited = self._pending
        self._pending = None
        metrics = jax.device_get(metrics)  # waits for the step
        tokens = float(metrics.tokens)
        pairs = {reach: float(count) for reach, count in metrics.pairs.items()}
        self._times.add(waited, tokens, self._work.of(tokens, pairs))
        self._skipped_in_a_row = int(metrics.skipped_in_a_row)
        watch = self._run.watch
        if step % watch.log_every == 0 or step == self._run.steps - 1 or self._skipped_in_a_row:
            self._write(self._record(step, metrics))
            self._times.clear()
        elif self._compiles:
            self._times.clear()
        self._compiles = False

    def _record(self, step: int, metrics: Metrics) -> StepRecord:
        data, times = self._run.data, self._times
        measured = {
            each.name: _finite(getattr(metrics, each.name).item())
            for each in fields(StepRecord)
            if hasattr(metrics, each.name)
        }
        if self._run.mesh.context == 1:
            measured |= {"hops": None, "bytes_moved": None}
        timed: dict[str, Any] = {
            "seconds": times.seconds / times.steps,
            "input_seconds": times.waited / times.steps,
            "tokens_per_second": None if self._compiles else times.tokens / times.seconds,
            "mfu": None if self._compiles else times.flops / times.seconds / self._peak.flops,
        }
        padding = 1 - float(metrics.tokens) / (data.batch * data.length)
        bits = bits_per_byte(float(metrics.loss) * float(metrics.weight), float(metrics.text_bytes))
        return StepRecord(step=step, bits_per_byte=_finite(bits), padding=padding, **measured, **timed)

    def _write(self, record: Record):
        for writer in self._writers:
            writer.write(record)


class _Times:
    """What the steps since the last record took and did."""

    def __init__(self):
        self.clear()
        self.go_on()

    def clear(self):
        self.steps, self.seconds, self.waited, self.tokens, self.flops = 0, 0.0, 0.0, 0.0, 0.0

    def go_on(self):
        """The next step's time begins."""
        self._since = perf_counter()

    def add(self, waited: float, tokens: float, flops: float):
        """A step is over."""
        self.steps += 1
        self.seconds += perf_counter() - self._since
        self.go_on()
        self.waited += waited
        self.tokens += tokens
        self.flops += flops


def open_log(folder: Path, run: Run, start: int, *, work: Work, peak: Peak) -> Log:
    """The log of a run that goes on after `start` steps, in the run's folder.

    Only the first process writes. `rewind` has taken out what will be written again.

    Raises:
      ValueError: an option asks for a library that is not installed.
      OSError: the folder cannot be written to.
    """
    writers = open_writers(folder, run, start) if jax.process_index() == 0 else []
    return Log(writers, run, work=work, peak=peak)


def _finite(number: float) -> Any:
    """The number, or None, which JSON has a word for, where it is infinite or none."""
    return number if math.isfinite(number) else None


def _all_finite(numbers: Mapping[str, float]) -> dict[str, float | None]:
    return {name: _finite(number) for name, number in numbers.items()}


def read(path: Path, most: int | None = None) -> list[Record]:
    """The records of a metrics file, in order; a last line that was cut off is left out.

    Args:
      path: of the file; none is an empty one.
      most: where there are more records of steps, so many of them are read, evenly spaced from the
        first to the last; of the other kinds all are.

    Raises:
      ValueError: another line is no record; the message has its number.
    """
    count = sum(is_step(line) for _, line in _lines(path)) if most else 0
    every, seen, records = -(-(count - 1) // (most - 1)) if most and count > most else 1, 0, []
    for number, line in _lines(path):
        if is_step(line):
            seen += 1
            if (seen - 1) % every and seen != count:
                continue
        records.append(_parsed(path, number, line))
    return records


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The whole lines of a file, numbered from 1: one at a time, for there may be millions."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        yield from ((number, line) for number, line in enumerate(file, start=1) if line.endswith("\n"))


def _parsed(path: Path, number: int, line: str) -> Record:
    try:
        saved = json.loads(line)
        if not isinstance(saved, dict):
            raise ValueError(f"it holds {type(saved).__name__}, not an object")
        return from_json(saved)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}, is corrupted: {error}") from error


def rewind(path: Path, done: int):
    """Takes out what was written after `done` train steps: a resumed run writes it again.

    At 0 that is everything, the validation before training too. The file is replaced at once or, where
    the disk is full, left as it was.

    Raises:
      ValueError: as `read`.
      OSError: the disk is full, or not writable.
    """
    fresh = path.with_suffix(".rewound")
    try:
        with fresh.open("w", encoding="utf-8") as file:
            for number, line in _lines(path):
                if done and _parsed(path, number, line).steps_done <= done:
                    file.write(line)
        fresh.replace(path)
    except (OSError, ValueError):
        fresh.unlink(missing_ok=True)
        raise
