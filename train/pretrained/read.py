"""Weights of a Hugging Face folder, read straight into the shards of our arrays, one array at a time."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from train.config.model import Model
from train.pretrained.folder import PretrainedFolder
from train.pretrained.names import TOP, layout_of

EMBEDDING, LOGITS = TOP["embed.embedding"][0], TOP["logits.kernel"][0]
TYPES = ("F32", "BF16", "F16")
"""The types of tensors that are read."""
BUFFERS = ".rotary_emb.inv_freq"
"""The end of the names of tensors that old checkpoints hold though they are not weights."""
SHOWN = 4
"""Faults that a refusal names; it counts the rest."""
COMPARED = 2**20
"""Weights of two tensors that are compared at once."""


@dataclass(frozen=True)
class Tensors:
    """The open files of a folder's weights. Made by `open_tensors`.

    Attributes:
      path: of the folder.
      model: its options.
      files: the open file of each tensor, by the tensor's name.
      paths: of the same files.
    """

    path: Path
    model: Model
    files: Mapping[str, Any]
    paths: Mapping[str, Path]

    def check(self, like: Any):
        """Refuses tensors that are not the weights `like`, a tree of arrays or their shapes.

        Raises:
          ValueError: tensors are missing, left over, of another shape, or of a type that is not read. The
            message names them. Or all are named as in a model that holds this one, or that it holds.
        """
        self._check_prefix()
        expected = {
            name: layout.shape(leaf.shape)
            for path, leaf in jax.tree_util.tree_leaves_with_path(like)
            for layout in [layout_of(_name(path), self.model)]
            for name in layout.names
        }
        spare = {name for name in self.files.keys() - expected.keys() if not name.endswith(BUFFERS)}
        faults = [f"{name} is missing" for name in sorted(expected.keys() - self.files.keys())]
        if self.model.tied_embeddings and LOGITS in spare and self._is_tied():
            spare.remove(LOGITS)
        faults += [f"{name} is left over" for name in sorted(spare)]
        for name in sorted(expected.keys() & self.files.keys()):
            tensor = self.files[name].get_slice(name)
            if (shape := tuple(tensor.get_shape())) != expected[name]:
                faults.append(f"{name} has shape {shape}, needed {expected[name]}")
            elif tensor.get_dtype() not in TYPES:
                faults.append(f"{name} has type {tensor.get_dtype()}, needed one of {', '.join(TYPES)}")
        if faults:
            more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
            raise ValueError(
                f"{self.path} does not hold the weights of its config.json: {'; '.join(faults[:SHOWN])}{more}"
            )

    def array(self, path: Any, leaf: Any) -> jax.Array:
        """The array of a weight, each process reading the shards of its devices and no more.

        Args:
          path: of the weight in its tree, as JAX gives it.
          leaf: an array, or its shape, with the dtype and the sharding that are wanted. Host memory holds one
            shard in that dtype, and one tensor's part of it in the dtype of the file.
        """
        layout, shape = layout_of(_name(path), self.model), leaf.shape

        def read(index) -> np.ndarray:
            sizes = [len(range(*part.indices(size))) for part, size in zip(index, shape, strict=True)]
            shard = np.empty(sizes, leaf.dtype)
            parts = shard if layout.stacked else shard[None]
            for part, (name, theirs) in zip(parts, layout.index(index, shape), strict=True):
                part[...] = layout.to_ours(self.files[name].get_slice(name)[theirs], part.shape)
            return shard

        return jax.make_array_from_callback(shape, leaf.sharding, read)

    def _check_prefix(self):
        """Refuses tensors whose names begin otherwise than those of a language model."""
        if EMBEDDING in self.files:
            return
        suffix = EMBEDDING.removeprefix("model.")
        prefix = next((name.removesuffix(suffix) for name in self.files if name.endswith(suffix)), None)
        if prefix is None:
            return
        load, save = f'dtype="auto", key_mapping={{"^{prefix}": "model."}}', "save_original_format=False"
        advice = (
            f"AutoModelForCausalLM.from_pretrained(FOLDER, {load}).save_pretrained(TO, {save}) writes that"
        )
        what = f"under {prefix}, as in a model that holds this one"
        if not prefix:  # transformers adds it, and draws a missing lm_head at random
            advice = (
                'AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto").save_pretrained(TO) writes that'
            )
            what = "without model., as AutoModel saves them"
            if not self.model.tied_embeddings and LOGITS not in self.files:
                advice = f"{LOGITS} is missing too"
        raise ValueError(
            f"{self.path} has its tensors {what} ({prefix}{suffix}), and {EMBEDDING} is needed: {advice}"
        )

    def _is_tied(self) -> bool:
        """Whether lm_head.weight is the embedding, as some checkpoints of tied embeddings hold it."""
        if EMBEDDING not in self.files:
            return False
        # Opened anew: pages that were read count as the process's memory until their file is closed.
        with (
            safe_open(self.paths[EMBEDDING], "numpy") as first,
            safe_open(self.paths[LOGITS], "numpy") as second,
        ):
            one, other = first.get_slice(EMBEDDING), second.get_slice(LOGITS)
            shape = one.get_shape()
            if one.get_dtype() != other.get_dtype() or shape != other.get_shape() or len(shape) != 2:
                return False
            rows = max(1, COMPARED // max(1, shape[1]))
            parts = (slice(begin, min(begin + rows, shape[0])) for begin in range(0, shape[0], rows))
            return all(np.array_equal(one[part], other[part]) for part in parts)


@contextmanager
def open_tensors(folder: PretrainedFolder, model: Model) -> Iterator[Tensors]:
    """Opens the files of a folder's weights, and closes them again.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is no whole safetensors file, holds other tensors than the index says; or the weights
        are pickles.
    """
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        paths: dict[str, Path] = {}
        for path, listed in folder.weight_files().items():
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing, which the index of the weights names")
            try:
                file = stack.enter_context(safe_open(path, "numpy"))
            except SafetensorError as error:
                raise ValueError(f"{path} is no whole safetensors file: {error}") from error
            names = set(file.keys())
            if listed is not None:
                _check_listed(path, names, set(listed))
            files |= dict.fromkeys(names, file)
            paths |= dict.fromkeys(names, path)
        yield Tensors(folder.path, model, files, paths)


def _check_listed(path: Path, names: set[str], listed: set[str]):
    """Refuses a file that holds other tensors than the index says."""
    if lacking := sorted(listed - names):
        raise ValueError(f"{path} lacks {lacking[0]}, which the index of the weights says it holds")
    if spare := sorted(name for name in names - listed if not name.endswith(BUFFERS)):
        raise ValueError(f"{path} holds {spare[0]}, which by the index of the weights is not there")


def stored_config(folder: PretrainedFolder) -> dict[str, Any]:
    """The object of config.json, its dtype that of the weights in the files; of several types float32."""
    with open_tensors(folder, Model()) as tensors:
        found = {
            file.get_slice(name).get_dtype()
            for name, file in tensors.files.items()
            if not name.endswith(BUFFERS)
        }
    config, names = folder.config(), {"BF16": "bfloat16", "F16": "float16"}
    dtype = names.get(found.pop(), "float32") if len(found) == 1 else "float32"
    field = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    return {**config, field: dtype}


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
