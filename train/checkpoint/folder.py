"""A run's folder: what lies where, and whether a run may begin in it or go on."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from train.config.run import Run, differences, to_json
from train.disk import write_atomically

BUCKET = "://"


def resolve_folder(folder: Path) -> Path:
    """The folder by its whole path, as orbax asks for."""
    return folder if BUCKET in str(folder) else folder.absolute()


def saved_steps(checkpoints: Path) -> list[int]:
    """The steps that a folder of checkpoints holds whole ones of, by their names, ascending."""
    return sorted(ocp.utils.checkpoint_steps(checkpoints)) if checkpoints.is_dir() else []


@dataclass(frozen=True)
class RunFolder:
    """The files of one run.

    It holds a run once it holds a config.json, which comes first and in one piece. So a run that is
    killed leaves a folder that holds none, or one to go on from.

    Attributes:
      path: the folder; need not exist yet.
      elsewhere: the folder of the checkpoints, where they do not lie in `path`; may be in a bucket.
    """

    path: Path
    elsewhere: Path | None = None

    @classmethod
    def of(cls, run: Run, path: Path | None = None) -> "RunFolder":
        """The folder that a config names; or another one, where it was moved to."""
        path = path or Path(run.folder) / run.name
        if run.checkpoints.folder is None:
            return cls(path)
        return cls(path, _place(run.checkpoints.folder) / run.name)

    @property
    def config(self) -> Path:
        """The `Run`, as JSON."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """One JSON record a line, see `train.metrics.log`."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """A folder, with one folder for each saved step."""
        return self.elsewhere or self.path / "checkpoint"

    @property
    def in_bucket(self) -> bool:
        """Whether the checkpoints lie in one, and not on a disk."""
        return BUCKET in str(self.checkpoints)

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
        return self.checkpoints.with_name(self.checkpoints.name + "-discarded")

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

        Of a run whose checkpoints lie elsewhere they are enough: the rest may be lost with a machine. They
        know what they are of.

        Raises:
          ValueError: it holds a run of another config, each difference is named with both values; or
            one whose checkpoints lie elsewhere than the config says now; or a config that cannot be read.
          FileExistsError: it holds files of a run, which beginning would remove, and no config that
            says of which.
        """
        if not self.config.exists():
            own = () if self.elsewhere else (self.checkpoints,)
            if there := [path.name for path in (*own, *self._others) if path.exists()]:
                raise FileExistsError(
                    f"{self.path} holds {', '.join(there)}, but no {self.config.name} that says what of; "
                    "begin anew with --overwrite, which removes that, or choose another --name"
                )
            return self.elsewhere is not None and bool(self.saved_steps)
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
        self._check_checkpoints(saved)
        return True

    def _check_checkpoints(self, saved: dict[str, Any]):
        """Refuses to begin anew because the run's checkpoints are looked for elsewhere than they lie."""
        place = saved.get("checkpoints", {}).get("folder")
        before = RunFolder(self.path, None if place is None else _place(place) / saved["name"])
        if not self.saved_steps and before.checkpoints != self.checkpoints and before.saved_steps:
            raise ValueError(
                f"checkpoints.folder: the run in {self.path} has its checkpoints in {before.checkpoints} "
                f"and none in {self.checkpoints}; give the options that it had, move them there, or "
                "begin anew with --overwrite"
            )

    def begin(self, run: Run):
        """Makes the folder, with the config. An old run's files go, and nothing else.

        Killed at any moment, it leaves the old run's config, with its checkpoints or without any, or
        the new one's.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._discard()
        if self.checkpoints.exists():
            if self.in_bucket:  # where to rename is to copy
                _remove(self.checkpoints)
            else:
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


def _place(folder: str) -> Path:
    """A folder's path, which may be in a bucket.

    Raises:
      ImportError: it is, and the library for that is not installed.
    """
    if BUCKET not in folder:
        return Path(folder)
    place: Any = epath.Path(folder)  # has all that a Path has
    try:
        place.exists()
    except ImportError as error:
        raise ImportError(f"checkpoints.folder: {folder} cannot be read: {error}") from error
    return place


def _remove(path: Path):
    if isinstance(path, epath.Path) and path.exists():
        path.rmtree()
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
