"""The records of an experiment: a JSON file for each run that has ended, from which tables are made."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from train.compare.experiment import Experiment, Trial
from train.compare.machine import Machine
from train.compare.timing import Timing, read_timing
from train.config.command_line import command
from train.disk import write_atomically

Number = float | None
"""None: not finite."""


@dataclass(frozen=True)
class Curve:
    """The validations of a run, at the full mask.

    Attributes:
      steps: done before each.
      bits_per_byte, nats_per_token: the losses.
      accuracy: of all answers, in synthetic text for recall; else empty.
    """

    steps: Sequence[int]
    bits_per_byte: Sequence[Number]
    nats_per_token: Sequence[Number]
    accuracy: Sequence[Number] = ()


@dataclass(frozen=True)
class Exposure:
    """What a run's steps showed: at some of them, and the mean of all.

    Attributes:
      steps: their numbers.
      shown: visible pairs ÷ those of the full mask.
      windows: tokens of the window or chunk.
      mean: of `shown`, over all steps.
    """

    steps: Sequence[int]
    shown: Sequence[float]
    windows: Sequence[int]
    mean: float


@dataclass(frozen=True)
class Restricted:
    """A validation after training, under a narrower mask than the full one.

    Attributes:
      bits_per_byte: of all tokens.
      positions: nats a token by how many tokens of its document stand before it, at least.
    """

    bits_per_byte: Number
    positions: Mapping[str, Number]


@dataclass(frozen=True)
class ArmRecord:
    """What one run of an experiment came to.

    Attributes:
      experiment: its name.
      trial: arm, learning rate, steps, seed.
      command: that trains the same run without an experiment.
      machine: that it was trained on.
      core: that the process was pinned to; None: it was not.
      failure: why there is no result, such as a loss that was not finite; None: there is one.
      parameters: how many weights were trained.
      seconds_as_trained: of all steps as the run itself timed them, whatever ran beside it; the seconds that
        are compared are `Timing.seconds`.
      curve: the validations.
      exposure: what the steps showed.
      positions: of the last validation, as in `Restricted`.
      contexts: the validations in which a token sees so many tokens at most, by their number.
      own: the validation under the arm's own last mask, where that is not the full one.
      evaluators: what was found beside the loss in the last validation, by the evaluator's name.
    """

    experiment: str
    trial: Trial
    command: str
    machine: Machine
    core: int | None
    failure: str | None = None
    parameters: int = 0
    seconds_as_trained: Number = None
    curve: Curve = Curve((), (), ())
    exposure: Exposure = Exposure((), (), (), 0.0)
    positions: Mapping[str, Number] | None = None
    contexts: Mapping[str, Restricted] | None = None
    own: Restricted | None = None
    evaluators: Mapping[str, Mapping[str, Number]] | None = None

    @property
    def loss(self) -> float:
        """Bits per byte of the last validation at the full mask; infinite where there is none."""
        last = self.curve.bits_per_byte[-1] if self.curve.bits_per_byte and not self.failure else None
        return math.inf if last is None else last

    @property
    def own_loss(self) -> float:
        """The same under the mask that the arm ends with: what its learning rate is chosen by."""
        if self.own is None or self.own.bits_per_byte is None:
            return self.loss
        return self.own.bits_per_byte

    def to_json(self) -> str:
        """The record's file."""
        return json.dumps(asdict(self), indent=1) + "\n"


def record_of(saved: Any) -> ArmRecord:
    """The record that `to_json` made.

    Raises:
      ValueError: it is none; the message says what is wrong.
    """
    try:
        values = {each.name: saved[each.name] for each in fields(ArmRecord)}
        nested = {"trial": Trial, "machine": Machine, "curve": Curve, "exposure": Exposure}
        values |= {name: kind(**values[name]) for name, kind in nested.items()}
        restricted = values["contexts"] or {}
        values["contexts"] = {context: Restricted(**found) for context, found in restricted.items()}
        values["own"] = None if values["own"] is None else Restricted(**values["own"])
        return ArmRecord(**values)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is no record of an arm: {error!r}") from error


@dataclass(frozen=True)
class Evidence:
    """The files of an experiment in the folder of the evidence: `NAME.ARM.….json`, `NAME.timing.json`.

    Attributes:
      folder: of the files.
      experiment: that they are of.
    """

    folder: Path
    experiment: Experiment

    def path(self, trial: Trial) -> Path:
        """The record's file of a trial, which exists once it has ended."""
        return self.folder / f"{self.experiment.name}.{trial.name}.json"

    @property
    def timing_path(self) -> Path:
        """The file of the times of steps."""
        return self.folder / f"{self.experiment.name}.timing.json"

    def timing(self) -> Timing | None:
        """The times of steps; None: they are not measured yet."""
        return read_timing(self.timing_path) if self.timing_path.exists() else None

    def write(self, record: ArmRecord):
        """Writes a record in one piece."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path(record.trial), record.to_json())

    def record(self, trial: Trial) -> ArmRecord | None:
        """The record of a trial; None: it has not ended yet.

        Raises:
          ValueError: the file is of another run than the experiment asks for, or of none.
        """
        path = self.path(trial)
        if not path.exists():
            return None
        try:
            record = record_of(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if (asked := command(self.experiment.run_of(trial))) != record.command:
            raise ValueError(
                f"{path} is of another run than the experiment asks for: give the experiment another name, "
                f"or remove the file. It was {record.command}; it would be {asked}"
            )
        return record
