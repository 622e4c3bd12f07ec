"""The training loop, from a run that is ready to a finished run folder."""

from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter

import jax

from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.checksums import finite
from train.checkpoint.folder import RunFolder
from train.disk import WriteError
from train.evaluate.validation import Validator
from train.loop.finalize import Finalize
from train.loop.prepare import Session
from train.loop.signals import StopSignals
from train.metrics import log, mfu
from train.metrics.log import Log
from train.metrics.profile import Profile
from train.parallel.feed import place_batch
from train.report.outcome import Outcome
from train.step.layouts import Layouts
from train.step.pace import advance


class NotFinite(ValueError):
    """Too many steps in a row had a loss or gradient that was not finite."""


@dataclass(frozen=True)
class Interrupted:
    """A run that was asked to stop, and did, with a checkpoint of its last step."""

    reason: str
    step: int
    steps: int

    def __str__(self) -> str:
        return (
            f"{self.reason}: stopped after step {self.step:,} of {self.steps:,}, which is saved. "
            "The same command goes on from there."
        )


def train(session: Session) -> Outcome | Interrupted:
    """Trains to the run's last step; writes metrics, checkpoints and pictures as it goes.

    SIGTERM, or SIGINT, ends it after the step at hand, with a checkpoint.

    Returns:
      the outcome of the whole run, what came before a resumption included.

    Raises:
      NotFinite: so many steps in a row, as `optimizer.give_up` says, could not be taken.
      WriteError: a file could not be written, be it that the disk is full. The checkpoints before are
        whole, as they are after every error.
    """
    devices = session.program.placement.devices
    local = [device for device in devices if device.process_index == jax.process_index()]
    peak = mfu.peak(session.run.watch, session.run.model.dtype, dict.fromkeys([*local, *devices]))
    state, compilations = session.state, 0
    with closing(session.batches):
        if int(state.step) < session.run.steps:
            try:
                with ExitStack() as stack:
                    training = _Training(session, peak, stack)
                    interrupted = training.steps()
            except (WriteError, NotFinite) as error:
                raise type(error)(f"{error}; {_left(session.folder)}") from error
            if interrupted is not None:
                return interrupted
            state, compilations = training.state, training.compilations
    finalize = Finalize(session.folder, session.corpus, session.program, peak, session.processes)
    return finalize(state, compilations)


class _Training:
    """The steps that a session has left.

    Args:
      session: what to train.
      peak: what the devices can do.
      stack: closes, when it is left, what is open meanwhile.

    Attributes:
      state: after the last step that was taken.
    """

    def __init__(self, session: Session, peak: mfu.Peak, stack: ExitStack):
        run, program, text = session.run, session.program, session.corpus
        self.state, self._run, self._batches = session.state, run, session.batches
        processes = session.processes
        processes.call_on_first(lambda: stack.enter_context(session.folder.lock()))
        self._stop = stack.enter_context(StopSignals())
        self._checkpoints = stack.enter_context(
            Checkpoints(session.folder.checkpoints, run, text.fingerprint, processes)
        )
        self._log: Log = stack.enter_context(_opened_log(session, peak))
        watch = run.watch if processes.first else replace(run.watch, profile=None)
        self._profile = stack.enter_context(Profile(session.folder.profile, watch))
        self._place = partial(place_batch, program.placement.mesh)
        self._layouts = Layouts.of(program, text.held_out[0])
        processes.check_equal(" ".join(self._layouts.names), "mesh.layout: the layouts")
        self._stage = int(self.state.pace.stage)
        self._validator = Validator(program, text, self._layouts.full)
        self._train_step = jax.jit(program.train_step, donate_argnums=0)
        self._advance = jax.jit(partial(advance, options=run.curriculum))

    @property
    def compilations(self) -> int:
        """Of the train step, in this process."""
        # JAX has no public count of what a jitted function has compiled.
        return self._train_step._cache_size()  # pyright: ignore[reportAttributeAccessIssue]

    def steps(self) -> Interrupted | None:
        """Trains to the end, which is None, or to a signal."""
        run, start = self._run, int(self.state.step)
        if start == 0:
            self._validate(0)
        for step in range(start, run.steps):
            self._step(step)
            done = step + 1
            # What a checkpoint holds is after the validation of its step, which may move the curriculum.
            if _due(done, run.evaluation.every, run.steps):
                self._validate(done)
            reason = self._asked_to_stop(done)
            if reason or _due(done, run.checkpoints.every, run.steps):
                self._save(done, put_off=not reason and done < run.steps)
            if reason and done < run.steps:
                return Interrupted(reason, done, run.steps)
        return None

    def _step(self, step: int):
        since = perf_counter()
        rows = next(self._batches)  # while the device computes the step before
        batch = self._place(rows, self._layouts.order(step, self._stage))
        waited = perf_counter() - since
        self.state, measured = self._profile.step(step, self._train_step, self.state, batch)
        self._log.step(step, measured, waited)
        self._check_finite(step)  # of the step before, which the log has read
        self._checkpoints.check()

    def _asked_to_stop(self, done: int) -> str | None:
        preempted = "preempted" if self._checkpoints.reached_preemption(done) else None
        return self._stop.received or preempted

    def _validate(self, done: int):
        with self._log.paused():
            validation = self._validator(self.state)
            self._log.validation(done, **vars(validation))
        if done and validation.pace_loss is not None:
            pace = self._advance(self.state.pace, validation.pace_loss)
            self.state, self._stage = replace(self.state, pace=pace), int(pace.stage)

    def _save(self, done: int, *, put_off: bool):
        """Saves the state; not, if it may be put off, while steps are being skipped."""
        with self._log.paused():
            self._check_finite(done)
            if put_off and self._log.skipped_in_a_row:
                return
            if not finite((self.state.params, self.state.ema)):
                raise NotFinite(f"the weights after step {done:,} are not finite; they were not saved")
            self._checkpoints.save(self.state, self._batches)

    def _check_finite(self, done: int):
        """Gives up after `optimizer.give_up` skipped steps in a row, `done` steps having been read."""
        if (skipped := self._log.skipped_in_a_row) >= self._run.optimizer.give_up:
            raise NotFinite(
                f"the loss or gradient of steps {done - skipped:,} to {done - 1:,} was not finite, {skipped} "
                "in a row (optimizer.give_up), and none of them was taken. Lower optimizer.learning_rate or "
                "optimizer.clip, or lengthen optimizer.warmup, under another --name; raise optimizer.give_up "
                "to go on as it is"
            )


def _opened_log(session: Session, peak: mfu.Peak) -> Log:
    run, vocabulary = session.run, session.corpus.tokenizer.vocabulary
    return log.open_log(
        session.folder.path,
        run,
        int(session.state.step),
        work=mfu.work(run.model, vocabulary, session.state),
        peak=peak,
    )


def _left(folder: RunFolder) -> str:
    """What there is to go on from."""
    if not (steps := folder.saved_steps):
        return "there is no checkpoint yet: the same command begins anew"
    newest = folder.checkpoints / str(steps[-1])
    return f"the last good checkpoint is {newest}, and the same command goes on from it"


def _due(done: int, every: int, last: int) -> bool:
    return done == last or (every > 0 and done % every == 0)
