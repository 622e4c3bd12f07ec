"""The training loop, from a config to a finished run folder."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from train import metrics
from train.checkpoint import Checkpoints
from train.config import Run
from train.data import Corpus, corpus, held_out_rows
from train.folder import RunFolder
from train.metrics import Log
from train.picture import draw
from train.step import Program, State, begin
from train.summary import Summary


@dataclass(frozen=True)
class Session:
    """A run that is ready to go on from `state`."""

    run: Run
    folder: RunFolder
    corpus: Corpus
    program: Program
    state: State


def prepare(run: Run, *, resume: bool = False, overwrite: bool = False) -> Session:
    """Reads the text, builds the model, and claims the run's folder or takes its latest checkpoint.

    All that a caller can have wrong is refused here, before anything is trained or overwritten.

    Args:
      run: the config.
      resume: continue the run in its folder.
      overwrite: replace the run in its folder, unless `resume`.

    Raises:
      FileNotFoundError: a path without text, or no run or checkpoint to resume.
      FileExistsError: the folder holds a run, and neither `resume` nor `overwrite` is set.
      ValueError: too little text, a config that contradicts itself or the folder's, or a checkpoint
        that cannot be read.
    """
    folder = RunFolder(Path(run.folder) / run.name)
    if resume:
        folder.check_same(run)
    program, state = begin(run)
    text = corpus(run.data, run.seed)
    if resume:
        with Checkpoints(folder.checkpoints, run.keep) as checkpoints:
            state = checkpoints.restore(state)
        metrics.rewind(folder.metrics, int(state.step))
    else:
        folder.begin(run, overwrite=overwrite)
    return Session(run, folder, text, program, state)


def train(session: Session) -> Summary:
    """Trains to the run's last step; writes metrics, checkpoints and the picture as it goes.

    Returns:
      the whole run's summary, what came before a resumption included.
    """
    run, program, state = session.run, session.program, session.state
    train_step = jax.jit(program.train_step, donate_argnums=0)
    validate = _Validation(session)
    with ExitStack() as stack:
        start = int(state.step)
        bar = stack.enter_context(tqdm(initial=start, total=run.steps, unit="step"))
        log = stack.enter_context(Log(session.folder.metrics, run.data.batch * run.data.length, bar))
        checkpoints = stack.enter_context(Checkpoints(session.folder.checkpoints, run.keep))
        if start == 0:
            with log.paused():
                log.validation(0, validate(state))
        for step in range(start, run.steps):
            state, measured = train_step(state, session.corpus.train[step])
            log.step(step, measured)
            done = step + 1
            if _due(done, run.evaluate_every, run.steps):
                with log.paused():
                    log.validation(done, validate(state))
            if _due(done, run.checkpoint_every, run.steps):
                with log.paused():
                    checkpoints.save(state)
    records = metrics.read(session.folder.metrics)
    draw(records, program.growth, run, session.folder.picture)
    # JAX has no public count of what a jitted function has compiled.
    compilations = train_step._cache_size()  # pyright: ignore[reportAttributeAccessIssue]
    return Summary(records, compilations)


class _Validation:
    """The mean loss over held-out rows at the full mask, in nats a token."""

    def __init__(self, session: Session):
        self._step = jax.jit(session.program.evaluation_step)
        self._rows = held_out_rows(session.corpus.held_out, session.run.evaluate_rows)

    def __call__(self, state: State) -> float:
        return float(np.mean([self._step(state.params, row) for row in self._rows]))


def _due(steps_done: int, every: int, last: int) -> bool:
    return steps_done == last or (every > 0 and steps_done % every == 0)
