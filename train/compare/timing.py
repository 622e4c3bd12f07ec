"""The time of a step at each window: measured once, alone; and the seconds of a run, integrated over it."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter

import jax
import jax.numpy as jnp
import numpy as np

from dynmask_jax.array_typing import Float
from train.compare.experiment import Experiment
from train.compare.machine import Machine
from train.config.command_line import command
from train.config.run import Run
from train.config.sections import Curriculum
from train.data.corpus import read_corpus
from train.disk import write_atomically
from train.step.curriculum import growth
from train.step.program import begin

MOST = 2**16
"""Steps of a run whose windows are summed over; of a longer run, so many of them, evenly spaced."""


def family(curriculum: Curriculum) -> str:
    """The masks that a curriculum moves through: two with the same one share their times.

    >>> from train.config.sections import Curriculum
    >>> family(Curriculum(kind="static", chunk=256)), family(Curriculum(kind="reveal", order="oldest"))
    ('chunks', 'reveal-oldest-256')
    """
    if curriculum.kind == "reveal":
        return f"reveal-{curriculum.order}-{curriculum.chunk}"
    return "chunks" if curriculum.kind == "static" else curriculum.kind


@dataclass(frozen=True)
class Timing:
    """Seconds of a train step, by family of masks and window.

    Attributes:
      families: name -> window in tokens -> the median seconds of a step.
      machine: that they were measured on.
      core: that the process was pinned to; None: it was not.
      load: processes that ran or waited for a core, this one among them, on average over the last minute of
        the measurement; None: not known. If it is well above 1, the machine had other load, and the times are
        too long.
      run: the command of the run that was timed, without curriculum and steps; empty: not known.
    """

    families: Mapping[str, Mapping[int, float]]
    machine: Machine
    core: int | None = None
    load: float | None = None
    run: str = ""

    def step_seconds(self, curriculum: Curriculum, windows: Float[np.ndarray, " n"]) -> np.ndarray:
        """Seconds of a step at each window: between two that were measured, on the line between them."""
        measured = self.families[family(curriculum)]
        return np.interp(windows, list(measured), list(measured.values()))

    def seconds(self, run: Run, done: Sequence[float] | None = None) -> np.ndarray:
        """Seconds that the first steps of a run take, for each number of steps in `done`; None is all.

        Evaluation, checkpoints and compilation are no part of it.
        """
        grown = growth(run)
        count = min(run.steps, MOST)
        at = np.floor((np.arange(count) + 0.5) * run.steps / count)
        # As many as the next power of two, so that runs of many lengths share what JAX compiles.
        padded = np.resize(at, 2 ** (count - 1).bit_length())
        windows = jax.vmap(lambda step: jnp.asarray(grown.window(step)))(jnp.asarray(padded, jnp.int32))
        each = self.step_seconds(run.curriculum, np.asarray(windows, np.float64)[:count])
        total = np.concatenate([[0.0], np.cumsum(each)]) * run.steps / count
        done = [run.steps] if done is None else done
        return np.interp(done, np.arange(count + 1) * run.steps / count, total)

    def fit_steps(self, run: Run, seconds: float) -> int:
        """The most steps whose seconds do not exceed these, with the schedule that they have; at least 1."""

        def within(steps: int) -> bool:
            return self.seconds(replace(run, steps=steps))[0] <= seconds * (1 + 1e-9)

        fastest = min(self.families[family(run.curriculum)].values())
        least, most = 1, max(1, int(seconds / fastest * (1 + 1e-9)))
        while least < most:
            middle = (least + most + 1) // 2
            least, most = (middle, most) if within(middle) else (least, middle - 1)
        return least

    def to_json(self) -> str:
        """The file `NAME.timing.json`."""
        saved = {
            "families": self.families,
            "machine": vars(self.machine),
            "core": self.core,
            "load": self.load,
            "run": self.run,
        }
        return json.dumps(saved, indent=1) + "\n"


def read_timing(path: Path) -> Timing:
    """The times of a file.

    Raises:
      OSError: it cannot be read.
      ValueError: it holds no times.
    """
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        families = {
            name: {int(window): float(seconds) for window, seconds in times.items()}
            for name, times in saved["families"].items()
        }
        machine, run = Machine(**saved["machine"]), saved.get("run", "")
        return Timing(families, machine, saved["core"], saved["load"], run)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no times of steps: {error!r}") from error


def time_steps(experiment: Experiment, path: Path, core: int | None) -> Timing:
    """Measures the time of a step for each family of the arms that lacks it, and writes all.

    The windows are measured in turn, over and over, so that whatever slows the machine for a while slows all;
    the median of each counts. A step's time includes its batch, as it does in training.

    Args:
      experiment: whose arms are timed.
      path: of the file.
      core: that this process is pinned to.

    Raises:
      ValueError: the file has times of another machine, or of another run.
    """
    before = read_timing(path) if path.exists() else None
    check_run(experiment, before)
    here = Machine.here()
    if before is not None and before.machine != here:
        raise ValueError(f"{path} has times of another machine: {before.machine}, and this is {here}")
    known = {} if before is None else dict(before.families)
    runs = _by_family(experiment)
    for name in lacking(experiment, before):
        known[name] = _timed(runs[name][0], _windows(experiment, runs[name]), experiment.timed_steps)
    timing = Timing(known, here, core, round(os.getloadavg()[0], 2), _timed_run(experiment))
    write_atomically(path, timing.to_json())
    return timing


def check_run(experiment: Experiment, timing: Timing | None):
    """Refuses times of another run than the experiment asks for now.

    Raises:
      ValueError: with the commands of both.
    """
    asked = _timed_run(experiment)
    if timing is not None and timing.run not in ("", asked):
        raise ValueError(
            f"the times of steps are of another run than the experiment asks for: give it another name, or "
            f"remove {experiment.name}.timing.json. They were of {timing.run}; it would be {asked}"
        )


def _timed_run(experiment: Experiment) -> str:
    """The command of the experiment's run, with the defaults of what changes no step's time at a window."""
    default = Run(curriculum=Curriculum(kind="full", start=1))
    names = ("name", "folder", "steps", "curriculum", "evaluation", "generation", "checkpoints", "watch")
    return command(replace(experiment.base, **{name: getattr(default, name) for name in names}))


def lacking(experiment: Experiment, timing: Timing | None) -> list[str]:
    """The families of the experiment's arms that have no times yet, or none of a window as small."""
    measured = {} if timing is None else timing.families
    return [
        name
        for name, runs in _by_family(experiment).items()
        if name not in measured or min(measured[name]) > min(_windows(experiment, runs))
    ]


