"""The command `export`: writes a model's weights to a safetensors file."""

from dataclasses import dataclass
from pathlib import Path

import jax
import tyro

from train.checkpoint.export import export_weights
from train.checkpoint.load import load_model


@dataclass(frozen=True)
class Export:
    """Writes a model's weights to a safetensors file, which `generate` and `summarize` read too."""

    model: tyro.conf.Positional[Path]
    """A run's folder, whose newest checkpoint is used."""
    to: Path
    """The file to write."""
    overwrite: bool = False
    """Replace the file if it exists."""
    tokenizer: str | None = None
    """Path of the tokenizer. None: the path in the run's config."""


def export(command: Export):
    """Writes the file, and prints what it has.

    Raises:
      ValueError, OSError: with the reason why it cannot.
    """
    weights, _ = load_model(command.model, command.tokenizer)
    export_weights(weights, command.to, overwrite=command.overwrite)
    count = sum(leaf.size for leaf in jax.tree.leaves(weights.params))
    print(
        f"{command.to}: {count:,} weights, the config, and the name of the tokenizer "
        f"({weights.run.data.tokenizer})"
    )
