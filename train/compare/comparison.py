"""A comparison, from the file of an experiment to its records: whatever is not there yet is trained."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from train.compare.cores import Cores, Job
from train.compare.experiment import FOLDER, Experiment, Trial
from train.compare.records import Evidence
from train.compare.timing import Timing, check_run, lacking, time_steps
from train.compare.train_trial import train_trial
from train.compare.trials import Plan
from train.compare.worker import words
from train.loop.signals import StopSignals

POLL = 0.2
"""Seconds between looks at the processes that run."""


class Stopped(Exception):
    """A signal asked to stop; what was trained is saved, and the same command goes on."""


@dataclass(frozen=True)
class Comparison:
    """Trains an experiment's runs.

    Attributes:
      path: of the experiment's file, which other processes read too.
      evidence: where records lie.
      cores: that processes are pinned to, one on each; (): all is done in this process, one after another.
      say: takes a line for the reader.
    """

    path: Path
    evidence: Evidence
    cores: Sequence[int] = ()
    say: Callable[[str], None] = print

    @property
    def experiment(self) -> Experiment:
        """What is compared."""
        return self.evidence.experiment

    def run(self) -> Plan:
        """Measures and trains what has no record yet.

        Raises:
          Stopped: by a signal.
          OSError, ValueError: a run or a record is refused; `JobFailed` where another process failed.
        """
        self.experiment.write_texts()
        self.evidence.folder.mkdir(parents=True, exist_ok=True)
        (self._on_cores if self.cores else self._here)()
        return self.plan()

    def plan(self) -> Plan:
        """The runs of the experiment.

        Raises:
          ValueError: the times of steps are not measured yet, or of another run.
        """
        timing = self.evidence.timing()
        check_run(self.experiment, timing)
        if timing is None or lacking(self.experiment, timing):
            raise ValueError(f"{self.evidence.timing_path} has not the times of all arms' steps yet")
        return Plan(self.experiment, timing)

    def _here(self):
        if self._lacks_times:
            self.say("the time of a step at each window")
            time_steps(self.experiment, self.evidence.timing_path, None)
        plan = self.plan()
        while (trial := next(self._missing(plan), None)) is not None:
            self._say_trial(plan, trial)
            record = train_trial(self.experiment, trial)
            if record is None:
                raise Stopped
            self.evidence.write(record)

    def _on_cores(self):
        with StopSignals() as stop, Cores(self.cores) as cores:

            def wait():
                time.sleep(POLL)
                if stop.received:
                    raise Stopped  # the context passes it on, and waits for the checkpoints
                return cores.ended()

            if self._lacks_times:
                self.say(f"the time of a step at each window, on core {self.cores[0]} alone")
                cores.start(self._job("timing", cores.free[0], None))
                while not wait():
                    pass
            self._train_on(cores, self.plan(), wait)

    def _train_on(self, cores: Cores, plan: Plan, wait: Callable[[], list[Job]]):
        while True:
            todo = [t for t in self._missing(plan) if t.name not in cores.running.values()]
            for trial in todo[: len(cores.free)]:
                self._say_trial(plan, trial)
                cores.start(self._job(trial.name, cores.free[0], trial))
            if not cores.running:
                return
            while not (ended := wait()):
                pass
            for job in ended:
                if not (self.evidence.folder / f"{self.experiment.name}.{job.name}.json").exists():
                    raise Stopped  # it was asked to stop, and saved

    def _missing(self, plan: Plan) -> Iterator[Trial]:
        return (trial for trial in plan.trials(self.evidence.record) if self.evidence.record(trial) is None)

    def _job(self, name: str, core: int, trial: Trial | None) -> Job:
        log = Path(FOLDER) / self.experiment.name / f"{name}.log"
        return Job(name, words(self.path, self.evidence.folder, core, trial), log)

    @property
    def _lacks_times(self) -> bool:
        timing: Timing | None = self.evidence.timing()
        return timing is None or bool(lacking(self.experiment, timing))

    def _say_trial(self, plan: Plan, trial: Trial):
        trials = list(plan.trials(self.evidence.record))
        done = sum(self.evidence.record(each) is not None for each in trials)
        self.say(f"{done} of {len(trials)} runs have a record; {trial.name}")
