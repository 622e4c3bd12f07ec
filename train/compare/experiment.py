"""An experiment: which arms are trained, on what and for how long. Read from a file of TOML or JSON."""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from train.compare.arms import Arm, arm_of
from train.config.checks import at_least
from train.config.presets import PRESETS
from train.config.run import Run, with_values
from train.data.recall import Recall, write_recall

Budget = Literal["steps", "seconds"]
FOLDER = "runs/compare"


@dataclass(frozen=True)
class Trial:
    """One run of an experiment.

    Attributes:
      arm: its name.
      learning_rate: from the grid.
      steps: to train.
      seed: of weights and order of rows.
    """

    arm: str
    learning_rate: float
    steps: int
    seed: int

    @property
    def name(self) -> str:
        """Of the run's folder and the record's file.

        >>> Trial("full", 2e-3, 800, 0).name
        'full.rate-0.002.steps-800.seed-0'
        """
        return f"{self.arm}.rate-{self.learning_rate:g}.steps-{self.steps}.seed-{self.seed}"


@dataclass(frozen=True)
class Experiment:
    """What is compared, as the file says it.

    Attributes:
      name: of the files that it writes.
      arms: at least two.
      steps: of the reference arm, and of every arm at equal steps.
      preset: of `train.config.presets`, which `options` change.
      options: sections of a config, for every arm.
      seeds: of the main runs; the learning rates are compared with the first.
      learning_rates: the grid; every arm's own is chosen from it.
      rate_steps: of the runs that choose it. None: `steps`, and the best of them is the main run.
      reference: the arm whose losses are targets, and whose seconds are the budget of equal seconds.
      budgets: "steps", "seconds" or both.
      contexts: tokens that a token sees at most, itself among them, in the validations after training.
      points: validations along a run, beside the one before training.
      recall: the synthetic text that is trained on; None: the texts of `options`.
      windows: how many windows a step is timed at, from the smallest to the full one.
      timed_steps: timed at each of them.
    """

    name: str
    arms: tuple[Arm, ...]
    steps: int
    preset: str = "run"
    options: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    learning_rates: tuple[float, ...] = (2e-3,)
    rate_steps: int | None = None
    reference: str = "full"
    budgets: tuple[Budget, ...] = ("steps", "seconds")
    contexts: tuple[int, ...] = (256, 1024)
    points: int = 20
    recall: Recall | None = None
    windows: int = 8
    timed_steps: int = 9

    def __post_init__(self):
        at_least("", self, steps=1, rate_steps=1, points=1, windows=2, timed_steps=1)
        if not self.name or Path(self.name).name != self.name or "." in self.name:
            raise ValueError(f"name must be a file's name without dots, got {self.name!r}")
        names = [arm.name for arm in self.arms]
        for field_name, values in (
            ("arms", names),
            ("seeds", self.seeds),
            ("learning_rates", self.learning_rates),
            ("budgets", self.budgets),
            ("contexts", self.contexts),
        ):
            if len(set(values)) < len(values):
                raise ValueError(
                    f"{field_name} must differ from each other, got {', '.join(map(str, values))}"
                )
        if len(names) < 2:
            raise ValueError(f"arms must be two or more, to be compared, got {', '.join(names) or 'none'}")
        if self.reference not in names:
            raise ValueError(f"reference must be one of the arms {', '.join(names)}, got {self.reference!r}")
        if not self.seeds or not self.learning_rates or not self.budgets:
            raise ValueError("seeds, learning_rates and budgets must not be empty")
        if unknown := set(self.budgets) - set(get_args(Budget)):
            raise ValueError(f"budgets must be of 'steps' and 'seconds', got {min(unknown)!r}")
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        if self.preset == "extend":
            raise ValueError("preset must not be extend, whose options follow from the model it extends")
        if not all(1 <= context < self.base.data.length for context in self.contexts):
            raise ValueError(
                f"contexts must lie in 1…{self.base.data.length - 1}, below data.length, got "
                f"{', '.join(map(str, self.contexts))}"
            )
        for arm in self.arms:  # refused here, not after hours
            arm.apply(self.base)

    @cached_property
    def base(self) -> Run:
        """The run that arms change."""
        run = with_values(PRESETS[self.preset](), dict(self.options))
        if run.task != "lm":
            raise ValueError(f"options.task must be lm, got {run.task!r}")
        run = replace(run, folder=f"{FOLDER}/{self.name}", steps=self.steps)
        if run.data.held_out_seed is None:  # all seeds are validated on the same rows
            run = replace(run, data=replace(run.data, held_out_seed=0))
        if run.data.cache is None:
            run = replace(run, data=replace(run.data, cache=f"{FOLDER}/cache"))
        if self.recall is None:
            return run
        texts = [str(path) for path in self._recall_files(run.data.length)]
        data = replace(run.data, paths=(texts[0],), held_out_paths=(texts[1],), tokenizer="bytes")
        return replace(run, data=data, evaluation=replace(run.evaluation, recall=True))

    @property
    def steps_of_rates(self) -> int:
        """The steps of the runs that choose a learning rate."""
        return self.rate_steps or self.steps

    def arm(self, name: str) -> Arm:
        """An arm by its name."""
        return next(arm for arm in self.arms if arm.name == name)

    def run_of(self, trial: Trial) -> Run:
        """The config of a trial: an ordinary run of the trainer."""
        run = self.arm(trial.arm).apply(self.base)
        every = max(1, trial.steps // self.points)
        return replace(
            run,
            name=trial.name,
            seed=trial.seed,
            steps=trial.steps,
            optimizer=replace(run.optimizer, learning_rate=trial.learning_rate),
            evaluation=replace(run.evaluation, every=every),
            checkpoints=replace(run.checkpoints, every=run.checkpoints.every or every),
        )

    def write_texts(self):
        """Writes the synthetic text, where the experiment has one and it is not there yet."""
        length = self.base.data.length
        files = self._recall_files(length)
        if self.recall is not None and not all(path.exists() for path in files):
            write_recall(files[0].parent, self.recall, length)

    def _recall_files(self, length: int) -> tuple[Path, Path]:
        options = "-".join(map(str, astuple(self.recall or Recall())))  # others are another folder
        folder = Path(FOLDER) / self.name / f"recall-{options}-length-{length}"
        return folder / "recall.jsonl", folder / "recall-held-out.jsonl"


def read_experiment(path: Path) -> Experiment:
    """The experiment of a file: `.toml`, or JSON.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is neither, or an entry is unknown, missing or refused; with the file's name.
    """
    text = path.read_text(encoding="utf-8")
    try:
        saved = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
        return experiment_of(saved)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (TypeError, AttributeError) as error:  # of a number where a list is needed, and the like
        raise ValueError(f"{path}: an entry has a value of the wrong type: {error}") from error


def experiment_of(saved: Any) -> Experiment:
    """The experiment of what TOML or JSON hold.

    Raises:
      ValueError: an entry is unknown, missing or refused.
    """
    if not isinstance(saved, dict):
        raise ValueError(f"an experiment is a table, got {type(saved).__name__}")
    known = {each.name for each in fields(Experiment)}
    if unknown := set(saved) - known:
        raise ValueError(f"unknown entry {min(unknown)!r}; the entries are {', '.join(sorted(known))}")
    if missing := [name for name in ("name", "arms", "steps") if name not in saved]:
        raise ValueError(f"it has no {missing[0]}")
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()
    }
    values["arms"] = tuple(map(arm_of, saved["arms"]))
    if "recall" in values:
        values["recall"] = with_values(Recall(), values["recall"])
    return Experiment(**values)
