"""Restores the newest checkpoint that is not damaged: all of it to train on, or only the weights to use."""

import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from train.checkpoint.checksums import Leaves, leaves, shapes
from train.checkpoint.folder import resolve_folder, saved_steps
from train.disk import reason
from train.parallel.processes import Processes

FROZEN = "frozen"
"""The folder, among the checkpoints, of the weights that do not train. All checkpoints share it."""
SHOWN = 4
"""Differing leaves that a refusal names; it counts the rest."""


class DamagedCheckpoint(Exception):
    """A checkpoint that cannot be read back as it was written."""


class NoIntactCheckpoint(ValueError):
    """A folder has checkpoints, and all of them are damaged."""


@dataclass(frozen=True)
class Restored:
    """A checkpoint that was read back as it was written.

    Attributes:
      tree: arrays, in the structure that was asked for.
      frozen: weights that do not train, likewise.
      damaged: newer checkpoints that were skipped, by step, newest first.
    """

    tree: Any
    frozen: Any
    damaged: dict[int, DamagedCheckpoint]


def restore_newest(
    folder: Path,
    like: Any,
    accept: Callable[[Path, dict[str, Any]], None] = lambda path, about: None,
    complete: Callable[[dict[str, Any]], None] = lambda about: None,
    *,
    frozen: Any = None,
    partial: bool = False,
    processes: Processes = Processes(),
) -> Restored | None:
    """Reads the newest checkpoint that is not damaged; None where the folder has no checkpoint.

    Writes nothing. A checkpoint is damaged if it cannot be read, or if a checksum differs; the next older
    one is then tried. A checkpoint that is intact but does not fit is refused, and no older one is tried.

    Args:
      folder: of checkpoints, one folder for each step.
      like: a tree with the names of `train.step.state.State`, of arrays or `jax.ShapeDtypeStruct`s with
        shardings, which give the structure, shapes, types and devices of the result.
      accept: called with a checkpoint's path and its description (`train.checkpoint.checkpoints`) before
        its arrays are read. It raises `ValueError` to refuse the checkpoint.
      complete: called with the description once the arrays are read. It raises `DamagedCheckpoint` to try an
        older checkpoint.
      frozen: the weights that do not train, as `like`; None or without leaves where all train.
      partial: the checkpoint may have leaves that `like` lacks; they are not read.
      processes: all processes of the run, which call this together.

    Raises:
      NoIntactCheckpoint: every checkpoint is damaged; the message says how.
      ValueError: the checkpoint has other leaves than `like`; the message names them. Or `accept` raised.
    """
    folder, damaged = resolve_folder(folder), {}
    for step in reversed(processes.call_on_first(lambda: saved_steps(folder))):
        path = folder / str(step)
        try:
            about = _read_description(path, processes)
            accept(path, about)
            _check_structure(path, about["leaves"], like, partial)
            shared = about.get(FROZEN, {})
            _check_structure(path, shared, frozen, partial=False)
            tree = _read_arrays(path / "state", about["leaves"], like, processes)
            whole = _read_arrays(folder / FROZEN, shared, frozen, processes) if shared else frozen
            complete(about)
            return Restored(tree, whole, damaged)
        except DamagedCheckpoint as damage:
            damaged[step] = damage
    if damaged:
        faults = "; ".join(f"{step}: {damage}" for step, damage in damaged.items())
        raise NoIntactCheckpoint(f"none of the checkpoints in {folder} is intact ({faults})")
    return None


def checksum_json(values: Any) -> int:
    """A checksum of a value that JSON can hold."""
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def _read_description(path: Path, processes: Processes) -> dict[str, Any]:
    """What the checkpoint says of itself; the first process reads it for all."""

    def read() -> dict[str, Any] | str:
        try:
            with _raising_damage():
                about = json.loads((path / "about" / "metadata").read_text(encoding="utf-8"))
                if about.pop("crc") != checksum_json(about):
                    raise ValueError("the checksum of its description differs")
                return about
        except DamagedCheckpoint as damage:
            return str(damage)

    about = processes.call_on_first(read)
    if isinstance(about, str):
        raise DamagedCheckpoint(about)
    return about


def _check_structure(path: Path, saved: Leaves, like: Any, partial: bool):
    theirs = {name: f"{dtype}{shape}" for name, (dtype, shape, _) in saved.items()}
    ours = {name: f"{dtype}{shape}" for name, (dtype, shape) in shapes(like).items()}
    missing = "nothing"
    different = [
        f"{name}: {theirs.get(name, missing)} saved, {ours.get(name, missing)} needed"
        for name in sorted(ours if partial else theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name)
    ]
    if different:
        more = f"; and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
        raise ValueError(
            f"the checkpoint {path} is of another model: {'; '.join(different[:SHOWN])}{more}. "
            "Has the config, the tokenizer or the trainer's version changed since?"
        )


def _read_arrays(path: Path, saved: Leaves, like: Any, processes: Processes) -> Any:
    tree, fault = None, ""
    try:
        with _raising_damage(), ocp.PyTreeCheckpointer() as reader:
            # The devices are named, else orbax looks for those that saved the arrays.
            devices = ocp.checkpoint_utils.construct_restore_args(like)
            args = ocp.args.PyTreeRestore(item=like, restore_args=devices, partial_restore=True)
            tree = reader.restore(path, args=args)
    except DamagedCheckpoint as damage:
        fault = str(damage)
    if faults := list(filter(None, processes.all_gather(fault))):
        raise DamagedCheckpoint(faults[0])
    if wrong := [name for name, leaf in leaves(tree).items() if leaf != saved[name]]:
        raise DamagedCheckpoint(f"the checksum of {', '.join(wrong)} differs")
    return tree


@contextmanager
def _raising_damage() -> Iterator[None]:
    """Raises `DamagedCheckpoint` for any error but a lack of memory, which an older one would not mend."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError):
        raise
    except Exception as error:  # whatever the storage layers below raise
        raise DamagedCheckpoint(reason(error)) from error
