"""What the records of an experiment come to: the arms at each budget, and how soon they reach a loss."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from train.compare.experiment import Budget
from train.compare.records import ArmRecord
from train.compare.timing import family
from train.compare.trials import Plan, Records, learning_rate

FRACTIONS = (0.25, 0.5, 0.75, 1.0)
"""Of the reference arm's steps, after which its loss is a target for the others."""


@dataclass(frozen=True)
class Spread:
    """A number over seeds.

    Attributes:
      values: one for each seed that has it, finite.
    """

    values: Sequence[float]

    def show(self, form: str) -> str:
        """The mean, and of several seeds the least and the greatest; a dash where there is none.

        >>> Spread((0.5, 0.75)).show(".2f"), Spread((0.5,)).show(".1%"), Spread(()).show("")
        ('0.62 (0.50…0.75)', '50.0%', '–')
        """
        if not self.values:
            return "–"
        mean = format(float(np.mean(self.values)), form)
        if len(self.values) == 1:
            return mean
        return f"{mean} ({format(min(self.values), form)}…{format(max(self.values), form)})"


@dataclass(frozen=True)
class ArmOutcome:
    """An arm at a budget.

    Attributes:
      plan: of the experiment.
      arm: its name.
      budget: steps or seconds.
      records: of the seeds that have ended, in the order of the seeds; at least one.
    """

    plan: Plan
    arm: str
    budget: Budget
    records: Sequence[ArmRecord]

    @property
    def steps(self) -> int:
        """That the arm trained."""
        return self.records[0].trial.steps

    @property
    def learning_rate(self) -> float:
        """The one that was chosen for the arm."""
        return self.records[0].trial.learning_rate

    @cached_property
    def seconds(self) -> float:
        """Of all its steps, by the times of steps."""
        return float(self.plan.timing.seconds(self.plan.run(self.arm, self.steps))[0])

    @property
    def loss(self) -> Spread:
        """Bits per byte at the full mask, after training."""
        return finite(record.loss for record in self.records)

    @property
    def own_loss(self) -> Spread:
        """The same under the arm's own last mask, of an arm that never shows the full one."""
        return finite(record.own_loss for record in self.records if record.own is not None)

    @property
    def exposure(self) -> Spread:
        """The mean over the steps."""
        return finite(record.exposure.mean for record in self.records if not record.failure)

    def curve_seconds(self, record: ArmRecord) -> np.ndarray:
        """Seconds before each validation of one of the records."""
        run = self.plan.run(self.arm, self.steps)
        return self.plan.timing.seconds(run, tuple(record.curve.steps))

    def seconds_to(self, record: ArmRecord, loss: float) -> float | None:
        """Seconds until a record's validations first have so low a loss; None: they never do.

        Between two validations the loss is taken to fall on a line.
        """
        return first_below(self.curve_seconds(record), losses_of(record), loss)


def finite(values) -> Spread:
    """The values that are finite."""
    return Spread(tuple(float(value) for value in values if value is not None and math.isfinite(value)))


def losses_of(record: ArmRecord) -> np.ndarray:
    """Bits per byte of each validation; infinite where it was not finite."""
    return np.array([math.inf if value is None else value for value in record.curve.bits_per_byte])


def first_below(seconds: np.ndarray, losses: np.ndarray, target: float) -> float | None:
    """When the losses, joined by lines, are first at the target or below; None: never.

    >>> first_below(np.array([0.0, 10.0, 20.0]), np.array([4.0, 3.0, 2.0]), 2.5)
    15.0
    """
    reached = np.flatnonzero(losses <= target)
    if not len(reached):
        return None
    at = int(reached[0])
    if at == 0 or not math.isfinite(losses[at - 1]):
        return float(seconds[at])
    share = (losses[at - 1] - target) / (losses[at - 1] - losses[at])
    return float(seconds[at - 1] + share * (seconds[at] - seconds[at - 1]))


class Results:
    """All outcomes of an experiment, as far as it has come.

    Args:
      plan: of the experiment.
      records: of its trials.
    """

    def __init__(self, plan: Plan, records: Records):
        self.plan, self.records = plan, records

    @cached_property
    def arms(self) -> list[ArmOutcome]:
        """By budget and arm, in the order of the experiment; those without a record are left out."""
        experiment, found = self.plan.experiment, []
        for budget in experiment.budgets:
            for arm in experiment.arms:
                rate = learning_rate(experiment, arm.name, self.records)
                if rate is None:
                    continue
                trials = [self.plan.main_trial(arm.name, rate, seed, budget) for seed in experiment.seeds]
                ended = [record for record in map(self.records, trials) if record is not None]
                if ended:
                    found.append(ArmOutcome(self.plan, arm.name, budget, ended))
        return found

    def at(self, budget: Budget) -> list[ArmOutcome]:
        """Those of one budget."""
        return [outcome for outcome in self.arms if outcome.budget == budget]

    @cached_property
    def reference(self) -> ArmOutcome | None:
        """The reference arm; None: it has no record yet."""
        name = self.plan.experiment.reference
        return next((outcome for outcome in self.arms if outcome.arm == name), None)

    def speed(self, outcome: ArmOutcome, fraction: float) -> Spread:
        """Seconds that an arm takes to the loss of the reference arm, of the same seed, after a fraction of
        its steps, divided by the seconds of the reference arm until then. Seeds that never reach it are left
        out."""
        ratios = []
        for record, reference in self._pairs(outcome):
            assert self.reference is not None
            steps = fraction * reference.trial.steps
            loss = float(np.interp(steps, reference.curve.steps, losses_of(reference)))
            taken = outcome.seconds_to(record, loss)
            run = self.plan.run(self.reference.arm, self.reference.steps)
            if taken is not None and math.isfinite(loss):
                ratios.append(taken / float(self.plan.timing.seconds(run, (steps,))[0]))
        return Spread(tuple(ratios))

    def saved_as_trained(self, outcome: ArmOutcome) -> Spread:
        """The share of the reference arm's seconds that an arm saved, by the runs' own clocks."""
        pairs = [(a.seconds_as_trained, b.seconds_as_trained) for a, b in self._pairs(outcome)]
        return finite(1 - own / theirs for own, theirs in pairs if own is not None and theirs)

    def _pairs(self, outcome: ArmOutcome) -> list[tuple[ArmRecord, ArmRecord]]:
        """The arm's records with the reference arm's of the same seeds, where neither failed."""
        theirs = self.reference.records if self.reference else ()
        by_seed = {record.trial.seed: record for record in theirs if not record.failure}
        return [
            (record, by_seed[record.trial.seed])
            for record in outcome.records
            if record.trial.seed in by_seed and not record.failure
        ]

    def attention_share(self) -> float:
        """Share of a full step's time that goes when the window shrinks to the smallest that was timed."""
        experiment, timing = self.plan.experiment, self.plan.timing
        full = family(self.plan.run(experiment.reference, experiment.steps).curriculum)
        times = [seconds for measured in timing.families.values() for seconds in measured.values()]
        return 1 - min(times) / list(timing.families[full].values())[-1]
