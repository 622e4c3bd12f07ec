"""From a config to a run that is ready to go on: everything that can be refused is refused here."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.checksums import shapes
from train.checkpoint.export import origin_of
from train.checkpoint.folder import RunFolder, pretrained_files
from train.checkpoint.load import load_model
from train.checkpoint.restore import FROZEN
from train.config.run import Run
from train.data.corpus import Corpus, read_corpus
from train.data.pair_layout import Conventions
from train.data.tokenizers import Tokenizer
from train.disk import check_space, check_writable
from train.metrics import log, writers
from train.model.lora import split_lora
from train.parallel.processes import Processes, check_shared
from train.parallel.sharding import Placement
from train.pretrained.config import model_of
from train.pretrained.folder import PretrainedFolder
from train.pretrained.read import open_tensors, stored_config
from train.pretrained.run import check_agreement
from train.step.program import Program, begin
from train.step.state import State
from train.step.trainable import WeightCounts, join_weights, split_weights


@dataclass(frozen=True)
class Session:
    """A run that is ready to go on from `state`, with `batches` at the same place. Training uses both up."""

    folder: RunFolder
    corpus: Corpus
    program: Program
    state: State
    batches: grain.DatasetIterator
    processes: Processes

    @property
    def run(self) -> Run:
        """The config."""
        return self.program.run

    @property
    def counts(self) -> WeightCounts:
        """How much of the model trains, and what the optimizer's state takes."""
        return WeightCounts.of(self.state)

    @property
    def opening(self) -> str:
        """Where the run stands, in a line."""
        done, steps, where = int(self.state.step), self.run.steps, self.folder.path
        if done == steps:
            more = "more --steps extend it, --overwrite begins it anew"
            return f"The run in {where} is finished, all its {steps:,} steps; {more}."
        there, taken = jax.device_count(), self.run.mesh.size
        shard = "--mesh.data, fsdp, context and tensor shard it"
        devices = f" It takes {taken} of the {there} devices; {shard}." if there > taken else ""
        if (processes := self.processes.count) > 1:
            devices = f" It takes {taken} devices, of {processes} processes."
        if done:
            return f"The run in {where} goes on after step {done:,} of {steps:,}.{devices}"
        source = "" if self.run.init_from is None else f", with the weights of {self.run.init_from}"
        return f"A run of {steps:,} steps begins in {where}{source}.{devices}"


def prepare(run: Run, *, overwrite: bool = False, processes: Processes | None = None) -> Session:
    """Reads the texts, builds the model, and claims the run's folder or takes its newest checkpoint.

    All that a caller can have wrong is refused here, before anything is trained or overwritten.

    Args:
      run: the config.
      overwrite: begin anew where the folder holds a run, which is removed.
      processes: those of the run, where there are several; by default as JAX knows them. What one of them
        refuses, it alone raises: see `Processes.end_together`.

    Raises:
      OSError: texts are missing; or the folder cannot be written to, lies on a disk with too little
        space, or is in use by another process.
      ValueError: the texts or the config are wrong; the folder's run is of another config, of other
        texts, or without a checkpoint that is whole; or the processes were started with different ones.
      ImportError: a library is missing that the config asks for.
    """
    processes = processes or Processes.current()
    processes.check_same(run, overwrite=overwrite)
    folder = RunFolder.of(run)
    processes.call_on_first(lambda: _check_folder(folder, run, overwrite))
    check_shared((folder.elsewhere or folder.path).parent, processes)
    placement = Placement.of(run.mesh)
    tokenizer = None if overwrite else folder.load_tokenizer(run)
    texts = read_corpus(run, tokenizer, _conventions(folder, run, overwrite))
    texts.tokenizer.check_fits(run.model.vocabulary(texts.tokenizer.vocabulary))
    processes.check_equal(texts.fingerprint, "data.paths: the texts")
    program, state = begin(run, texts.tokenizer.vocabulary, placement)
    batches = texts.batches()
    with ExitStack() as claim:
        goes_on = processes.call_on_first(lambda: _claim(claim, folder, run, state, overwrite))
        restored = _restored(folder, run, texts, state, batches, processes) if goes_on else None
        done = None if restored is None else int(restored.step)
        if restored is None:
            state = _initialized(state, texts.tokenizer, run)
        processes.call_on_first(lambda: _begin(folder, run, done))
    # Bound to its devices, as a restored one is: the very same program is compiled for both.
    state = restored or jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, state))
    return Session(folder, texts, program, state, batches, processes)


def _check_folder(folder: RunFolder, run: Run, overwrite: bool):
    """What is refused before the texts are read, which may take long."""
    check_writable(folder.path)
    if folder.elsewhere and not folder.in_bucket:
        check_writable(folder.elsewhere, "checkpoints.folder")
    if not overwrite:
        folder.holds(run)
    elif run.init_from is not None and Path(run.init_from).resolve().is_relative_to(folder.path.resolve()):
        raise ValueError(
            f"init_from: {run.init_from} lies in the run's own folder, which --overwrite removes: give the "
            "new run another --name"
        )
    writers.check(run)


