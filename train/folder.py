"""A run's folder: what lies where, and whether a run may begin in it or go on."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from train.config import Run, differences, to_json


@dataclass(frozen=True)
class RunFolder:
    """The files of one run.

    Attributes:
      path: the folder; need not exist yet.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The `Run`, as JSON."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """One JSON record a line, see `train.metrics`."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """A folder, with one folder for each saved step."""
        return self.path / "checkpoint"

    @property
    def picture(self) -> Path:
        """The masks beside the loss."""
        return self.path / "curriculum.png"

    def begin(self, run: Run, *, overwrite: bool):
        """Makes the folder and writes the config. An old run's files go, and nothing else.

        Raises:
          FileExistsError: it holds a run, and `overwrite` is false.
        """
        if self.config.exists() and not overwrite:
            raise FileExistsError(
                f"{self.path} already holds a run: continue it with --resume, replace it with --overwrite, "
                "or choose another --name"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        for file in (self.metrics, self.picture):
            file.unlink(missing_ok=True)
        self.config.write_text(to_json(run))

    def check_same(self, run: Run):
        """Refuses to go on with another config than the folder's.

        Raises:
          FileNotFoundError: the folder holds no run.
          ValueError: its config cannot be read, or differs: each field is named with both values.
        """
        if not self.config.exists():
            raise FileNotFoundError(f"{self.path} holds no run to resume: {self.config} does not exist")
        try:
            saved = json.loads(self.config.read_text())
        except ValueError as error:
            raise ValueError(f"{self.config} is corrupted: {error}") from error
        if not isinstance(saved, dict):
            raise ValueError(f"{self.config} is corrupted: it holds {type(saved).__name__}, not an object")
        if different := differences(saved, run):
            raise ValueError(f"{self.path} holds a run of another config: {'; '.join(different)}")
