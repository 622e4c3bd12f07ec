"""Checkpoints: all that a run goes on from, by step, written while training goes on."""

import json
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp

from train.checkpoint.checksums import Leaves, leaves, shapes
from train.checkpoint.folder import rooted, saved_steps
from train.config.run import Run, differences, to_json
from train.disk import WriteError, reason
from train.parallel.processes import Processes
from train.step.program import State

DAMAGED = "-damaged"
"""Ends the name of the folder beside the checkpoints that damaged ones are moved to."""


class DamagedCheckpoint(Exception):
    """A checkpoint that cannot be read back as it was written."""


class Checkpoints:
    """The checkpoints of one run; use it as a context, which waits for the last one.

    Each holds the state, and what it belongs to: the position of the data, their fingerprint, the config,
    and a checksum of every leaf. Nothing in it depends on the processes and devices that saved it.

    Args:
      folder: where they lie, which all processes see; made if need be. What interrupted saves left in it is
        removed.
      run: the config; `run.checkpoints` says which are kept.
      data: the fingerprint of the data.
      processes: those of the run, which save and restore together.
    """

    def __init__(self, folder: Path, run: Run, data: str, processes: Processes | None = None):
        self.folder = rooted(folder)
        self._run, self._data, self._processes = run, data, processes or Processes()
        self._writing: int | None = None
        keep, every = run.checkpoints.keep, run.checkpoints.keep_every
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=every,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
            # A folder that cannot be made is then an error at once; else those who wait for it hang.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *error):
        try:
            self.wait()
        except WriteError:
            if kind is None:  # else what went wrong first is the better word
                raise
        finally:
            self._manager.close()

    def steps(self) -> list[int]:
        """The steps there are checkpoints of, ascending, as the first process sees them now."""
        return self._processes.first_says(lambda: saved_steps(self.folder))

    def save(self, state: State, batches: grain.DatasetIterator):
        """Begins to write the state under its step, beside the position that `batches` stands at.

        Training may go on at once: a device's numbers are copied before this returns, and where they
        lie in the host's memory the writer's hold on them keeps JAX from writing over them. A step
        that is saved already is not saved again.

        Raises:
          WriteError: this one, or the one before, could not be written. Those in the folder are whole.
        """
        self.wait()
        step = int(state.step)
        if step in self.steps():
            return
        about = {
            "config": json.loads(to_json(self._run)),
            "data": self._data,
            "leaves": leaves(state),
            # Not by grain's own handler, which keeps a position for each process, to be read by as many.
            "position": batches.get_state(),
        }
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            about=ocp.args.JsonSave(about | {"crc": _crc(about)}),
        )
        self._writing = step
        with self._naming_failures():
            self._manager.save(step, args=items, force=True)

    def wait(self):
        """Returns once the save under way, if any, is whole.

        Raises:
          WriteError: it could not be written.
        """
        with self._naming_failures():
            self._manager.wait_until_finished()
        self._writing = None

    def check(self):
        """Finds out whether a save that has ended by now failed; waits for nothing.

        Raises:
          WriteError: it did.
        """
        if self._writing is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def reached_preemption(self, done: int) -> bool:
        """Whether all processes of `jax.distributed` are to stop after so many steps; False without it.

        To be asked after every step.
        """
        return jax.distributed.is_initialized() and self._manager.reached_preemption(done)

    def restore_newest(self, like: State, batches: grain.DatasetIterator) -> State | None:
        """The newest state that is whole; `batches` is set to its position. None: there is none.

        Damaged ones that are newer are moved out of the way, into a folder beside, with a warning. Where
        none is whole all stay, so that the same command is refused again and does not begin anew.

        Args:
          like: a state of the same structure, shapes, types and devices, or its
            `jax.ShapeDtypeStruct`s.
          batches: of the same data.

        Raises:
          ValueError: all are damaged; or one belongs to another config, other data or another model,
            which is named.
        """
        damaged: dict[int, DamagedCheckpoint] = {}
        for step in reversed(self.steps()):
            try:
                about = self._about(step)
                self._check_same(step, about, like)
                state = self._restore(step, about, like)
                self._set_position(about, batches)
            except DamagedCheckpoint as damage:
                damaged[step] = damage
                continue
            for newer, damage in damaged.items():
                self._set_aside(newer, damage)
            return state
        if damaged:
            faults = "; ".join(f"{step}: {damage}" for step, damage in damaged.items())
            raise ValueError(
                f"none of the checkpoints in {self.folder} is whole ({faults}). Begin anew with --overwrite, "
                "or under another --name"
            )
        return None

    @property
    def _damaged(self) -> Path:
        return self.folder.with_name(self.folder.name + DAMAGED)

    def _about(self, step: int) -> dict[str, Any]:
        about = self._processes.first_says(lambda: self._read_about(step))
        if isinstance(about, str):
            raise DamagedCheckpoint(about)
        return about

    def _read_about(self, step: int) -> dict[str, Any] | str:
        """What the checkpoint says of itself, or why it cannot be read."""
        try:
            with _damage():
                about = json.loads((self.folder / str(step) / "about" / "metadata").read_text())
                if about.pop("crc") != _crc(about):
                    raise ValueError("what it says of itself is not what was saved")
                return about
        except DamagedCheckpoint as damage:
            return str(damage)

    def _check_same(self, step: int, about: dict[str, Any], like: State):
        path = self.folder / str(step)
        if different := differences(about["config"], self._run):
            raise ValueError(f"the checkpoint {path} is of another config: {'; '.join(different)}")
        if about["data"] != self._data:
            raise ValueError(
                f"data.paths: the texts have changed since the checkpoint {path} was saved, so the run "
                "cannot go on where it was; bring them back, or begin anew with --overwrite or another --name"
            )
        if different := _structure(about["leaves"], like):
            raise ValueError(f"the checkpoint {path} is of another model: {'; '.join(different)}")

    def _restore(self, step: int, about: dict, like: State) -> State:
        state, fault = None, ""
        try:
            with _damage():
                items = ocp.args.Composite(state=ocp.args.StandardRestore(like))
                state = self._manager.restore(step, args=items)["state"]
        except DamagedCheckpoint as damage:
            fault = str(damage)
        if faults := list(filter(None, self._processes.gathered(fault))):
            raise DamagedCheckpoint(faults[0])
        assert state is not None
        if wrong := [name for name, leaf in leaves(state).items() if leaf != about["leaves"][name]]:
            raise DamagedCheckpoint(f"the numbers of {', '.join(wrong)} are not those that were saved")
        return state

    def _set_position(self, about: dict, batches: grain.DatasetIterator):
        try:
            batches.set_state(about["position"])
        except Exception as error:  # whatever grain raises
            raise DamagedCheckpoint(f"the position of the data cannot be gone to: {reason(error)}") from error

    def _set_aside(self, step: int, damage: DamagedCheckpoint):
        target = self._processes.first_says(lambda: str(self._moved(step)))
        self._manager.reload()
        if self._processes.first:
            warnings.warn(
                f"the checkpoint {self.folder / str(step)} is damaged ({damage}) and was moved to {target}; "
                "an older one is taken",
                stacklevel=4,
            )

    def _moved(self, step: int) -> Path:
        """Where a checkpoint now lies that lay among the others."""
        self._damaged.mkdir(exist_ok=True)
        target, again = self._damaged / str(step), 1
        while target.exists():
            again += 1
            target = self._damaged / f"{step}-{again}"
        (self.folder / str(step)).rename(target)
        return target

    @contextmanager
    def _naming_failures(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever the storage layers below raise, at whatever length
            failed, self._writing = self._writing, None
            raise WriteError(
                f"the checkpoint {self.folder / str(failed)} could not be written: {reason(error)}"
            ) from error


def _crc(values: Any) -> int:
    """A checksum of what JSON can hold."""
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


@contextmanager
def _damage() -> Iterator[None]:
    """What cannot be read is damaged; a device that has too little memory is another matter."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError):
        raise
    except Exception as error:  # whatever the storage layers below raise
        raise DamagedCheckpoint(reason(error)) from error


def _structure(saved: Leaves, like: State) -> list[str]:
    """Where a saved state is of other leaves than `like`, each with both."""
    theirs = {name: f"{dtype}{shape}" for name, (dtype, shape, _) in saved.items()}
    ours = {name: f"{dtype}{shape}" for name, (dtype, shape) in shapes(like).items()}
    missing = "nothing"
    return [
        f"{name}: {theirs.get(name, missing)} saved, {ours.get(name, missing)} needed"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name)
    ]
