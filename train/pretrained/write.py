"""Writes weights as a Hugging Face folder."""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from train.config.model import Model
from train.disk import writing
from train.pretrained.folder import CONFIG, INDEX, WEIGHTS, PretrainedFolder
from train.pretrained.names import layout_of

LARGEST = 4 * 2**30
"""Bytes of tensors in a file, beyond which there are several."""
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


@dataclass(frozen=True)
class Contents:
    """What a folder is to hold.

    Attributes:
      model: the options of the model.
      params: all its weights, nested dictionaries of arrays.
      config: the object of config.json.
      dtype: the type that the weights are written in.
      files: other files by name, with the path that each is copied from or the text that it holds.
    """

    model: Model
    params: Any
    config: Mapping[str, Any]
    dtype: str
    files: Mapping[str, Path | str]


def check_target(to: Path, *, overwrite: bool = False):
    """Refuses a folder that `write_folder` would not write.

    Raises:
      FileExistsError: it exists, and `overwrite` is false; or it holds files, and is no folder that
        transformers saved.
      FileNotFoundError: the folder that it is to lie in does not exist.
    """
    if to.exists() and not overwrite:
        raise FileExistsError(f"{to} exists already: choose another folder, or --overwrite it")
    if to.exists() and PretrainedFolder.at(to) is None and not (to.is_dir() and not any(to.iterdir())):
        raise FileExistsError(
            f"{to} is no folder of a Hugging Face model, and --overwrite replaces no other: take another"
        )
    if not to.parent.is_dir():
        raise FileNotFoundError(f"{to} could not be written: there is no folder {to.parent}")


def write_folder(contents: Contents, to: Path, *, overwrite: bool = False, largest: int = LARGEST):
    """Writes a folder that transformers loads. It appears whole or not at all.

    Host memory holds the tensors of one file. A folder that is replaced stays until the new one is whole.

    Args:
      contents: what it holds.
      to: the folder.
      overwrite: replace the folder if it exists.
      largest: bytes of tensors in a file, beyond which there are several.

    Raises:
      OSError: it cannot be written, or `check_target` refuses it.
      ValueError: a weight is beyond float16, in which it is to be written.
    """
    check_target(to, overwrite=overwrite)
    fresh, old = to.with_name(to.name + ".writing"), to.with_name(to.name + ".replaced")
    with writing(to):
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            fresh.mkdir()
            _write_weights(contents, fresh, largest)
            (fresh / CONFIG).write_text(json.dumps(contents.config, indent=2) + "\n", encoding="utf-8")
            for name, source in contents.files.items():
                if isinstance(source, Path):
                    shutil.copyfile(source, fresh / name)
                else:
                    (fresh / name).write_text(source, encoding="utf-8")
            if to.is_symlink():
                to.unlink()
            elif to.exists():
                shutil.rmtree(old, ignore_errors=True)  # left by one that was killed
                to.rename(old)
            fresh.rename(to)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def _write_weights(contents: Contents, folder: Path, largest: int):
    size = np.dtype(DTYPES[contents.dtype]).itemsize
    parts = list(_parts(contents, largest // size))
    if len(parts) == 1:
        _save(contents, parts[0], folder / WEIGHTS)
        return
    listed: dict[str, str] = {}
    for number, leaves in enumerate(parts, start=1):
        name = f"model-{number:05}-of-{len(parts):05}.safetensors"
        listed |= dict.fromkeys(_save(contents, leaves, folder / name), name)
    total = size * sum(leaf.size for leaf in jax.tree.leaves(contents.params))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(listed.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _parts(contents: Contents, largest: int) -> Iterator[list[tuple[str, Any]]]:
    """The arrays of each file, with their paths: as many as fit, or a single one."""
    part: list[tuple[str, Any]] = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(contents.params):
        if part and sum(other.size for _, other in part) + leaf.size > largest:
            yield part
            part = []
        part.append((jax.tree_util.keystr(path, simple=True, separator="."), leaf))
    yield part


def _save(contents: Contents, leaves: list[tuple[str, Any]], path: Path) -> list[str]:
    """Writes a file of these arrays; returns the names of its tensors."""
    tensors = {
        name: _cast(name, tensor, contents.dtype)
        for ours, leaf in leaves
        for name, tensor in layout_of(ours, contents.model).to_theirs(np.asarray(leaf))
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return list(tensors)


def _cast(name: str, tensor: np.ndarray, dtype: str) -> np.ndarray:
    """The tensor in another type. Only float16 is too narrow for a weight."""
    with np.errstate(over="ignore"):
        cast = tensor.astype(DTYPES[dtype], copy=False)
    if dtype == "float16" and np.isinf(cast).any() and not np.isinf(tensor).any():
        most = np.abs(tensor).max()
        raise ValueError(
            f"dtype: {name} has a weight of {most:.3g}, and float16 ends at 65,504: take bfloat16"
        )
    return cast
