"""Runs of several real processes, each with CPU devices of its own, joined by `jax.distributed`."""

import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import jax
from kill_run import FORKS, ROOT, write_documents

from train.__main__ import main as train_main
from train.__main__ import parse
from train.config import Run
from train.folder import RunFolder
from train.joining import OURS

LIMIT = 300
"""Seconds that anything may take, on a machine that is busy with other things."""


@dataclass(frozen=True)
class Together:
    """A tiny run of some processes, in a folder of its own.

    Attributes:
      folder: where the text, the compilation cache and the run folders lie.
      name: of the run.
      options: what is typed beside the usual.
      processes: how many.
      devices: of each.
    """

    folder: Path
    name: str
    options: tuple[str, ...] = ()
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
            *("--steps", "6", "--block", "8", "--data.length", "64", "--data.batch", "2"),
            *("--model.layers", "1", "--model.width", "32", "--model.heads", "4", "--model.kv-heads", "2"),
            *("--model.hidden", "32", "--curriculum.start", "8", "--evaluation.rows", "2"),
            *("--optimizer.ema", "0.9", "--checkpoints.every", "2", "--watch.peak-flops", "1e9"),
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

    def finish(self, more: Mapping[int, Sequence[str]] | None = None) -> list[int | None]:
        """Gives the command in all processes, with more words in some, and waits for the statuses of their ends."""
        processes = self.start(more)
        try:
            return ended(processes)
        finally:
            stop(processes)

    def start(self, more: Mapping[int, Sequence[str]] | None = None) -> list[BaseProcess]:
        """The processes, under way; to be ended by `stop`, whatever happens."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        # The server that processes are forked from begins with the first, and imports as this one does.
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
        started = []
        for index in range(self.processes):
            words = [*self.arguments, *(more or {}).get(index, ())]
            where = (address, str(self.processes), str(index)) if self.processes > 1 else ()
            target = (words, dict(zip(OURS, where, strict=False)), self.devices, self._out(index))
            started.append(FORKS.Process(target=_command, args=target))
            started[-1].start()
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
        return started

    def _out(self, process: int) -> Path:
        return self.folder / f"{self.name}-{process}.out"


def ended(processes: Sequence[BaseProcess]) -> list[int | None]:
    """The exit status of each process, in the end; None for one that did not come to it."""
    until = time.monotonic() + LIMIT
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
    return [process.exitcode for process in processes]


def stop(processes: Sequence[BaseProcess]):
    """Leaves none behind."""
    for process in processes:
        process.kill()
        process.join()


def wait_until(happened: Callable[[], bool], processes: Sequence[BaseProcess]):
    """Waits for something that the processes do, as long as they all live.

    Raises:
      RuntimeError: one ended before, or it took too long.
    """
    until = time.monotonic() + LIMIT
    while not happened():
        if time.monotonic() > until or not all(process.is_alive() for process in processes):
            raise RuntimeError(f"did not happen; statuses {[process.exitcode for process in processes]}")
        time.sleep(0.005)


def _command(arguments: list[str], where: Mapping[str, str], devices: int, out: Path):
    """What a process does: `python -m train` with the arguments."""
    with out.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(where)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_compilation_cache_dir", str(out.parent / "jax_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    train_main(arguments)
