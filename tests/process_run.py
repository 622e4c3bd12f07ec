"""Runs of several real processes, each with its CPU devices, joined by `jax.distributed`."""

import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from signal import Signals

import jax
from kill_run import FORKS, ROOT, write_documents

from train import cli
from train.checkpoint.folder import RunFolder
from train.cli import parse
from train.config.run import Run
from train.loop import training
from train.parallel.initialize import OURS, join

STEPS = 12
LIMIT = 300
"""Seconds that a run may take, on a busy machine."""


@dataclass(frozen=True)
class Deviation:
    """How one process differs from the others.

    Attributes:
      words: options that only this process gets.
      folder: its working directory; None: where it was started.
      at: the step before which it gets a signal.
      signal: that signal.
    """

    words: tuple[str, ...] = ()
    folder: Path | None = None
    at: int | None = None
    signal: Signals | None = None


@dataclass(frozen=True)
class ParallelRun:
    """A tiny run of several processes.

    Attributes:
      folder: of the text, the compilation cache and the run folders.
      name: of the run.
      options: of the command line, added to the usual ones.
      deviations: how processes differ from the others, by index.
      processes: number of processes.
      devices: number of devices of each process.
    """

    folder: Path
    name: str
    options: tuple[str, ...] = ()
    deviations: Mapping[int, Deviation] = field(default_factory=dict)
    processes: int = 2
    devices: int = 4

    @property
    def arguments(self) -> list[str]:
        """The words after `python -m train`, in each process."""
        text = self.folder / "words.txt"
        if not text.exists():
            write_documents(text)
        return [
            *("run", "--name", self.name, "--folder", str(self.folder), "--data.paths", str(text)),
            *("--steps", str(STEPS), "--block", "8", "--data.length", "64", "--data.batch", "2"),
            *("--model.layers", "1", "--model.width", "32", "--model.heads", "4", "--model.kv-heads", "2"),
            *("--model.hidden", "32", "--model.backend", "dense", "--curriculum.start", "8"),
            *("--evaluation.rows", "2", "--checkpoints.every", "4", "--optimizer.frozen", "query"),
            *("--checkpoints.keep", "9", "--mesh.layout", "contiguous", "--watch.peak-flops", "1e9"),
            *self.options,
        ]

    @property
    def run(self) -> Run:
        """The config."""
        return parse(self.arguments).run

    @property
    def where(self) -> RunFolder:
        """The run's folder."""
        return RunFolder.of(self.run)

    def printed(self, process: int) -> str:
        """The output of a process so far, of all its starts."""
        return self._out(process).read_text()

    def finish(self) -> list[int | None]:
        """Runs the command in all processes and waits; the exit status of each, None if it did not end."""
        return run_processes(_command, [(self, index) for index in range(self.processes)])

    def _out(self, process: int) -> Path:
        return self.folder / f"{self.name}-{process}.out"


def run_processes(target: Callable, arguments: Sequence[tuple]) -> list[int | None]:
    """Runs the target in a process for each tuple and waits; each exit status, None if it did not end.

    Args:
      target: called with a tuple of arguments, then the environment variables for `join`.
      arguments: one tuple for each process.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    # The fork server starts with the first process, and needs this process's import path.
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    processes = []
    for index, each in enumerate(arguments):
        where = dict(zip(OURS, (address, str(len(arguments)), str(index)), strict=True))
        processes.append(FORKS.Process(target=target, args=(*each, where)))
    until = time.monotonic() + LIMIT
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.0, until - time.monotonic()))
        return [process.exitcode for process in processes]
    finally:
        for process in processes:  # also those that did not end
            if process.pid is not None:
                process.kill()
                process.join()
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def set_up_process(out: Path, where: Mapping[str, str], devices: int):
    """Call this first in a process: redirects its output, and sets its environment and its devices."""
    with out.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(where)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)


def _command(run: ParallelRun, index: int, where: Mapping[str, str]):
    """What a process does: `python -m train` with the run's arguments."""
    set_up_process(run._out(index), where, run.devices)
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of the time
    jax.config.update("jax_compilation_cache_dir", str(run.folder / "jax_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    deviation = run.deviations.get(index, Deviation())
    if deviation.folder is not None:
        os.chdir(deviation.folder)
    if deviation.at is not None:
        training._Training._step = _signalled(training._Training._step, deviation)
    cli.join = partial(join, heartbeat=10)
    cli.main([*run.arguments, *deviation.words])


def _signalled(step: Callable, deviation: Deviation) -> Callable:
    """The step function, with a signal before one step, and slower from then on so that it is noticed."""

    def signalled(training, number: int):
        if number == deviation.at and deviation.signal is not None:
            os.kill(os.getpid(), deviation.signal)
        if deviation.at is not None and number >= deviation.at:
            time.sleep(0.5)
        step(training, number)

    return signalled
