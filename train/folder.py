"""A run's folder: what lies where, and whether a run may begin in it or go on."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from train.config import Run, differences, to_json
from train.disk import write_atomically


def saved_steps(checkpoints: Path) -> list[int]:
    """The steps that a folder of checkpoints holds whole ones of, by their names, ascending."""
    return sorted(int(path.name) for path in checkpoints.glob("*") if path.name.isdecimal())


@dataclass(frozen=True)
class RunFolder:
    """The files of one run.

    It holds a run once it holds a config.json, which comes first and in one piece. So a run that is
    killed leaves a folder that holds none, or one to go on from.

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
    def saved_steps(self) -> list[int]:
        """The steps there are checkpoints of at this moment, ascending."""
        return saved_steps(self.checkpoints)

    @property
    def profile(self) -> Path:
        """A folder of profiler traces."""
        return self.path / "profile"

    @property
    def report(self) -> Path:
        """The last to be written, of what training leaves."""
        return self.path / "report.md"

    @property
    def summaries(self) -> Path:
        """Held-out documents and their summaries, one JSON record a line."""
        return self.path / "summaries.jsonl"

    @property
    def _discarded(self) -> Path:
        return self.path / "checkpoint-discarded"

    @property
    def _others(self) -> tuple[Path, ...]:
        """All else that a run leaves."""
        names = ("tensorboard", "wandb", "wandb.id", "curriculum.png", "positions.png")
        return (
            self.metrics,
            self.profile,
            self.report,
            self.summaries,
            *(self.path / name for name in names),
        )

    def holds(self, run: Run) -> bool:
        """Whether the folder holds this run, to go on with; it may be without a checkpoint yet.

        Raises:
          ValueError: it holds a run of another config, each difference is named with both values; or
            a config that cannot be read.
          FileExistsError: it holds files of a run, which beginning would remove, and no config that
            says of which.
        """
        if not self.config.exists():
            if there := [path.name for path in (self.checkpoints, *self._others) if path.exists()]:
                raise FileExistsError(
                    f"{self.path} holds {', '.join(there)}, but no {self.config.name} that says what of; "
                    "begin anew with --overwrite, which removes that, or choose another --name"
                )
            return False
        try:
            saved = json.loads(self.config.read_text())
        except ValueError as error:
            raise ValueError(f"{self.config} is corrupted: {error}") from error
        if not isinstance(saved, dict):
            raise ValueError(f"{self.config} is corrupted: it holds {type(saved).__name__}, not an object")
        if different := differences(saved, run):
            raise ValueError(
                f"{self.path} holds a run of another config: {'; '.join(different)}. Begin anew with "
                "--overwrite, or choose another --name"
            )
        return True

    def begin(self, run: Run):
        """Makes the folder, with the config. An old run's files go, and nothing else.

        Killed at any moment, it leaves the old run's config, with its checkpoints or without any, or
        the new one's.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._discard()
        if self.checkpoints.exists():
            self.checkpoints.rename(self._discarded)
        for path in self._others:
            _remove(path)
        self.write_config(run)
        self._discard()

    def write_config(self, run: Run):
        """Writes the config, in place of one that differs only in what may change."""
        write_atomically(self.config, to_json(run))

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keeps other processes from training in the folder, which exists.

        The system releases it when the process ends, however it ends. Where the file system knows no
        locks, nothing is kept.

        Raises:
          FileExistsError: another process trains in it.
        """
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise FileExistsError(
                f"{self.path} is in use: another process trains in it; choose another --name"
            ) from error
        except OSError:
            pass
        try:
            yield
        finally:
            os.close(descriptor)

    def _discard(self):
        _remove(self._discarded)


def _remove(path: Path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
