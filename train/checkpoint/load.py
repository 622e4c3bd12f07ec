"""Loads a trained model to generate with or to export, from a run's folder or a safetensors file."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from train.checkpoint.export import Weights, load_weights, params_like
from train.checkpoint.folder import RunFolder
from train.checkpoint.restore import restore_newest
from train.config.run import Run
from train.config.sections import Lora
from train.data.tokenizers import Tokenizer, load_tokenizer
from train.model.lora import merge_lora
from train.pretrained.folder import PretrainedFolder
from train.pretrained.read import open_tensors
from train.pretrained.run import pretrained_run
from train.step.program import program_of, state_like
from train.step.trainable import join_weights

SAFETENSORS = ".safetensors"


def load_model(source: Path, tokenizer: str | None = None) -> tuple[Weights, Tokenizer]:
    """A model and its tokenizer, on this process's first device.

    Writes nothing, so that the run may be in training meanwhile. The run of the weights names the tokenizer
    that was loaded. LoRA is merged: the model is one without, of which no weights are frozen.

    Args:
      source: a run's folder, whose newest intact checkpoint is loaded; a file of `python -m train export`;
        or a folder that transformers saved. With `optimizer.ema` the weights are the moving average.
      tokenizer: path of the tokenizer; None: the path in the run's config.

    Raises:
      FileNotFoundError: the folder or file does not exist, has no checkpoint yet, or the tokenizer is
        missing.
      ValueError: the source cannot be read, or the tokenizer is not the one of the training.
    """
    if source.suffix == SAFETENSORS:
        weights = load_weights(source)
        name = tokenizer or weights.run.data.tokenizer
        loaded = _load_same_tokenizer(weights, name)
        return replace(weights, run=_with_tokenizer(weights.run, name)), loaded
    if source.is_file():
        raise ValueError(f"{source} is neither a run's folder nor a {SAFETENSORS} file")
    if (pretrained := PretrainedFolder.at(source)) is not None:
        return _load_pretrained(pretrained, tokenizer)
    folder = RunFolder(source)
    run = folder.read_config()
    name = tokenizer or folder.tokenizer_path(run)
    loaded = folder.load_tokenizer(run, name)
    params = merge_lora(_restore_params(RunFolder.of(run, source), run, loaded.vocabulary), run.lora)
    origin = None if PretrainedFolder.at(folder.pretrained) is None else str(source)
    # Of the merged model all weights may train: what stood still in the run says nothing of it.
    optimizer = replace(run.optimizer, train=None, frozen=())
    merged = _with_tokenizer(replace(run, lora=Lora(), optimizer=optimizer), name)
    return Weights(merged, params, loaded.vocabulary, loaded.fingerprint, origin), loaded


def _load_pretrained(folder: PretrainedFolder, tokenizer: str | None) -> tuple[Weights, Tokenizer]:
    run = pretrained_run(folder, tokenizer)
    loaded = load_tokenizer(run.data.tokenizer, run.data.end_token, run.data.begin_token)
    loaded.check_fits(run.model.vocabulary(loaded.vocabulary))
    like = _on_first_device(params_like(run, loaded.vocabulary))
    with open_tensors(folder, run.model) as tensors:
        tensors.check(like)
        params = jax.tree.map_with_path(tensors.array, like)
    return Weights(run, params, loaded.vocabulary, loaded.fingerprint, str(folder.path)), loaded


def _with_tokenizer(run: Run, name: str) -> Run:
    return replace(run, data=replace(run.data, tokenizer=name))


def _load_same_tokenizer(weights: Weights, name: str) -> Tokenizer:
    data = weights.run.data
    tokenizer = load_tokenizer(name, data.end_token, data.begin_token)
    if tokenizer.fingerprint != weights.fingerprint:
        raise ValueError(f"data.tokenizer: {name} is not the tokenizer that the model was trained with")
    return tokenizer


def _restore_params(folder: RunFolder, run: Run, vocabulary: int) -> Any:
    """The weights of the newest intact checkpoint, with a warning for each damaged one that is skipped."""
    field = "params" if run.optimizer.ema is None else "ema"
    state = state_like(program_of(run, vocabulary), vocabulary)
    like, frozen = _on_first_device(({field: state.params}, state.frozen))
    restored = restore_newest(folder.checkpoints, like, frozen=frozen, partial=True)
    if restored is None:
        raise FileNotFoundError(f"{folder.path} holds no checkpoint yet")
    for step, damage in restored.damaged.items():
        path = folder.checkpoints / str(step)
        warnings.warn(f"the checkpoint {path} is damaged ({damage}); an older one is taken", stacklevel=3)
    return join_weights(restored.tree[field], restored.frozen)


def _on_first_device(tree: Any) -> Any:
    """The shapes of a tree, to be filled on this process's first device."""
    device = SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), tree)
