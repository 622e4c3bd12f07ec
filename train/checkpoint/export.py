"""A model's weights in one safetensors file, which says of which run they are, and back."""

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

FORMAT = "dynmask_jax train 1"


@dataclass(frozen=True)
class Weights:
    """A trained model: what makes text together with its tokenizer.

    Attributes:
      run: of which it is the outcome; run.data.tokenizer names the tokenizer.
      params: the weights, nested dictionaries of arrays, as `State.params`.
      vocabulary: how many different tokens there are.
      fingerprint: of the tokenizer, so that another one under the same name is noticed.
    """

    run: Run
    params: Any
    vocabulary: int
    fingerprint: str


def export_weights(weights: Weights, path: Path, *, overwrite: bool = False):
    """Writes a safetensors file: a tensor for each array, bit for bit.

    A tensor's name is its place: `groups.layers.0.attention.query.kernel` is of the first layer in every
    group, stacked.

    Its metadata hold the config as JSON, the tokenizer's name and fingerprint, and the vocabulary's
    size. The file is there in full or not at all.

    Raises:
      FileExistsError: there is such a file, and `overwrite` is false.
      OSError: it cannot be written.
    """
    if path.is_file() and not overwrite:
        raise FileExistsError(f"{path} exists already: choose another file, or --overwrite it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} could not be written: there is no folder {path.parent}")
    metadata = {
        "format": FORMAT,
        "config": to_json(weights.run),
        "tokenizer": weights.run.data.tokenizer,
        "tokenizer_fingerprint": weights.fingerprint,
        "vocabulary": str(weights.vocabulary),
    }
    fresh = path.with_name(path.name + ".writing")
    with writing(path):
        try:
            fresh.write_bytes(save(_named(jax.device_get(weights.params)), metadata))
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)


def load_weights(path: Path) -> Weights:
    """What `export_weights` wrote.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no safetensors file, or not one of ours, or its tensors are not those of its
        config: each that is missing, unknown or of another shape is named.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, "flax") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} was not written by `python -m train export`: its metadata hold the format "
            f"{metadata.get('format')!r}, needed {FORMAT!r}"
        )
    try:
        run, vocabulary = from_json(metadata["config"]), int(metadata["vocabulary"])
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} holds a config that cannot be read: {error}") from error
    like = params_like(run, vocabulary)
    if wrong := _differences(tensors, _named(like)):
        raise ValueError(f"{path} does not hold the weights of its config: {'; '.join(wrong)}")
    params = jax.tree_util.tree_map_with_path(lambda place, _: tensors[_name(place)], like)
    return Weights(run, params, vocabulary, metadata.get("tokenizer_fingerprint", ""))


def params_like(run: Run, vocabulary: int) -> Any:
    """The shapes and types of a run's weights, `jax.ShapeDtypeStruct`s in place of arrays."""
    return state_like(program_of(run, vocabulary), vocabulary).params


def _named(params: Any) -> dict[str, Any]:
    return {_name(place): leaf for place, leaf in jax.tree_util.tree_leaves_with_path(params)}


def _name(place) -> str:
    return jax.tree_util.keystr(place, simple=True, separator=".")


def _differences(tensors: dict[str, Any], like: dict[str, Any]) -> list[str]:
    """What keeps tensors from being weights, a sentence for each."""
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
