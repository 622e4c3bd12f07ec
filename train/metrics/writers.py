"""Where the records of a run go: `metrics.jsonl`, TensorBoard, the progress bar, Weights & Biases."""

import dataclasses
import importlib.util
import json
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, TextIO

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tqdm import tqdm

from train.config.run import Run
from train.disk import writing
from train.metrics.record import Record, StepRecord, SummariesRecord, ValidationRecord

SECONDS_BETWEEN_LINES = 30


class Writer(ABC):
    """Takes records as they come, in the order of steps."""

    @abstractmethod
    def write(self, record: Record):
        """Takes one record; what it has written before is then safe from the process's end."""

    @abstractmethod
    def close(self):
        """Nothing comes any more."""


def open_writers(folder: Path, run: Run, start: int) -> list[Writer]:
    """Where a run's records go, ready for those of step `start` and on.

    Args:
      folder: of the run. What it holds of steps from `start` on is taken back, or covered.
      run: its config.
      start: the train steps that were done before.

    Raises:
      ValueError: `check` refuses the config.
      WriteError: the folder cannot be written to.
    """
    check(run)
    writers = [JsonLines(folder / "metrics.jsonl"), TensorBoard(folder / "tensorboard", start)]
    if run.watch.wandb is not None:
        writers.append(WeightsAndBiases(folder, run))
    return [*writers, Bar(run.steps, start)]


def check(run: Run):
    """Refuses, before anything is trained, what could not be written to.

    Raises:
      ValueError: Weights & Biases is asked for and not installed.
    """
    if run.watch.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"watch.wandb names the project {run.watch.wandb!r}, but Weights & Biases is not installed: "
            "pip install wandb, or leave the option out"
        )


class JsonLines(Writer):
    """A file of one JSON object a line, appended to."""

    def __init__(self, path: Path):
        self._path = path
        with writing(path):
            self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record):
        with writing(self._path):
            self._file.write(to_line(record))
            self._file.flush()

    def close(self):
        with writing(self._path):
            self._file.close()


def to_line(record: Record) -> str:
    """A record as a line of a metrics file."""
    return json.dumps(record.to_json(), allow_nan=False) + "\n"


class TensorBoard(Writer):
    """Event files for TensorBoard, over the number of steps done.

    Events are written where they come up, by tensorboardX's writer of files: its `SummaryWriter`
    hands them to a thread, which a full disk ends without a word, and the run waits for it forever.

    Args:
      folder: of the event files, made where it is missing.
      start: steps done; what earlier files hold beyond is hidden, as SummaryWriter's `purge_step` does.
    """

    def __init__(self, folder: Path, start: int):
        self._folder = folder
        # The validation before the first of the steps that come again is not done again, but at 0.
        again = start + 1 if start else 0
        with writing(folder):
            folder.mkdir(exist_ok=True)
            self._events = EventsWriter(str(folder / "events"), f".{start}")
            self._events.write_event(Event(step=again, session_log=SessionLog(status=SessionLog.START)))

    def write(self, record: Record):
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in record.scalars().items()]
        event = Event(step=record.steps_done, wall_time=time.time(), summary=Summary(value=values))
        with writing(self._folder):
            self._events.write_event(event)
            self._events.flush()

    def close(self):
        with writing(self._folder):
            self._events.close()


class WeightsAndBiases(Writer):
    """A run of Weights & Biases, gone on with where the folder holds its id.

    Charts are over `step`, the steps done: W&B's own counter only rises, and steps that a resumed run
    repeats would be dropped.
    """

    def __init__(self, folder: Path, run: Run):
        import wandb  # pyright: ignore[reportMissingImports]

        known = folder / "wandb.id"
        self._run = wandb.init(
            project=run.watch.wandb,
            name=run.name,
            id=(known.read_text(encoding="utf-8").strip() or None) if known.exists() else None,
            resume="allow",
            dir=str(folder),
            config=dataclasses.asdict(run),
        )
        known.write_text(self._run.id, encoding="utf-8")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Record):
        self._run.log({"step": record.steps_done, **record.scalars()})

    def close(self):
        self._run.finish()


class Bar(Writer):
    """Progress on the terminal; in a log file a line now and then.

    Args:
      steps: of the whole run.
      start: of them done before.
      file: by default stderr.
    """

    def __init__(self, steps: int, start: int, file: TextIO | None = None):
        out: TextIO = sys.stderr if file is None else file
        terminal = out.isatty()
        seconds = 0.1 if terminal else SECONDS_BETWEEN_LINES
        self._file: Any = out if terminal else _Lines(out)
        self._bar = tqdm(
            initial=start,
            total=steps,
            unit="step",
            disable=start >= steps,  # what is written after the last step is no progress
            file=self._file,
            mininterval=seconds,
            maxinterval=seconds,
            dynamic_ncols=terminal,
            bar_format=None
            if terminal
            else "{n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
        )

    def write(self, record: Record):
        if isinstance(record, StepRecord):
            self._bar.set_postfix_str(_progress(record), refresh=False)
            self._bar.update(record.steps_done - self._bar.n)
        else:
            self._bar.write(_milestone(record), file=self._file)

    def close(self):
        self._bar.close()


class _Lines:
    """A text file that a bar writes lines to, where it would go back to the beginning of one."""

    def __init__(self, file: TextIO):
        self._file = file

    def write(self, text: str):
        if line := text.strip():
            self._file.write(line + "\n")

    def flush(self):
        self._file.flush()

    def isatty(self) -> bool:
        return False


def _progress(record: StepRecord) -> str:
    bits = "loss not finite" if record.bits_per_byte is None else f"{record.bits_per_byte:.3f} bits per byte"
    parts = [bits, f"exposure {record.exposure:.1%}"]
    if record.tokens_per_second is not None and record.mfu is not None:
        parts += [f"{record.tokens_per_second:,.0f} tokens/s", f"MFU {record.mfu:.1%}"]
    return ", ".join(parts)


def _milestone(record: ValidationRecord | SummariesRecord) -> str:
    if isinstance(record, ValidationRecord):
        bits = record.bits_per_byte
        value = "not finite" if bits is None else f"{bits:.3f} bits per byte"
        return f"step {record.step:,}: validation {value}, at the full mask"
    return f"step {record.step:,}: " + "; ".join(
        f"{name}: " + ", ".join(f"{kind} {value:.1f}" for kind, value in scores.items())
        for name, scores in record.rouge.items()
    )
