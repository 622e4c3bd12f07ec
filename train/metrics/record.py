"""The records of a run, as `metrics.jsonl` holds them: one JSON object a line, of three kinds.

Train steps have a `StepRecord`: every `watch.log_every`-th, the last, and each that was skipped. Validations
have a `ValidationRecord`, and the summaries that are written after training a `SummariesRecord`. What was not
finite is null. `from_json` alone tells the kind of a line, by its keys.
"""

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

Number = float | None
"""None: not finite, or not measured."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """A train step.

    A field with a default may be missing in a file: records of older versions are read.

    Attributes:
      step: its number, from 0.
      loss: mean over the step's targets, nats a token.
      bits_per_byte: the nats of the step's targets, in bits, over the bytes of text that these targets spell.
      exposure: visible pairs ÷ those of the full mask, 0…1.
      window: tokens of the window or chunk.
      padding: share of the batch's tokens that are padding.
      gradient_norm: before clipping.
      learning_rate: of the step.
      hops: where several devices hold a row: how often keys and values went on to the next device, in the
        layers where they went farthest. None elsewhere, and then not in the file; so are bytes_moved.
      bytes_moved: what a device sent of them, forward, in all layers.
      skipped: steps so far whose loss or gradient was not finite, and that changed nothing.
      seconds: a step took; this and the next are means over the steps since the last record.
      input_seconds: of these, waiting for the batch.
      tokens_per_second: padding left out. None, as mfu, in the first record of a process, whose step
        compiles.
      mfu: model FLOP utilisation, 0…1: `train.metrics.mfu`.
    """

    step: int
    loss: Number
    bits_per_byte: Number
    exposure: float
    window: int
    padding: float
    gradient_norm: Number
    learning_rate: float
    hops: int | None = None
    bytes_moved: Number = None
    skipped: int
    seconds: float
    input_seconds: float
    tokens_per_second: Number
    mfu: Number

    @property
    def steps_done(self) -> int:
        """How many train steps were done when the record was made."""
        return self.step + 1

    def to_json(self) -> dict[str, Any]:
        """The record as the file holds it."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in values.items() if name not in _TRAVEL or value is not None}

    def scalars(self) -> dict[str, float]:
        """Its numbers for charts, `train/loss`; those that are None are left out."""
        return _numbers({f"train/{name}": value for name, value in self.to_json().items() if name != "step"})


@dataclass(frozen=True)
class ValidationRecord:
    """A validation, at the full mask.

    Attributes:
      step: how many train steps were done before it.
      loss: mean nats a token; `validation_loss` in the file.
      bits_per_byte: the nats of the targets, in bits, over the bytes of text that they spell;
        `validation_bits_per_byte` in the file.
      positions: nats a token by where in its document the token stands: {"0": …, "64": …}.
      pace_loss: under the mask of the stage, where the loss moves the curriculum; else not in the file.
      evaluators: what each evaluator of `train.evaluate.evaluators` found, by its name, under which it stands
        in the file: `needle` (`train.evaluate.needle.Probe`), and `old_context`, the validation of an
        extended model at its old context (`train.evaluate.old_context.OldContextLoss`).
    """

    step: int
    loss: Number
    bits_per_byte: Number
    positions: Mapping[str, Number]
    pace_loss: Number = None
    evaluators: Mapping[str, Mapping[str, Number]] = field(default_factory=dict)

    def __post_init__(self):
        if taken := _RESERVED & set(self.evaluators):
            raise ValueError(
                f"an evaluator cannot have the name {min(taken)!r}, which records and charts use"
            )

    @property
    def steps_done(self) -> int:
        """How many train steps were done when the record was made."""
        return self.step

    def to_json(self) -> dict[str, Any]:
        """The record as the file holds it."""
        paced = {} if self.pace_loss is None else {"pace_loss": self.pace_loss}
        return {
            "step": self.step,
            "validation_loss": self.loss,
            "validation_bits_per_byte": self.bits_per_byte,
            "positions": dict(self.positions),
            **paced,
            **{name: dict(found) for name, found in self.evaluators.items()},
        }

    def scalars(self) -> dict[str, float]:
        """Its numbers for charts, `validation/loss`, `positions/64`, `needle/found/0.5`, without Nones."""
        groups = {"positions": self.positions, **self.evaluators}
        return _numbers(
            {
                "validation/loss": self.loss,
                "validation/bits_per_byte": self.bits_per_byte,
                "validation/pace_loss": self.pace_loss,
                **{
                    f"{group}/{name}": value
                    for group, found in groups.items()
                    for name, value in found.items()
                },
            }
        )


