"""The checkpoints of a run in training: written in the background, and restored to resume the run."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp

from train.checkpoint.checksums import Leaves, leaves
from train.checkpoint.folder import resolve_folder, saved_steps
from train.checkpoint.restore import (
    FROZEN,
    DamagedCheckpoint,
    NoIntactCheckpoint,
    checksum_json,
    restore_newest,
)
from train.config.run import Run, differences, to_json
from train.disk import WriteError, reason
from train.parallel.processes import Processes
from train.step.state import State

DAMAGED = "-damaged"
"""Suffix of the folder, beside that of the checkpoints, which damaged checkpoints are moved to."""


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last write when it is left.

    A checkpoint has the state and a description, in `about`: the position in the data, their fingerprint,
    the config, and dtype, shape and checksum of every array. It does not depend on the processes and
    devices that saved it. Frozen weights are written once, before the first checkpoint, to the folder
    `frozen` among the checkpoints; each checkpoint has their checksums.

    Args:
      folder: of the checkpoints, visible to all processes; created where missing. Leftovers of interrupted
        saves in it are removed.
      run: the config; `run.checkpoints` says which checkpoints are kept.
      data: the fingerprint of the data.
      processes: all processes of the run, which save and restore together.
    """

    def __init__(self, folder: Path, run: Run, data: str, processes: Processes | None = None):
        self.folder = resolve_folder(folder)
        self._run, self._data, self._processes = run, data, processes or Processes()
        self._writing: int | None = None
        self._frozen: Leaves | None = None
        keep, every = run.checkpoints.keep, run.checkpoints.keep_every
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=every,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
            # Else a folder that cannot be created hangs the processes that wait for it.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *error):
        try:
            self.wait()
        except WriteError:
            if kind is None:  # an error raised inside comes first
                raise
        finally:
            self._manager.close()

    def steps(self) -> list[int]:
        """The steps of the checkpoints that the first process sees now, ascending."""
        return self._processes.call_on_first(lambda: saved_steps(self.folder))

    def save(self, state: State, batches: grain.DatasetIterator):
        """Starts to write the state and the position of `batches`; does nothing if its step is saved already.

        Training may continue at once. Arrays on an accelerator are copied before this returns; for arrays in
        host memory the writer keeps a reference, so that JAX does not reuse the buffer of a donated one.

        Raises:
          WriteError: this checkpoint, or the one before, could not be written. Those in the folder are
            complete.
        """
        self.wait()
        step = int(state.step)
        if step in self.steps():
            return
        about = {
            "config": json.loads(to_json(self._run)),
            "data": self._data,
            "leaves": leaves(_training(state)),
            # Grain's handler would save a position per process, to be read by as many processes.
            "position": batches.get_state(),
        }
        if state.frozen:
            about[FROZEN] = self._save_frozen(state.frozen)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(_training(state)),
            about=ocp.args.JsonSave(about | {"crc": checksum_json(about)}),
        )
        self._writing = step
        with self._raising_write_errors():
            self._manager.save(step, args=items, force=True)

    def _save_frozen(self, weights: Any) -> Leaves:
        """Dtype, shape and checksum of the frozen weights, which are written where they are not there yet."""
        if self._frozen is None:
            path = self.folder / FROZEN
            # Written in one piece, by this run: what is there of another one is removed when it begins.
            if not self._processes.call_on_first(path.exists):
                with self._raising_write_errors(path), ocp.PyTreeCheckpointer() as writer:
                    writer.save(path, weights)
            self._frozen = leaves(weights)
        return self._frozen

    def wait(self):
        """Returns once no save is in progress.

        Raises:
          WriteError: the checkpoint could not be written.
        """
        with self._raising_write_errors():
            self._manager.wait_until_finished()
        self._writing = None

    def check(self):
        """Raises the error of a save that has failed by now, without waiting for one in progress.

        Raises:
          WriteError: the checkpoint could not be written.
        """
        if self._writing is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def reached_preemption(self, done: int) -> bool:
        """Whether all processes of `jax.distributed` are to stop after step `done`; False without it.

        Call it after every step.
        """
        return jax.distributed.is_initialized() and self._manager.reached_preemption(done)

    def resume(self, like: State, batches: grain.DatasetIterator) -> State | None:
        """The newest state that is not damaged, with `batches` at its position; None without a checkpoint.

        Newer checkpoints, which are damaged, are moved to a folder beside, with a warning. If all are
        damaged none is moved, so that the same command is refused again instead of starting over.

        Args:
          like: a state of the same structure, shapes, types and devices, or its
            `jax.ShapeDtypeStruct`s.
          batches: of the same data.

        Raises:
          ValueError: all are damaged; or the newest intact one has another config, other data or another
            model, and the message says which.
        """

        def set_position(about: dict[str, Any]):
            try:
                batches.set_state(about["position"])
            except Exception as error:  # whatever grain raises
                fault = f"its position in the data cannot be restored: {reason(error)}"
                raise DamagedCheckpoint(fault) from error

        try:
            restored = restore_newest(
                self.folder,
                _training(like),
                self._check_run,
                set_position,
                frozen=like.frozen,
                processes=self._processes,
            )
        except NoIntactCheckpoint as error:
            raise NoIntactCheckpoint(
                f"{error}. Begin anew with --overwrite, or under another --name"
            ) from error
        if restored is None:
            return None
        for step, damage in restored.damaged.items():
            self._move_damaged(step, damage)
        return replace(like, **restored.tree, frozen=restored.frozen)

    def _check_run(self, path: Path, about: dict[str, Any]):
        """Refuses a checkpoint of another config or of other data."""
        if different := differences(about["config"], self._run):
            raise ValueError(f"the checkpoint {path} is of another config: {'; '.join(different)}")
        if about["data"] != self._data:
            raise ValueError(
                f"data.paths: the texts have changed since the checkpoint {path} was saved, so the run "
                "cannot be resumed; restore the texts, or begin anew with --overwrite or another --name"
            )

    def _move_damaged(self, step: int, damage: DamagedCheckpoint):
        target = self._processes.call_on_first(lambda: str(self._move(step)))
        self._manager.reload()
        if self._processes.first:
            warnings.warn(
                f"the checkpoint {self.folder / str(step)} is damaged ({damage}) and was moved to {target}; "
                "an older one is taken",
                stacklevel=4,
            )

    def _move(self, step: int) -> Path:
        """Moves a checkpoint out of the folder; returns its new path."""
        folder = self.folder.with_name(self.folder.name + DAMAGED)
        folder.mkdir(exist_ok=True)
        target, again = folder / str(step), 1
        while target.exists():
            again += 1
            target = folder / f"{step}-{again}"
        (self.folder / str(step)).rename(target)
        return target

    @contextmanager
    def _raising_write_errors(self, path: Path | None = None) -> Iterator[None]:
        """Names in the error the path, or the checkpoint that is being written."""
        try:
            yield
        except Exception as error:  # whatever the storage layers below raise, at whatever length
            failed, self._writing = path or self.folder / str(self._writing), None
            raise WriteError(f"the checkpoint {failed} could not be written: {reason(error)}") from error


def _training(state: State) -> dict[str, Any]:
    """What a checkpoint holds of a state: all but the frozen weights."""
    return {name: value for name, value in vars(state).items() if name != FROZEN}
