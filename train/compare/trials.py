"""Which runs an experiment consists of: those that choose learning rates, then those that are compared."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

from train.compare.experiment import Budget, Experiment, Trial
from train.compare.records import ArmRecord
from train.compare.timing import Timing
from train.config.run import Run

Records = Callable[[Trial], ArmRecord | None]
"""The record of a trial that has ended; None of another one."""


def rate_trials(experiment: Experiment, arm: str) -> list[Trial]:
    """The runs that choose an arm's learning rate; none where the grid has a single one."""
    rates = experiment.learning_rates
    if len(rates) == 1:
        return []
    return [Trial(arm, rate, experiment.steps_of_rates, experiment.seeds[0]) for rate in rates]


def learning_rate(experiment: Experiment, arm: str, records: Records) -> float | None:
    """The rate of the grid with the least final loss; of equals the first. None: not all have ended.

    The loss is that of the held-out rows, at the full mask; of an arm that never shows it, as `static`, at
    the mask that the arm ends with.

    Raises:
      ValueError: no rate of the grid gave a finite loss.
    """
    trials = rate_trials(experiment, arm)
    if not trials:
        return experiment.learning_rates[0]
    ended = [record for record in map(records, trials) if record is not None]
    if len(ended) < len(trials):
        return None
    best = min(ended, key=lambda record: record.own_loss)
    if math.isinf(best.own_loss):
        raise ValueError(f"learning_rates: none of the grid gives the arm {arm} a finite loss")
    return best.trial.learning_rate


class Plan:
    """The runs of an experiment.

    Args:
      experiment: what is compared.
      timing: by which steps are fitted to seconds.
    """

    def __init__(self, experiment: Experiment, timing: Timing):
        self.experiment, self.timing = experiment, timing
        self.steps = cache(self._steps)

    def run(self, arm: str, steps: int) -> Run:
        """An arm's run, for its schedules: without learning rate and seed."""
        return replace(self.experiment.arm(arm).apply(self.experiment.base), steps=steps)

    def main_trial(self, arm: str, rate: float, seed: int, budget: Budget) -> Trial:
        """The run of an arm that is compared with others at equal steps, or at equal seconds."""
        return Trial(arm, rate, self.steps(arm, budget), seed)

    def _steps(self, arm: str, budget: Budget) -> int:
        """The steps that an arm gets, to which its mask's schedule and its learning rate's are fitted.

        Equal seconds are those of the reference arm's steps.
        """
        experiment = self.experiment
        if budget == "steps" or arm == experiment.reference:
            return experiment.steps
        seconds = self.timing.seconds(self.run(experiment.reference, experiment.steps))[0]
        return self.timing.fit_steps(self.run(arm, experiment.steps), float(seconds))

    def trials(self, records: Records) -> Iterator[Trial]:
        """All runs that can be named so far, in the order in which they are due: an arm's main runs once its
        learning rate is chosen. A run that serves two purposes is there once."""
        seen: set[Trial] = set()
        for trial in self._in_order(records):
            if trial not in seen:
                seen.add(trial)
                yield trial

    def _in_order(self, records: Records) -> Iterator[Trial]:
        experiment = self.experiment
        arms = [arm.name for arm in experiment.arms]
        for arm in arms:
            yield from rate_trials(experiment, arm)
        rates = {arm: learning_rate(experiment, arm, records) for arm in arms}
        for seed in experiment.seeds:
            for budget in experiment.budgets:
                for arm, rate in rates.items():
                    if rate is not None:
                        yield self.main_trial(arm, rate, seed, budget)
