"""A run's metrics: how records are made of what train steps and validations return, and read back.

`metrics.jsonl` holds records of three kinds, one JSON object a line. What was not finite is null.
Of train steps, every `watch.log_every`-th, the last, and each that was skipped:

    step                number of the step, from 0
    loss                mean over the step's targets, nats a token
    bits_per_byte       the same in bits, over the bytes that a token has on average in what is predicted:
                        the run's texts, or its summaries
    exposure            visible pairs ÷ those of the full mask, 0…1
    window              tokens of the window or chunk
    padding             share of the batch's tokens that are padding
    gradient_norm       before clipping
    learning_rate
    hops, bytes_moved   where a row lies on several devices: how often keys and values went on to the next
                        one, in the layers where they went farthest; and what a device sent of them,
                        forward, in all layers
    skipped             steps so far whose loss or gradient was not finite, and that changed nothing
    seconds             a step, and
    input_seconds       of them waiting for the batch; both are means over the steps since the last record
    tokens_per_second   padding left out; null, as mfu, in the first record of a process, whose step compiles
    mfu                 model FLOP utilisation, 0…1, see `train.metrics.mfu`

of validations:

    step                how many train steps were done before it
    validation_loss, validation_bits_per_byte
    positions           nats a token by where in its document the token stands: {"0": …, "64": …}
    pace_loss           under the mask of the stage, where the loss moves the curriculum
    needle              where there is a probe: depths, and along them found, the share of the needles
                        found, and gain, the bits a token that the right number saves: `train.evaluate.needle`

and of the summaries that are written after training:

    step                as in validations
    rouge               {"model": {"rouge1": …}, "lead, 120 words": {…}}, percent
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import jax

from train.config.run import Run
from train.metrics.mfu import Peak, Work
from train.metrics.writers import Record, Sink, open_sinks, steps_done
from train.step.state import Metrics

if TYPE_CHECKING:
    from train.evaluate.validation import Validation


class Log:
    """Makes records and hands them to the sinks; use it as a context.

    A step's metrics are read when the next step is already under way, so that the device never waits
    for the log.

    Args:
      sinks: where the records go; closed at the end.
      run: the config.
      bytes_per_token: on average, in what is predicted.
      work: what a step computes.
      peak: what the devices can do.
    """

    def __init__(self, sinks: Sequence[Sink], run: Run, *, bytes_per_token: float, work: Work, peak: Peak):
        self._sinks, self._run = sinks, run
        self._bytes_per_token, self._work, self._peak = bytes_per_token, work, peak
        self._pending: tuple[int, Metrics, float] | None = None
        self._times = _Times()
        self._compiles = True
        self._skipped_in_a_row = 0

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error):
        with ExitStack() as stack:  # each is closed, whatever another one raises
            for sink in self._sinks:
                stack.callback(sink.close)

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

    def validation(self, steps_done: int, validation: "Validation"):
        """Writes a validation, done after so many train steps."""
        record = {
            "step": steps_done,
            "validation_loss": _finite(validation.loss),
            "validation_bits_per_byte": self._bits(validation.loss),
            "positions": {start: _finite(loss) for start, loss in validation.positions.items()},
        }
        if validation.pace_loss is not None:
            record["pace_loss"] = _finite(validation.pace_loss)
        if validation.needle is not None:
            needle = validation.needle
            record["needle"] = {
                "depths": needle["depths"],
                "found": list(map(_finite, needle["found"])),
                "gain": list(map(_finite, needle["gain"])),
            }
        self._write(record)

    def rouge(self, steps_done: int, rouge: Mapping[str, Mapping[str, float]]):
        """Writes the scores of summaries: by who wrote them, the model or the baseline, and measure."""
        self._write({"step": steps_done, "rouge": {name: dict(scores) for name, scores in rouge.items()}})

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

    def _record(self, step: int, metrics: Metrics) -> Record:
        data, times = self._run.data, self._times
        loss = float(metrics.loss)
        travel = {"hops": int(metrics.hops), "bytes_moved": float(metrics.bytes_moved)}
        return {
            "step": step,
            "loss": _finite(loss),
            "bits_per_byte": self._bits(loss),
            "exposure": float(metrics.exposure),
            "window": int(metrics.window),
            "padding": 1 - float(metrics.tokens) / (data.batch * data.length),
            "gradient_norm": _finite(float(metrics.gradient_norm)),
            "learning_rate": float(metrics.learning_rate),
            **(travel if self._run.mesh.context > 1 else {}),
            "skipped": int(metrics.skipped),
            "seconds": times.seconds / times.steps,
            "input_seconds": times.waited / times.steps,
            "tokens_per_second": None if self._compiles else times.tokens / times.seconds,
            "mfu": None if self._compiles else times.flops / times.seconds / self._peak.flops,
        }

    def _bits(self, nats: float) -> float | None:
        return _finite(nats / math.log(2) / self._bytes_per_token)

    def _write(self, record: Record):
        for sink in self._sinks:
            sink.write(record)


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


def open_log(folder: Path, run: Run, start: int, *, bytes_per_token: float, work: Work, peak: Peak) -> Log:
    """The log of a run that goes on after `start` steps, in the run's folder.

    Only the first process writes. `rewind` has taken out what will be written again.

    Raises:
      ValueError: an option asks for a library that is not installed.
      OSError: the folder cannot be written to.
    """
    sinks = open_sinks(folder, run, start) if jax.process_index() == 0 else []
    return Log(sinks, run, bytes_per_token=bytes_per_token, work=work, peak=peak)


def _finite(number: float) -> float | None:
    """The number, or None, which JSON has a word for, where it is infinite or none."""
    return number if math.isfinite(number) else None


def read(path: Path, most: int | None = None) -> list[Record]:
    """The records of a metrics file, in order; a last line that was cut off is left out.

    Args:
      path: of the file; none is an empty one.
      most: where there are more records of steps, so many of them are read, evenly spaced from the
        first to the last; of the other kinds all are.

    Raises:
      ValueError: another line is no record; the message has its number.
    """
    count = sum(_of_a_step(line) for _, line in _lines(path)) if most else 0
    every, seen, records = -(-(count - 1) // (most - 1)) if most and count > most else 1, 0, []
    for number, line in _lines(path):
        if _of_a_step(line):
            seen += 1
            if (seen - 1) % every and seen != count:
                continue
        records.append(_parsed(path, number, line))
    return records


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The whole lines of a file, numbered from 1: one at a time, for there may be millions."""
    if not path.exists():
        return
    with path.open() as file:
        yield from ((number, line) for number, line in enumerate(file, start=1) if line.endswith("\n"))


def _of_a_step(line: str) -> bool:
    return '"loss": ' in line


def _parsed(path: Path, number: int, line: str) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}, is corrupted: {error}") from error
    if not isinstance(record, dict) or "step" not in record:
        raise ValueError(f"{path}, line {number}, is corrupted: it has no step")
    return record


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
        with fresh.open("w") as file:
            for number, line in _lines(path):
                if done and steps_done(_parsed(path, number, line)) <= done:
                    file.write(line)
        fresh.replace(path)
    except (OSError, ValueError):
        fresh.unlink(missing_ok=True)
        raise