def _by_family(experiment: Experiment) -> dict[str, list[Run]]:
    """The arms' runs, by their family of masks."""
    families: dict[str, list[Run]] = {}
    for arm in experiment.arms:
        run = arm.apply(experiment.base)
        families.setdefault(family(run.curriculum), []).append(run)
    return families


def _windows(experiment: Experiment, runs: Sequence[Run]) -> list[int]:
    """The windows to measure for runs of one family: evenly spaced on a logarithmic scale, with both ends and
    the chunks of static runs."""
    length = experiment.base.data.length
    if runs[0].curriculum.kind == "full":
        return [length]
    fixed = {each.chunk for run in runs if (each := run.curriculum).kind == "static"}
    starts = {each.start for run in runs if (each := run.curriculum).kind != "static"}
    spaced = np.geomspace(min(fixed | starts), length, experiment.windows).round().astype(int).tolist()
    return sorted({*fixed, *starts, *spaced, length})


def _timed(run: Run, windows: Sequence[int], repeats: int) -> dict[int, float]:
    """The median seconds of a step at each window."""
    corpus = read_corpus(run)
    program, state = begin(run, corpus.tokenizer.vocabulary)
    by_step = growth(run, window=jnp.asarray)  # one program, whose step is its window
    program = replace(program, masks=replace(program.masks, growth=by_step))
    train_step = jax.jit(program.train_step, donate_argnums=0)
    seconds: dict[int, list[float]] = {window: [] for window in windows}
    with closing(corpus.batches()) as batches:
        for turn in range(repeats + 1):
            for window in windows:
                state = replace(state, step=jnp.asarray(window, jnp.int32))
                since = perf_counter()
                state, metrics = train_step(state, next(batches))
                jax.block_until_ready((state, metrics))
                if turn:  # the first compiles
                    seconds[window].append(perf_counter() - since)
    return {window: median(each) for window, each in seconds.items()}
