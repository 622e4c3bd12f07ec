"""Checkpoints: the whole state of training on disk, by step."""

from pathlib import Path
from textwrap import shorten

import orbax.checkpoint as ocp

from train.step import State


class Checkpoints:
    """The checkpoints of one run; use it as a context.

    Args:
      folder: where they lie; made when first written to.
      keep: how many are kept, the latest.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = folder.absolute()
        # Saved before `save` returns: the next train step donates the very buffers that are written.
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error):
        self._manager.close()

    def save(self, state: State):
        """Writes the state under its step."""
        self._manager.save(int(state.step), args=ocp.args.Composite(state=ocp.args.StandardSave(state)))

    def restore(self, like: State) -> State:
        """The latest state.

        Args:
          like: a state of the same structure, shapes and types.

        Raises:
          FileNotFoundError: there is none.
          ValueError: it cannot be read back in full.
        """
        step = self._manager.latest_step()
        if step is None:
            raise FileNotFoundError(f"{self.folder} holds no checkpoint to resume from")
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like))
        try:
            return self._manager.restore(step, args=args)["state"]
        except Exception as error:  # whatever the storage layers below raise, at whatever length
            raise ValueError(
                f"the checkpoint {self.folder / str(step)} is corrupted or belongs to another model "
                f"({shorten(str(error), 120)}); delete it to go on from an older one, or start anew"
            ) from error
