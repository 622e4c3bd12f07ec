"""Runs of several real processes, each with CPU devices of its own, joined by `jax.distributed`."""

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
"""Seconds that anything may take, on a machine that is busy with other things."""


@dataclass(frozen=True)
class Odd:
    """What is odd about one of the processes.

    Attributes:
      words: typed beside what the others are given.
      folder: that it is in; None: where it was started.
      at: the step before which it gets a signal.
      signal: which.
    """

    words: tuple[str, ...] = ()
    folder: Path | None = None
    at: int | None = None
    signal: Signals | None = None


@dataclass(frozen=True)
class Together:
    """A tiny run of some processes, in a folder of its own.

    Attributes:
      folder: where the text, the compilation cache and the run folders lie.
      name: of the run.
      options: what is typed beside the usual.
      odd: the processes that are not as the others, by number.
      processes: how many.
      devices: of each.
    """

    folder: Path
    name: str
    options: tuple[str, ...] = ()
    odd: Mapping[int, Odd] = field(default_factory=dict)
    processes: int = 2
    devices: int = 4

    @property
    def arguments(self) -> list[str]:
        """What is typed after `python -m train`, in each process."""
        text = self.folder / "words.txt"
        if not text.exists():
            write_documents(text)
        return [
            *("run", "--name", self.name, "--folder", str(self.folder), "--data.paths", str(text)),
            *("--steps", str(STEPS), "--block", "8", "--data.length", "64", "--data.batch", "2"),
            *("--model.layers", "1", "--model.width", "32", "--model.heads", "4", "--model.kv-heads", "2"),
            *("--model.hidden", "32", "--model.backend", "dense", "--curriculum.start", "8"),
            *("--evaluation.rows", "2", "--checkpoints.every", "4"),
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
        """All that a process printed so far, every time."""
        return self._out(process).read_text()

    def finish(self) -> list[int | None]:
        """Gives the command in all processes, and waits: the status of each, None if it did not end."""
        return statuses(_command, [(self, index) for index in range(self.processes)])

    def _out(self, process: int) -> Path:
        return self.folder / f"{self.name}-{process}.out"


def statuses(target: Callable, arguments: Sequence[tuple]) -> list[int | None]:
    """Runs the target in a process for each tuple, and waits: the status of each, None if it did not end.

    Args:
      target: called with a tuple of arguments and, last, the variables that let the processes join.
      arguments: for each process.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    # The server that processes are forked from begins with the first, and imports as this one does.
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
        for process in processes:  # none is left behind
            if process.pid is not None:
                process.kill()
                process.join()
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def began(out: Path, where: Mapping[str, str], devices: int):
    """To be called first by a process: where it prints to, what it knows of the others, and its devices."""
    with out.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(where)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)


def _command(run: Together, index: int, where: Mapping[str, str]):
    """What a process does: `python -m train` with the run's arguments."""
    began(run._out(index), where, run.devices)
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of the time
    jax.config.update("jax_compilation_cache_dir", str(run.folder / "jax_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    odd = run.odd.get(index, Odd())
    if odd.folder is not None:
        os.chdir(odd.folder)
    if odd.at is not None:
        training._Training._step = _signalled(training._Training._step, odd)
    cli.join = partial(join, heartbeat=10)
    cli.main([*run.arguments, *odd.words])


def _signalled(step: Callable, odd: Odd) -> Callable:
    """A step that is as before, but for a signal at one; and slow from there on, for that to be seen."""

    def signalled(training, number: int):
        if number == odd.at and odd.signal is not None:
            os.kill(os.getpid(), odd.signal)
        if odd.at is not None and number >= odd.at:
            time.sleep(0.5)
        step(training, number)

    return signalled
