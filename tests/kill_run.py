"""Kills a run over and over at random moments, and compares what it comes to with a run left alone.

    python tests/kill_run.py --kills 20

Each time the very same command is given again. Printed is what happened at each kill, and the verdict;
the exit status is 1 where anything differs.
"""

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import grain
import jax
import numpy as np

from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.folder import RunFolder
from train.cli import main as train_main
from train.cli import parse
from train.config.run import Run
from train.data.corpus import read_corpus
from train.metrics.log import read
from train.step.program import begin
from train.step.state import State

ROOT = Path(__file__).parent.parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train.cli"])  # imports take longer than the runs
AIMS = ("saving", "training", "starting", "just saved")
TIMED = ("seconds", "input_seconds", "tokens_per_second", "mfu")


@dataclass(frozen=True)
class Case:
    """A tiny run, in a folder of its own.

    Attributes:
      folder: where the text, the compilation cache and the run folders lie.
      name: of the run.
      steps: of the run.
      rows: packed or chunked.
      optimized: whether XLA optimizes its programs, which takes longer than to run them.
    """

    folder: Path
    name: str
    steps: int
    rows: str
    optimized: bool = True

    @property
    def arguments(self) -> list[str]:
        """What is typed after `python -m train`."""
        text = self.folder / "words.txt"
        if not text.exists():
            write_documents(text)
        return [
            *("run", "--name", self.name, "--folder", str(self.folder), "--data.paths", str(text)),
            *("--steps", str(self.steps), "--block", "8", "--data.length", "32", "--data.batch", "2"),
            *("--data.rows", self.rows, "--model.layers", "1", "--model.width", "16", "--model.heads", "2"),
            *("--model.kv-heads", "1", "--model.hidden", "16", "--model.backend", "dense"),
            *("--optimizer.ema", "0.9", "--curriculum.start", "4", "--curriculum.pace", "loss"),
            *("--curriculum.stages", "3", "--curriculum.patience", "2", "--evaluation.every", "4"),
            *("--evaluation.rows", "2", "--checkpoints.every", "3", "--watch.peak-flops", "1e9"),
        ]

    @property
    def run(self) -> Run:
        """The config."""
        return parse(self.arguments).run

    @property
    def where(self) -> RunFolder:
        """The run's folder."""
        return RunFolder(self.folder / self.name)

    def start(self, coordinator: str | None = None) -> BaseProcess:
        """The command, under way. What it prints is added to a file beside the run folders.

        Args:
          coordinator: the address of `jax.distributed`, which is used where there is one.
        """
        process = FORKS.Process(target=_command, args=(self, coordinator))
        # The server that processes are forked from begins with the first, and imports as this one does.
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
        process.start()
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
        return process

    def finish(self):
        """Gives the command, and waits for its end."""
        process = self.start()
        process.join()
        if process.exitcode:
            raise RuntimeError(f"the command failed: {self.printed[-2_000:]}")

    @property
    def printed(self) -> str:
        """All that the command printed so far, every time."""
        return (self.folder / f"{self.name}.out").read_text()

    def saves(self) -> tuple[set[str], bool]:
        """The steps with a whole checkpoint, and whether one is being written."""
        folder = self.where.checkpoints
        names = {path.name for path in folder.iterdir()} if folder.exists() else set()
        return {name for name in names if name.isdecimal()}, any("tmp" in name for name in names)


