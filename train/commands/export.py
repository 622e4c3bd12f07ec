"""The command `export`: writes a model's weights to a safetensors file, or as a Hugging Face folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import tyro

from train.checkpoint.export import check_target, export_weights
from train.checkpoint.export_folder import Origin, StoredDtype, export_folder
from train.checkpoint.load import SAFETENSORS, load_model
from train.pretrained import write


@dataclass(frozen=True)
class Export:
    """Writes a model's weights to a safetensors file, or with its tokenizer as a Hugging Face folder.

    `generate` and `summarize` read both.
    """

    model: tyro.conf.Positional[Path]
    """A run's folder, whose newest checkpoint is used, or a Hugging Face folder."""
    to: Path
    """The file to write, whose name ends in .safetensors, or the folder."""
    format: Literal["safetensors", "huggingface"] = "safetensors"
    """safetensors: a file for this trainer; huggingface: a folder that transformers loads."""
    dtype: StoredDtype | None = None
    """Type of the weights in a Hugging Face folder. None: that of the folder that the run began from, or
    float32."""
    overwrite: bool = False
    """Replace the file if it exists, or the folder if it holds such a model."""
    tokenizer: str | None = None
    """Path of the tokenizer. None: the path in the run's config."""


def export(command: Export):
    """Writes the file or folder, and prints what it has.

    Raises:
      ValueError, OSError: with the reason why it cannot.
    """
    if command.dtype is not None and command.format != "huggingface":
        raise ValueError("--dtype needs --format huggingface")
    _check_name(command)
    check = write.check_target if command.format == "huggingface" else check_target
    check(command.to, overwrite=command.overwrite)  # before a model is read, which may take long
    weights, tokenizer = load_model(command.model, command.tokenizer)
    if command.format == "huggingface":
        origin = Origin.of(command.model, weights)
        export_folder(
            weights, tokenizer, origin, command.to, dtype=command.dtype, overwrite=command.overwrite
        )
    else:
        export_weights(weights, command.to, overwrite=command.overwrite)
    count = sum(leaf.size for leaf in jax.tree.leaves(weights.params))
    what = "the tokenizer" if command.format == "huggingface" else "the name of the tokenizer"
    print(f"{command.to}: {count:,} weights, the config, and {what} ({weights.run.data.tokenizer})")


def _check_name(command: Export):
    """Refuses a name by which the other commands would not know what is there."""
    is_file = command.to.suffix == SAFETENSORS
    if command.format == "safetensors" and not is_file:
        raise ValueError(
            f"--to must end in {SAFETENSORS}, by which generate and the others know the file, got "
            f"{command.to}; a Hugging Face folder needs --format huggingface"
        )
    if command.format == "huggingface" and is_file:
        raise ValueError(
            f"--to must not end in {SAFETENSORS}, by which generate and the others know a file, got "
            f"{command.to}: --format huggingface writes a folder"
        )
