"""A trained model, to make text with or to export: from a run's folder or from a safetensors file."""

import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from train.checkpoint.checksums import leaves, shapes
from train.checkpoint.export import Weights, load_weights
from train.checkpoint.folder import RunFolder, rooted
from train.config.run import Run, from_json
from train.data.tokenizers import Tokenizer, load_tokenizer
from train.disk import reason
from train.step.program import program_of, state_like

SAFETENSORS = ".safetensors"


class OtherModel(ValueError):
    """A checkpoint that is whole, but not of the model that its run's config describes."""


def trained(source: Path, tokenizer: str | None = None) -> tuple[Weights, Tokenizer]:
    """A model and its tokenizer. Nothing is written, so that the run may be going on.

    Args:
      source: a run's folder, of which the newest whole checkpoint is taken, or a file of
        `python -m train export`. Of a run with `optimizer.ema` it is the running mean of the weights.
      tokenizer: where the tokenizer is; None: where the run found it.

    Raises:
      FileNotFoundError: there is no such folder or file, no checkpoint in it yet, or no tokenizer.
      ValueError: it cannot be read, or the tokenizer is another one than the model's.
    """
    if source.suffix == SAFETENSORS:
        weights = load_weights(source)
        return weights, _own_tokenizer(weights, tokenizer)
    if source.is_file():
        raise ValueError(f"{source} is neither a run's folder nor a {SAFETENSORS} file")
    folder = RunFolder(source)
    if not folder.config.is_file():
        raise FileNotFoundError(f"{source} holds no run: {folder.config} does not exist")
    try:
        run = from_json(folder.config.read_text())
    except ValueError as error:
        raise ValueError(f"{folder.config} is corrupted: {error}") from error
    own = load_tokenizer(tokenizer or run.data.tokenizer, run.data.end_token)
    folder = RunFolder.of(run, source)
    return Weights(run, _newest(folder, run, own.vocabulary), own.vocabulary, own.fingerprint), own


def _own_tokenizer(weights: Weights, name: str | None) -> Tokenizer:
    name = name or weights.run.data.tokenizer
    tokenizer = load_tokenizer(name, weights.run.data.end_token)
    if tokenizer.fingerprint != weights.fingerprint:
        raise ValueError(f"data.tokenizer: {name} is not the tokenizer that the model was trained with")
    return tokenizer


def _newest(folder: RunFolder, run: Run, vocabulary: int) -> Any:
    """The weights of the newest checkpoint that is whole; damaged ones are passed over with a warning."""
    if not (steps := folder.saved_steps):
        raise FileNotFoundError(f"{folder.path} holds no checkpoint yet")
    field = "params" if run.optimizer.ema is None else "ema"
    here = SingleDeviceSharding(jax.local_devices()[0])  # else orbax looks for the devices that saved it
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        {field: getattr(state_like(program_of(run, vocabulary), vocabulary), field)},
    )
    for step in reversed(steps):
        path = rooted(folder.checkpoints) / str(step)
        try:
            return _restored(path, like)[field]
        except (OtherModel, jax.errors.JaxRuntimeError, MemoryError):
            raise  # an older one would be of that model too, and as large
        except Exception as error:  # whatever the storage layers below raise
            warnings.warn(f"the checkpoint {path} is damaged ({reason(error)}): passed over", stacklevel=3)
    raise ValueError(f"none of the checkpoints in {folder.checkpoints} is whole")


def _restored(path: Path, like: dict[str, Any]) -> dict[str, Any]:
    """The fields `like` of a saved state; nothing else of it is read."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as about:
        saved = about.restore(path / "about")["leaves"]
    for name, needed in shapes(like).items():
        if name not in saved or saved[name][:2] != needed:
            there = "nothing" if name not in saved else "{}{}".format(*saved[name])
            raise OtherModel(
                f"the checkpoint {path} is of another model: {name}: {there} saved, "
                f"{needed[0]}{needed[1]} needed. Has the config or the tokenizer changed since?"
            )
    restore_args = ocp.checkpoint_utils.construct_restore_args(like)
    with ocp.PyTreeCheckpointer() as state:
        args = ocp.args.PyTreeRestore(item=like, restore_args=restore_args, partial_restore=True)
        found = jax.tree.map(jnp.asarray, state.restore(path / "state", args=args))
    if wrong := [name for name, leaf in leaves(found).items() if leaf != saved[name]]:
        raise ValueError(f"the numbers of {', '.join(wrong)} are not those that were saved")
    return found
