"""Processes side by side, each pinned to a core of its own, so that their times compare."""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"
"""Of `XLA_FLAGS`: a product of matrices is not split over threads."""
TAIL = 2_000  # letters of a log that an error shows


class JobFailed(ValueError):
    """A process ended with an error; the message has the end of what it printed."""


@dataclass(frozen=True)
class Job:
    """A process to start.

    Attributes:
      name: in messages, and of what is running.
      words: the command.
      log: the file that what it prints is added to.
    """

    name: str
    words: Sequence[str]
    log: Path


class Cores:
    """Starts processes on cores. What still runs when the context is left gets SIGTERM, and is waited for.

    Args:
      numbers: of the cores, as the system counts them.

    Raises:
      ValueError: this process may not use a core, or the system pins no processes (macOS).
    """

    def __init__(self, numbers: Sequence[int]):
        if not hasattr(os, "sched_setaffinity"):
            raise ValueError("cores: this system cannot pin a process to a core; leave the option out")
        there = os.sched_getaffinity(0)
        if strange := [number for number in numbers if number not in there]:
            raise ValueError(f"cores must be of {', '.join(map(str, sorted(there)))}, got {strange[0]}")
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"cores must differ from each other, got {', '.join(map(str, numbers))}")
        self._numbers = tuple(numbers)
        self._running: dict[int, tuple[Job, subprocess.Popen]] = {}

    def __enter__(self) -> "Cores":
        return self

    def __exit__(self, *error):
        for _, process in self._running.values():
            process.send_signal(signal.SIGTERM)
        for _, process in self._running.values():
            process.wait()

    @property
    def free(self) -> list[int]:
        """The cores on which no process runs."""
        return [number for number in self._numbers if number not in self._running]

    @property
    def running(self) -> Mapping[int, str]:
        """The names of the processes that run, by their cores."""
        return {number: job.name for number, (job, _) in self._running.items()}

    def start(self, job: Job) -> int:
        """Starts a process on the first free core, which is returned."""
        core, before = self.free[0], os.sched_getaffinity(0)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        flags = f"{os.environ.get('XLA_FLAGS', '')} {ONE_THREAD}".strip()
        with job.log.open("ab") as log:
            os.sched_setaffinity(0, {core})  # a process has the cores of the thread that starts it
            try:
                process = subprocess.Popen(
                    list(job.words),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "XLA_FLAGS": flags},
                    start_new_session=True,  # Ctrl-C reaches this process, which passes it on once
                )
            finally:
                os.sched_setaffinity(0, before)
        self._running[core] = job, process
        return core

    def ended(self) -> list[Job]:
        """The processes that have ended since the last call.

        Raises:
          JobFailed: one of them with another status than 0.
        """
        over = [number for number, (_, process) in self._running.items() if process.poll() is not None]
        ended = [self._running.pop(number) for number in over]
        for job, process in ended:
            if process.returncode:
                printed = job.log.read_text(encoding="utf-8", errors="replace")[-TAIL:]
                raise JobFailed(f"{job.name} ended with status {process.returncode} ({job.log}): {printed}")
        return [job for job, _ in ended]
