"""A process of an experiment, pinned to a core by `train.compare.cores`: trains a run, or measures times.

    python -m train.compare.worker EXPERIMENT EVIDENCE CORE TRIAL

TRIAL is a `Trial` as JSON, or `null` for the times of steps.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from train.compare.experiment import Trial, read_experiment
from train.compare.records import Evidence
from train.compare.timing import time_steps
from train.compare.train_trial import train_trial


def words(experiment: Path, evidence: Path, core: int, trial: Trial | None) -> list[str]:
    """The command of the process."""
    what = json.dumps(None if trial is None else vars(trial))
    return [sys.executable, "-m", "train.compare.worker", str(experiment), str(evidence), str(core), what]


def main(arguments: Sequence[str]):
    """Does what `words` ask for. A run that a signal stops leaves its checkpoint, and no record."""
    path, folder, core, what = arguments
    evidence, asked = Evidence(Path(folder), read_experiment(Path(path))), json.loads(what)
    if asked is None:
        time_steps(evidence.experiment, evidence.timing_path, int(core))
        return
    record = train_trial(evidence.experiment, Trial(**asked), int(core))
    if record is not None:
        evidence.write(record)


if __name__ == "__main__":
    main(sys.argv[1:])
