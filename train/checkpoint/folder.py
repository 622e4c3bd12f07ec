"""A run's folder: the paths of its files, and whether a run may start or resume in it."""

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

from train.config.run import Run, differences, from_json, is_extended, to_json
from train.data.tokenizers import Tokenizer, load_tokenizer
from train.disk import write_atomically
from train.pretrained.folder import PretrainedFolder

BUCKET = "://"


def resolve_folder(folder: Path) -> Path:
    """The absolute path of a folder, which orbax needs; an address in a bucket stays as it is."""
    return folder if BUCKET in str(folder) else folder.absolute()


def pretrained_files(source: Path) -> PretrainedFolder | None:
    """The Hugging Face folder at a path, or the files of one that the run there keeps; None: neither."""
    return PretrainedFolder.at(source) or PretrainedFolder.at(RunFolder(source).pretrained)


def saved_steps(checkpoints: Path) -> list[int]:
    """The steps of the complete checkpoints in a folder, by their names, ascending."""
    return sorted(ocp.utils.checkpoint_steps(checkpoints)) if checkpoints.is_dir() else []


@dataclass(frozen=True)
class RunFolder:
    """The files of one run.

    A folder has a run once it has a config.json, which is written first and atomically. So a run that is
    killed at any moment leaves a folder without a run, or with one that can be resumed.

    Attributes:
      path: the folder; need not exist yet.
      elsewhere: the folder of the checkpoints, if not in `path`; may be in a bucket.
    """

    path: Path
    elsewhere: Path | None = None

    @classmethod
    def of(cls, run: Run, path: Path | None = None) -> "RunFolder":
        """The folder that a config names, or `path` if the folder was moved there."""
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
        """One JSON record per line, see `train.metrics.record`."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """A folder with one folder for each saved step."""
        return self.elsewhere or self.path / "checkpoint"

    @property
    def in_bucket(self) -> bool:
        """Whether the checkpoints are in a bucket instead of on a disk."""
        return BUCKET in str(self.checkpoints)

    @property
    def saved_steps(self) -> list[int]:
        """The steps of the complete checkpoints at this moment, ascending."""
        return saved_steps(self.checkpoints)

    @property
    def profile(self) -> Path:
        """A folder of profiler traces."""
        return self.path / "profile"

    @property
    def report(self) -> Path:
        """The report, the last file that training writes."""
        return self.path / "report.md"

    @property
    def summaries(self) -> Path:
        """Held-out documents and their summaries, one JSON record per line."""
        return self.path / "summaries.jsonl"

    @property
    def pretrained(self) -> Path:
        """A folder with config and tokenizer of the Hugging Face folder that the run began from."""
        return self.path / "pretrained"

    def tokenizer_path(self, run: Run) -> str:
        """`data.tokenizer` of the folder's run, or the copy of it in `pretrained` where there is one."""
        copy = self.pretrained / Path(run.data.tokenizer).name
        return str(copy) if run.init_from is not None and copy.is_file() else run.data.tokenizer

    def load_tokenizer(self, run: Run, name: str | None = None) -> Tokenizer:
        """The tokenizer of the folder's run.

        Args:
          run: the config in the folder.
          name: the path of the tokenizer; None: `tokenizer_path`.
        """
        return load_tokenizer(name or self.tokenizer_path(run), run.data.end_token, run.data.begin_token)

    @property
    def _discarded(self) -> Path:
        return self.checkpoints.with_name(self.checkpoints.name + "-discarded")

    @property
    def _others(self) -> tuple[Path, ...]:
        """The files of a run beside config and checkpoints."""
        names = ("tensorboard", "wandb", "wandb.id", "curriculum.png", "positions.png")
        return (
            self.metrics,
            self.profile,
            self.report,
            self.summaries,
            self.pretrained,
            *(self.path / name for name in names),
        )

    def read_config(self) -> Run:
        """The config of the run in the folder.

        Raises:
          FileNotFoundError: there is none.
          ValueError: it cannot be read.
        """
        if not self.config.is_file():
            raise FileNotFoundError(f"{self.path} holds no run: {self.config} does not exist")
        try:
            return from_json(self.config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.config} is corrupted: {error}") from error

    def holds(self, run: Run) -> bool:
        """Whether the folder has this run, to be resumed; the run may be without a checkpoint yet.

        For a run with checkpoints elsewhere they are enough, since each has the config: the other files may
        be lost with a machine.

        Raises:
          ValueError: the folder has a run of another config, and the message names each difference with both
            values; or a run with checkpoints elsewhere than `run` says; or a config that cannot be read.
          FileExistsError: the folder has files of a run, which starting would remove, without a config.
        """
        if not self.config.exists():
            checkpoints = () if self.elsewhere else (self.checkpoints,)
            if there := [path.name for path in (*checkpoints, *self._others) if path.exists()]:
                raise FileExistsError(
                    f"{self.path} holds {', '.join(there)}, but no {self.config.name} that says what of; "
                    "begin anew with --overwrite, which removes that, or choose another --name"
                )
            return self.elsewhere is not None and bool(self.saved_steps)
        try:
            saved = json.loads(self.config.read_text(encoding="utf-8"))
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
        """Refuses a run whose checkpoints are in another folder than `checkpoints.folder` says now."""
        place = saved.get("checkpoints", {}).get("folder")
        before = RunFolder(self.path, None if place is None else _place(place) / saved["name"])
        if not self.saved_steps and before.checkpoints != self.checkpoints and before.saved_steps:
            raise ValueError(
                f"checkpoints.folder: the run in {self.path} has its checkpoints in {before.checkpoints} "
                f"and none in {self.checkpoints}; give the options that it had, move them there, or "
                "begin anew with --overwrite"
            )

    def begin(self, run: Run):
        """Creates the folder with the config; removes the files of an old run, and no others.

        Killed at any moment, it leaves the config of the old run, with all or none of its checkpoints, or the
        config of the new one.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._discard()
        if self.checkpoints.exists():
            if self.in_bucket:  # a rename there is a copy
                _remove(self.checkpoints)
            else:
                self.checkpoints.rename(self._discarded)
        for path in self._others:
            _remove(path)
        self.write_config(run)
        self._discard()

    def resume(self, run: Run):
        """Readies the folder, which `holds` the run, to go on: with options that may change, or more steps.

        The report of fewer steps is removed, and made anew at the end.
        """
        if self.config.exists() and is_extended(json.loads(self.config.read_text(encoding="utf-8")), run):
            _remove(self.report)
        self.write_config(run)

    def write_config(self, run: Run):
        """Replaces the config."""
        write_atomically(self.config, to_json(run))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Locks the folder, which exists, against training by other processes.

        The system releases the lock when the process ends, however it ends. A file system without locks is
        not locked.

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
    """The path of a folder, which may be in a bucket.

    Raises:
      ImportError: the folder is in a bucket whose library is not installed.
    """
    if BUCKET not in folder:
        return Path(folder)
    place: Any = epath.Path(folder)  # has the methods of a Path
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
