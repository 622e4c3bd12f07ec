"""One run of an experiment, from its config to its record."""

import math
from collections.abc import Sequence

import jax
import numpy as np

from dynmask_jax import Mask, Window
from train.checkpoint.load import load_model
from train.compare.experiment import Experiment, Trial
from train.compare.machine import Machine
from train.compare.records import ArmRecord, Curve, Exposure, Restricted
from train.config.command_line import command
from train.evaluate.totals import by_position, total
from train.loop.prepare import Session, prepare
from train.loop.training import Interrupted, NotFinite, train
from train.metrics import log
from train.metrics.record import StepRecord, ValidationRecord
from train.report.outcome import Outcome
from train.step.state import bits_per_byte

SHOWN = 100
"""Steps whose exposure a record has."""


def train_trial(experiment: Experiment, trial: Trial, core: int | None = None) -> ArmRecord | None:
    """Trains a run, or goes on with it, and measures what it came to.

    Args:
      experiment: that it is part of.
      trial: which run.
      core: that this process is pinned to.

    Returns:
      the record; None where a signal stopped the run, which the next call goes on with.

    Raises:
      OSError, ValueError: as `prepare` and `train`; but a loss that is not finite is a record.
    """
    run = experiment.run_of(trial)
    session = prepare(run)
    about = (experiment.name, trial, command(run), Machine.here(), core)
    try:
        outcome = train(session)
    except NotFinite as error:
        return ArmRecord(*about, failure=str(error).partition(";")[0])
    if isinstance(outcome, Interrupted):
        return None
    return _measured(experiment, session, ArmRecord(*about), outcome)


def _measured(experiment: Experiment, session: Session, begun: ArmRecord, outcome: Outcome) -> ArmRecord:
    weights, _ = load_model(session.folder.path)
    records = log.read(session.folder.metrics)
    validations = [record for record in records if isinstance(record, ValidationRecord)]
    steps = [record for record in records if isinstance(record, StepRecord)]
    restricted = _RestrictedValidation(session, weights.params)
    return ArmRecord(
        experiment=begun.experiment,
        trial=begun.trial,
        command=begun.command,
        machine=begun.machine,
        core=begun.core,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(weights.params)),
        seconds_as_trained=float(np.mean([record.seconds for record in outcome.timed])) * session.run.steps,
        curve=_curve(validations),
        exposure=_exposure(steps),
        positions=dict(validations[-1].positions),
        contexts={str(context): restricted(context=context) for context in experiment.contexts},
        own=restricted.own(),
        evaluators={name: dict(found) for name, found in validations[-1].evaluators.items()},
    )


class _RestrictedValidation:
    """Validates weights on the held-out rows under narrower masks than the full one, by one program."""

    def __init__(self, session: Session, params):
        self._program, self._rows, self._params = session.program, session.corpus.held_out, params
        self._evaluate = jax.jit(session.program.evaluate)

    def __call__(self, *, context: int) -> Restricted:
        """Each token sees so many tokens of its document at most, itself among them."""
        return self._under(self._program.masks.full & Window(context))

    def own(self) -> Restricted | None:
        """Under the mask that training ended with; None where that is the full one."""
        run, growth = self._program.run, self._program.masks.growth
        end = run.data.length if run.curriculum.end is None else run.curriculum.end
        shown = run.curriculum.chunk if run.curriculum.kind == "static" else end
        if run.curriculum.kind == "full" or shown >= run.data.length:
            return None
        return self._under(growth.mask(growth.steps))

    def _under(self, mask: Mask) -> Restricted:
        sums = total(lambda rows: self._evaluate(self._params, rows, mask), self._rows)
        bits = bits_per_byte(np.sum(sums.loss_sum), np.sum(sums.text_bytes))
        positions = by_position(self._program.masks.bucket_starts, sums)
        finite = {name: value if math.isfinite(value) else None for name, value in positions.items()}
        return Restricted(bits if math.isfinite(bits) else None, finite)


def _curve(validations: Sequence[ValidationRecord]) -> Curve:
    recall = [record.evaluators["recall"] for record in validations if "recall" in record.evaluators]
    return Curve(
        steps=[record.step for record in validations],
        bits_per_byte=[record.bits_per_byte for record in validations],
        nats_per_token=[record.loss for record in validations],
        accuracy=[found["accuracy/all"] for found in recall],
    )


def _exposure(steps: Sequence[StepRecord]) -> Exposure:
    chosen = sorted({round(place) for place in np.linspace(0, len(steps) - 1, min(SHOWN, len(steps)))})
    return Exposure(
        steps=[steps[place].step for place in chosen],
        shown=[round(steps[place].exposure, 4) for place in chosen],
        windows=[steps[place].window for place in chosen],
        mean=float(np.mean([record.exposure for record in steps])),
    )