def _conventions(folder: RunFolder, run: Run, overwrite: bool) -> Conventions:
    """What the Hugging Face folder that the run begins from says of texts, by the files that it keeps."""
    kept = None if overwrite else pretrained_files(folder.path)
    if kept is None and run.init_from is not None:
        kept = pretrained_files(origin_of(Path(run.init_from)))
    return Conventions() if kept is None else kept.conventions()


def _claim(stack: ExitStack, folder: RunFolder, run: Run, state: State, overwrite: bool) -> bool:
    """Whether the folder, which is claimed until the stack is left, holds the run to go on with."""
    folder.path.mkdir(parents=True, exist_ok=True)
    stack.enter_context(folder.lock())
    if folder.elsewhere and not folder.in_bucket:
        folder.elsewhere.parent.mkdir(parents=True, exist_ok=True)
    _check_space(folder, run, state)
    return not overwrite and folder.holds(run)  # another process may have been here meanwhile


def _begin(folder: RunFolder, run: Run, done: int | None):
    """Readies the folder for a run that goes on after so many steps; None: it is new, or was killed before
    its first checkpoint."""
    if done is None:
        folder.begin(run)
        if run.init_from is not None:
            _keep_companions(Path(run.init_from), folder)
    else:
        folder.resume(run)
        log.rewind(folder.metrics, done)


def _keep_companions(source: Path, folder: RunFolder):
    """Copies config and tokenizer of a Hugging Face folder, or of the one that a run or file came from."""
    source = origin_of(source)
    if (files := pretrained_files(source)) is not None:
        config = stored_config(files) if files.path == source else files.config()
        files.copy_companions(folder.pretrained, config)


def _restored(
    folder: RunFolder,
    run: Run,
    text: Corpus,
    fresh: State,
    batches: grain.DatasetIterator,
    processes: Processes,
) -> State | None:
    """The state of the newest whole checkpoint, or None where there is none. Uses up the fresh one."""
    with Checkpoints(folder.checkpoints, run, text.fingerprint, processes) as checkpoints:
        if not checkpoints.steps():
            return None
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, fresh)
        for leaf in jax.tree.leaves(fresh):  # there may not be room for two
            leaf.delete()
        return checkpoints.resume(like, batches)


def _initialized(state: State, tokenizer: Tokenizer, run: Run) -> State:
    """The state with the weights of `init_from`, where there is one, in place of random ones.

    Those of LoRA stay random.
    """
    if run.init_from is None:
        if run.lora.rank:
            raise ValueError(
                f"lora.rank {run.lora.rank} adds to weights that exist: name them with --init-from"
            )
        return state
    base, factors = split_lora(join_weights(state.params, state.frozen))
    given = _given_weights(run.init_from, base, tokenizer, run)
    params, frozen = split_weights(run, join_weights(given, factors))
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
    return replace(state, params=params, frozen=frozen, ema=ema)


def _given_weights(source: str, base: Any, tokenizer: Tokenizer, run: Run) -> Any:
    """The weights of a folder or a file in the places of `base`, whose arrays may be deleted."""
    if (folder := PretrainedFolder.at(Path(source))) is not None:
        return _pretrained(folder, base, run)
    weights, theirs = load_model(Path(source))
    if theirs.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"init_from: {source} has another tokenizer than data.tokenizer, {run.data.tokenizer}"
        )
    ours, given = shapes(base), shapes(weights.params)
    if different := [
        name for name in sorted(ours.keys() | given.keys()) if ours.get(name) != given.get(name)
    ]:
        raise ValueError(
            f"init_from: {source} is of another model than this run's, as {different[0]} shows: "
            f"{given.get(different[0], 'nothing')} there, {ours.get(different[0], 'nothing')} here"
        )
    check_agreement(run.model, weights.run.model, source)

    def placed(new, old):
        whole = np.asarray(new)
        return jax.make_array_from_callback(old.shape, old.sharding, lambda index: whole[index])

    return jax.tree.map(placed, weights.params, base)


def _pretrained(folder: PretrainedFolder, base: Any, run: Run) -> Any:
    """The weights of a Hugging Face folder, each in the place of a random one, which is deleted."""
    check_agreement(run.model, model_of(folder.config()), str(folder.path))
    theirs = folder.find_tokenizer()
    if theirs is not None and theirs.read_bytes() != Path(run.data.tokenizer).read_bytes():
        raise ValueError(
            f"init_from: {folder.path} has another tokenizer than data.tokenizer, {run.data.tokenizer}"
        )

    def read(path, old):
        old.delete()  # there may not be room for two
        return tensors.array(path, old)

    with open_tensors(folder, run.model) as tensors:
        tensors.check(base)
        return jax.tree.map_with_path(read, base)


def _check_space(folder: RunFolder, run: Run, state: State):
    """Refuses a disk that cannot take the checkpoints that are kept, and one more while it is written."""
    if folder.in_bucket:
        return
    count = max(run.checkpoints.keep + 1 - len(folder.saved_steps), 1)
    once, whole = (sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (state.frozen, state))
    each = whole - once
    once = 0 if (folder.checkpoints / FROZEN).exists() else once
    purpose = f"{count} more checkpoints (checkpoints.keep)"
    check_space(
        folder.checkpoints.parent,
        count * each + once,
        purpose,
        "checkpoints.folder" if folder.elsewhere else "folder",
    )
