"""Loads a trained model to generate with or to export, from a run's folder or a safetensors file."""

import warnings
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from train.checkpoint.export import Weights, load_weights
from train.checkpoint.folder import RunFolder
from train.checkpoint.restore import restore_newest
from train.config.run import Run, from_json
from train.data.tokenizers import Tokenizer, load_tokenizer
from train.step.program import program_of, state_like

SAFETENSORS = ".safetensors"


def load_model(source: Path, tokenizer: str | None = None) -> tuple[Weights, Tokenizer]:
    """A trained model and its tokenizer, on this process's first device.

    Writes nothing, so that the run may be in training meanwhile.

    Args:
      source: a run's folder, whose newest intact checkpoint is loaded, or a file of
        `python -m train export`. With `optimizer.ema` the weights are the moving average.
      tokenizer: path of the tokenizer; None: the path in the run's config.

    Raises:
      FileNotFoundError: the folder or file does not exist, has no checkpoint yet, or the tokenizer is
        missing.
      ValueError: the source cannot be read, or the tokenizer is not the one of the training.
    """
    if source.suffix == SAFETENSORS:
        weights = load_weights(source)
        return weights, _load_same_tokenizer(weights, tokenizer)
    if source.is_file():
        raise ValueError(f"{source} is neither a run's folder nor a {SAFETENSORS} file")
    folder = RunFolder(source)
    if not folder.config.is_file():
        raise FileNotFoundError(f"{source} holds no run: {folder.config} does not exist")
    try:
        run = from_json(folder.config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder.config} is corrupted: {error}") from error
    loaded = load_tokenizer(tokenizer or run.data.tokenizer, run.data.end_token)
    params = _restore_params(RunFolder.of(run, source), run, loaded.vocabulary)
    return Weights(run, params, loaded.vocabulary, loaded.fingerprint), loaded


def _load_same_tokenizer(weights: Weights, name: str | None) -> Tokenizer:
    name = name or weights.run.data.tokenizer
    tokenizer = load_tokenizer(name, weights.run.data.end_token)
    if tokenizer.fingerprint != weights.fingerprint:
        raise ValueError(f"data.tokenizer: {name} is not the tokenizer that the model was trained with")
    return tokenizer


def _restore_params(folder: RunFolder, run: Run, vocabulary: int) -> Any:
    """The weights of the newest intact checkpoint, with a warning for each damaged one that is skipped."""
    field = "params" if run.optimizer.ema is None else "ema"
    device = SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        {field: getattr(state_like(program_of(run, vocabulary), vocabulary), field)},
    )
    restored = restore_newest(folder.checkpoints, like, partial=True)
    if restored is None:
        raise FileNotFoundError(f"{folder.path} holds no checkpoint yet")
    for step, damage in restored.damaged.items():
        path = folder.checkpoints / str(step)
        warnings.warn(f"the checkpoint {path} is damaged ({damage}); an older one is taken", stacklevel=3)
    return restored.tree[field]
