"""The command `compare`: arms on the same model, data order and budget, from a file to a page."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from train.compare.comparison import Comparison, Stopped
from train.compare.experiment import read_experiment
from train.compare.outcome import Results
from train.compare.pictures import draw_all
from train.compare.records import Evidence
from train.compare.tables import page
from train.compare.trials import Plan
from train.disk import check_writable, write_atomically


@dataclass(frozen=True)
class Compare:
    """Trains the arms of an experiment, whatever has no record yet, and writes tables and pictures."""

    experiment: tyro.conf.Positional[Path]
    """A file of TOML or JSON, as docs/training.md describes it."""
    evidence: Path = Path("docs/evidence")
    """Folder of the records, the page and the pictures."""
    cores: tuple[int, ...] = ()
    """Cores to train on, a run on each at the same time, in a process that is pinned to it. Left out: one run
    after another, in this process, with all its cores."""
    report: bool = False
    """Write page and pictures from the records that there are, and train nothing."""


def compare(command: Compare):
    """Trains what has no record, writes the page and says where it is.

    Raises:
      ValueError, OSError: with the reason why it cannot.
    """
    evidence = Evidence(command.evidence, read_experiment(command.experiment))
    check_writable(command.evidence, "evidence")
    comparison = Comparison(command.experiment, evidence, command.cores)
    if command.report:
        plan = comparison.plan()
    else:
        try:
            plan = comparison.run()
        except Stopped:
            print("Stopped; all that was trained is saved, and the same command goes on.")
            return
    print(f"The page is {write_page(command.experiment, evidence, plan)}")


def write_page(source: Path, evidence: Evidence, plan: Plan) -> Path:
    """Draws the pictures and writes the page of an experiment beside its records.

    Args:
      source: the experiment's file, as the page's command names it.
      evidence: its records.
      plan: its runs.
    """
    results = Results(plan, evidence.record)
    pictures = draw_all(results, evidence.folder)
    path = evidence.folder / f"{evidence.experiment.name}.md"
    write_atomically(path, page(results, source.as_posix(), pictures))
    return path
