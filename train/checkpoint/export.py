"""Writes a model's weights to a safetensors file with the run's config, and loads them back."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from safetensors import SafetensorError, safe_open
from safetensors.flax import save

from train.config.run import Run, from_json, to_json
from train.disk import writing
from train.step.program import program_of, state_like
from train.step.trainable import join_weights

FORMAT = "dynmask_jax train 1"


@dataclass(frozen=True)
class Weights:
    """A trained model.

    Attributes:
      run: the config of its training; run.data.tokenizer names the tokenizer.
      params: all weights, nested dictionaries of arrays.
      vocabulary: size of the vocabulary.
      fingerprint: of the tokenizer, to detect another tokenizer under the same name.
      origin: the folder, of Hugging Face or of a run that began from one, that holds what a Hugging Face
        model has beside its weights; None: the model began from random weights.
    """

    run: Run
    params: Any
    vocabulary: int
    fingerprint: str
    origin: str | None = None


def check_target(path: Path, *, overwrite: bool = False):
    """Refuses a file that `export_weights` would not write.

    Raises:
      FileExistsError: it exists, and `overwrite` is false.
      FileNotFoundError: its folder does not exist.
    """
    if path.is_file() and not overwrite:
        raise FileExistsError(f"{path} exists already: choose another file, or --overwrite it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} could not be written: there is no folder {path.parent}")


def export_weights(weights: Weights, path: Path, *, overwrite: bool = False):
    """Writes a safetensors file with a tensor for each array, bit for bit. The write is atomic.

    A tensor's name is its path: `groups.layers.0.attention.query.kernel` is of the first layer of each group,
    stacked over groups. The metadata have the config as JSON, the tokenizer's name and fingerprint, and the
    vocabulary's size; and of a model that came from a Hugging Face folder its origin.

    Raises:
      OSError: the file cannot be written, or `check_target` refuses it.
    """
    check_target(path, overwrite=overwrite)
    metadata = {
        "format": FORMAT,
        "config": to_json(weights.run),
        "tokenizer": weights.run.data.tokenizer,
        "tokenizer_fingerprint": weights.fingerprint,
        "vocabulary": str(weights.vocabulary),
    }
    if weights.origin is not None:
        metadata["origin"] = weights.origin
    fresh = path.with_name(path.name + ".writing")
    with writing(path):
        try:
            fresh.write_bytes(save(_by_name(jax.device_get(weights.params)), metadata))
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)


def load_weights(path: Path) -> Weights:
    """Loads a file of `export_weights`.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is not a safetensors file of `export_weights`; or its tensors do not fit its
        config, and the message names each that is missing, unknown or of another shape.
    """
    run, vocabulary, metadata = _read_metadata(path)
    with safe_open(path, "flax") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    like = params_like(run, vocabulary)
    if wrong := _differences(tensors, _by_name(like)):
        raise ValueError(f"{path} does not hold the weights of its config: {'; '.join(wrong)}")
    params = jax.tree_util.tree_map_with_path(lambda path, _: tensors[_name(path)], like)
    fingerprint, origin = metadata.get("tokenizer_fingerprint", ""), metadata.get("origin")
    return Weights(run, params, vocabulary, fingerprint, origin)


def load_config(path: Path) -> Run:
    """The config in a file of `export_weights`, whose tensors are not read.

    Raises:
      FileNotFoundError, ValueError: as `load_weights`.
    """
    return _read_metadata(path)[0]


def origin_of(source: Path) -> Path:
    """Where the files beside the weights are: the source, or the origin of a file of `export_weights`."""
    origin = _read_metadata(source)[2].get("origin") if source.is_file() else None
    return source if origin is None else Path(origin)


def _read_metadata(path: Path) -> tuple[Run, int, dict[str, str]]:
    """The config and the size of the vocabulary in a file, and all its metadata."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, "flax") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} was not written by `python -m train export`: its metadata hold the format "
            f"{metadata.get('format')!r}, needed {FORMAT!r}"
        )
    try:
        return from_json(metadata["config"]), int(metadata["vocabulary"]), metadata
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} holds a config that cannot be read: {error}") from error


def params_like(run: Run, vocabulary: int) -> Any:
    """All weights of a run as `jax.ShapeDtypeStruct`s, those of LoRA included."""
    state = state_like(program_of(run, vocabulary), vocabulary)
    return join_weights(state.params, state.frozen)


def _by_name(params: Any) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _differences(tensors: dict[str, Any], like: dict[str, Any]) -> list[str]:
    """Why tensors are not the weights `like`, a clause for each reason."""
    missing = [f"{name} is missing" for name in sorted(like.keys() - tensors.keys())]
    unknown = [f"{name} is unknown" for name in sorted(tensors.keys() - like.keys())]
    shapes = [
        f"{name} has shape {tensors[name].shape}, needed {like[name].shape}"
        for name in sorted(like.keys() & tensors.keys())
        if tensors[name].shape != like[name].shape
    ]
    types = [
        f"{name} has type {tensor.dtype}, needed floating point"
        for name, tensor in sorted(tensors.items())
        if not jnp.issubdtype(tensor.dtype, jnp.floating)
    ]
    return [*missing, *unknown, *shapes, *types]
