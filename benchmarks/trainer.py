"""The trainer's own loop beside its bare train step, at the start of a curriculum and at its end.

A round is a whole short run of `python -m train`, with its input pipeline, metrics, TensorBoard and
checkpoint, followed by the same number of bare steps on one batch that is held in memory. What the run
takes longer is the trainer's overhead.
"""

import itertools
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter

import jax
import jax.numpy as jnp

from benchmarks.markdown import seconds, share, table
from train.config.operation import Evaluation
from train.config.run import Run
from train.config.sections import Curriculum, Data, Model
from train.loop.prepare import Session, prepare
from train.loop.training import train
from train.metrics import log
from train.metrics.record import StepRecord


@dataclass(frozen=True)
class Settings:
    """A model, and a run of it.

    Attributes:
      steps: timed at the first window, and as many at the full mask, in each round.
      window: tokens, of the first steps.
      block: tokens in a block of the plan.
    """

    tokens: int = 8_192
    layers: int = 4
    width: int = 256
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 704
    steps: int = 4
    window: int = 512
    block: int = 512

    def run(self, folder: Path) -> Run:
        """The first half at the window, the second at the full mask: a staircase of one stair."""
        return Run(
            folder=str(folder),
            steps=2 * self.steps + 2,  # the first compiles, and the last is read after its validation
            block=self.block,
            model=Model(self.layers, self.width, self.heads, self.kv_heads, self.hidden),
            data=Data(length=self.tokens),
            curriculum=Curriculum("window", "staircase", self.window, share=0.5, stairs=1),
            evaluation=Evaluation(rows=1),
        )


QUICK, FULL = Settings(tokens=2_048, layers=2), Settings()


def measure(settings: Settings, repeats: int) -> dict:
    """Seconds of a step in the loop and bare, at the window and at the full mask; and waiting for input."""
    loop: dict[int, list[float]] = {settings.window: [], settings.tokens: []}
    bare: dict[int, list[float]] = {settings.window: [], settings.tokens: []}
    waited = []
    with tempfile.TemporaryDirectory() as folder, _compiling_once(Path(folder) / "compiled"):
        run, bare_step = settings.run(Path(folder)), None
        for _ in range(repeats):
            session = prepare(run, overwrite=True)
            bare_step = bare_step or _bare_step(session, run)
            records = _records(session)
            for record in records:
                loop[record.window].append(record.seconds)
                waited.append(record.input_seconds / record.seconds)
            for window, clock in ((settings.window, 0), (settings.tokens, run.steps)):
                bare[window] += itertools.islice(bare_step(clock), settings.steps)
    return {
        "settings": asdict(settings),
        "loop": {window: median(times) for window, times in loop.items()},
        "bare": {window: median(times) for window, times in bare.items()},
        "input_share": median(waited),
    }


def _records(session: Session) -> list[StepRecord]:
    """What a run wrote of its steps, but of the first, which compiles, and the last."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):  # the progress bar
        train(session)
    steps = [record for record in log.read(session.folder.metrics) if isinstance(record, StepRecord)]
    return steps[1:-1]


def _bare_step(session: Session, run: Run):
    """`clock -> seconds of one step after another`, on one batch, each from the state the last one gave."""
    step = jax.jit(session.program.train_step, donate_argnums=0)
    state = jax.tree.map(jnp.copy, session.state)
    batch = jax.device_put(next(session.corpus.batches()))

    def timed(clock: int) -> Iterator[float]:
        nonlocal state
        for number in itertools.count():
            state = replace(state, step=jnp.int32(clock))
            start = perf_counter()
            state, found = step(state, batch)
            jax.block_until_ready(found)
            if number:  # the first fills caches, or compiles
                yield perf_counter() - start

    return timed


@contextmanager
def _compiling_once(folder: Path) -> Iterator[None]:
    """Each run is a program of its own; only the first is compiled."""
    before = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_compilation_cache_dir", str(folder))
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def section(results: dict) -> str:
    """The results as Markdown."""
    settings = Settings(**results["settings"])
    rows = []
    full = results["loop"][str(settings.tokens)]
    for window, loop in results["loop"].items():
        bare = results["bare"][window]
        rows.append(
            [
                f"window {int(window):,}",
                seconds(loop),
                share(loop / full),
                seconds(bare),
                share(loop / bare - 1),
            ]
        )
    columns = ["train step", "in the trainer's loop", "of the full mask's", "bare", "overhead"]
    return (
        f"{settings.layers} layers of width {settings.width}, {settings.heads} heads, one packed row of "
        f"{settings.tokens:,} bytes, blocks of {settings.block}, float32. The loop reads its text through "
        f"grain, and writes metrics.jsonl, TensorBoard and a checkpoint; bare is the same compiled step on a "
        f"batch in memory. Waiting for input takes {results['input_share']:.2%} of a step.\n\n"
        f"{table(columns, rows)}"
    )