def _command(case: Case, coordinator: str | None):
    """What a process does: `python -m train` with the case's arguments."""
    with (case.folder / f"{case.name}.out").open("a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_disable_most_optimizations", not case.optimized)
    jax.config.update("jax_compilation_cache_dir", str(case.folder / "jax_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if coordinator is not None:
        jax.distributed.initialize(coordinator, num_processes=1, process_id=0)
    train_main(case.arguments)


def write_documents(path: Path):
    """Some 20,000 bytes of words that repeat."""
    words = random.Random(0).choices(["mask", "key", "query", "step"], k=4_000)
    path.write_text(" ".join(words))


def kill(case: Case, aim: str, chance: random.Random) -> str | None:
    """Starts the command and kills it at a moment of the kind; what happened, or None if it ended first."""
    before, _ = case.saves()
    process, began = case.start(), time.perf_counter()
    delay = {"starting": 2.0, "training": 0.3, "saving": 0.02, "just saved": 0.01}[aim] * chance.random()
    while process.is_alive() and not _reached(case, aim, before):
        time.sleep(0.0005)
    time.sleep(delay)
    process.kill()
    process.join()
    if process.exitcode == 0:
        return None
    if process.exitcode != -signal.SIGKILL:
        raise RuntimeError(f"the command failed with status {process.exitcode}: {case.printed[-2_000:]}")
    steps = [record.step for record in read(case.where.metrics)]
    whole, writing = case.saves()
    return (
        f"{aim}: after {time.perf_counter() - began:.2f} s, {max(steps, default=0)} steps recorded, "
        f"checkpoints {', '.join(sorted(whole, key=int)) or 'none'}"
        f"{' and one half-written' if writing else ''}"
    )


def _reached(case: Case, aim: str, before: set[str]) -> bool:
    whole, writing = case.saves()
    new = bool(whole - before)
    return {"starting": True, "training": new, "saving": writing and new, "just saved": new}[aim]


def ended(run: Run) -> tuple[State, grain.DatasetIterator]:
    """The state that a run ended with, and its data from there on."""
    texts = read_corpus(run)
    _, like = begin(run, texts.tokenizer.vocabulary)
    batches, where = texts.batches(), RunFolder(Path(run.folder) / run.name)
    with Checkpoints(where.checkpoints, run, texts.fingerprint) as checkpoints:
        state = checkpoints.resume(like, batches)
    if state is None or int(state.step) != run.steps:
        raise RuntimeError(f"no checkpoint of step {run.steps} in {where.checkpoints}")
    return state, batches


def differences(stopped: Run, alone: Run) -> list[str]:
    """What is not bit for bit the same at the end of two runs; empty, if all is well."""
    (state, batches), (expected, ahead) = ended(stopped), ended(alone)
    leaves = zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(expected), strict=True)
    found = [
        f"state{jax.tree_util.keystr(path)}"
        for (path, ours), theirs in leaves
        if np.asarray(ours).tobytes() != np.asarray(theirs).tobytes()
    ]
    if batches.get_state() != ahead.get_state():
        found.append("the position of the data")
    for number in range(5):
        same = jax.tree.map(np.array_equal, next(batches), next(ahead))
        if not all(jax.tree.leaves(same)):
            found.append(f"batch {number} after the end")
    for each in (batches, ahead):
        each.close()
    if untimed(stopped) != untimed(alone):
        found.append("the records of the metrics")
    return found


def untimed(run: Run) -> list[dict]:
    """The records of a run's metrics, without what a clock measured."""
    return [
        {key: value for key, value in record.to_json().items() if key not in TIMED}
        for record in read(Path(run.folder) / run.name / "metrics.jsonl")
    ]


def rehearse(alone: Case, kills: int, seed: int) -> tuple[list[str], list[str]]:
    """Kills a run so often that is otherwise the one that is left `alone`, and has ended.

    Returns:
      what happened at each kill, and the differences at the end.
    """
    chance, happened = random.Random(seed), []
    killed = replace(alone, name="killed")
    aims = [AIMS[i % len(AIMS)] for i in range(kills)]
    chance.shuffle(aims)
    for number, aim in enumerate(aims, start=1):
        if (outcome := kill(killed, aim, chance)) is None:
            raise RuntimeError(f"the run ended before kill {number} of {kills}")
        happened.append(outcome)
        print(f"kill {number}, {outcome}", flush=True)
    killed.finish()
    return happened, differences(killed.run, alone.run)


def long_enough(kills: int) -> int:
    """Steps of a run that lasts for so many kills."""
    return 30 + 15 * kills


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", choices=["packed", "chunked"], default="packed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        alone = Case(Path(folder), "alone", long_enough(options.kills), options.rows)
        alone.finish()
        happened, different = rehearse(alone, options.kills, options.seed)
    if different:
        print(f"after {len(happened)} kills these differ: {', '.join(different)}")
        raise SystemExit(1)
    print(
        f"after {len(happened)} kills the state (weights, optimizer, pace, running mean, key), the data's "
        "position, the next batches and the metrics are bit for bit those of a run left alone"
    )


if __name__ == "__main__":
    main()