@dataclass(frozen=True)
class SummariesRecord:
    """The scores of the summaries that are written after training.

    Attributes:
      step: how many train steps were done before it.
      rouge: {"model": {"rouge1": …}, "lead, 120 words": {…}}, percent.
    """

    step: int
    rouge: Mapping[str, Mapping[str, float]]

    @property
    def steps_done(self) -> int:
        """How many train steps were done when the record was made."""
        return self.step

    def to_json(self) -> dict[str, Any]:
        """The record as the file holds it."""
        return {"step": self.step, "rouge": {name: dict(scores) for name, scores in self.rouge.items()}}

    def scalars(self) -> dict[str, float]:
        """Its numbers for charts: `rouge/model/rouge1`."""
        return {
            f"rouge/{name}/{kind}": value
            for name, scores in self.rouge.items()
            for kind, value in scores.items()
        }


Record = StepRecord | ValidationRecord | SummariesRecord

_TRAVEL = ("hops", "bytes_moved")
_VALIDATION = ("step", "validation_loss", "validation_bits_per_byte", "positions", "pace_loss")
_RESERVED = {*_VALIDATION, "loss", "rouge", "train", "validation"}
_STEP = re.compile(r'\{"step": \d+, "loss": ')


def from_json(saved: Mapping[str, Any]) -> Record:
    """The record that `to_json` made.

    Raises:
      ValueError: it is none; the message says what is missing or unknown.
    """
    if "loss" in saved:
        return _step(saved)
    if "validation_loss" in saved:
        return _validation(saved)
    if "rouge" in saved and "step" in saved:
        return SummariesRecord(saved["step"], saved["rouge"])
    raise ValueError("it is no record of a step, a validation or summaries")


def is_step(line: str) -> bool:
    """Whether a line of the file is of a train step, found without parsing it: there may be millions."""
    return _STEP.match(line) is not None


def _step(saved: Mapping[str, Any]) -> StepRecord:
    needed = [each.name for each in fields(StepRecord) if each.default is MISSING]
    if missing := [name for name in needed if name not in saved]:
        raise ValueError(f"it has no {', '.join(missing)}")
    return StepRecord(**{each.name: saved[each.name] for each in fields(StepRecord) if each.name in saved})


def _validation(saved: Mapping[str, Any]) -> ValidationRecord:
    if missing := [name for name in _VALIDATION[:4] if name not in saved]:
        raise ValueError(f"it has no {', '.join(missing)}")
    evaluators = {name: found for name, found in saved.items() if name not in _VALIDATION}
    for name, found in {"positions": saved["positions"], **evaluators}.items():
        if not isinstance(found, dict):
            raise ValueError(f"{name} is {found!r}, not an object")
    if "depths" in evaluators.get("needle", {}):
        evaluators["needle"] = _by_depth(evaluators["needle"])
    loss, bits, positions = (saved[name] for name in _VALIDATION[1:4])
    return ValidationRecord(saved["step"], loss, bits, positions, saved.get("pace_loss"), evaluators)


def _by_depth(found: Mapping[str, Any]) -> Mapping[str, Number]:
    """The numbers of a needle probe in older files, where they are lists along their depths."""
    depths, lists = found["depths"], {name: found[name] for name in found if name != "depths"}
    return {
        f"{name}/{depth}": value
        for name, values in lists.items()
        for depth, value in zip(depths, values, strict=True)
    }


def _numbers(values: Mapping[str, Number]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}
