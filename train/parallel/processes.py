"""The processes of a run: how they exchange words, check that they agree, and end together."""

import itertools
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import jax

from train.config.run import Run, option_values
from train.disk import writing
from train.parallel import coordination

T = TypeVar("T")

DAY = 24 * 3600.0
"""Seconds to wait for other processes, which may be reading texts; dead ones are found by heartbeat."""
PATIENCE = 60.0
"""Seconds to wait before logging which processes are missing."""
EXCHANGES = itertools.count()
"""Numbers the exchanges of this process: a key of the coordination service serves once."""
FAILED = "dynmask/failed"
GRACE = 10.0
"""Seconds in which processes that fail at the same time may print reasons of their own."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them sees them; made by `join` or `current`.

    All processes call the methods together, in the same order.

    Attributes:
      index: of this process, from 0, as JAX counts.
      count: of all processes.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> "Processes":
        """The processes that JAX has joined; initializes its devices."""
        return cls(jax.process_index(), jax.process_count())

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.index == 0

    def all_gather(self, word: str) -> list[str]:
        """The words of all processes, by index. Waits for all; missing ones are named on stderr."""
        if self.count == 1:
            return [word]
        exchange = f"dynmask/{next(EXCHANGES)}"
        coordination.put(exchange, self.index, word)
        clock = threading.Timer(PATIENCE, self._name_missing, [exchange])
        clock.daemon = True
        clock.start()
        try:
            coordination.wait_for_all(exchange, DAY)
        finally:
            clock.cancel()
        words = coordination.read(exchange)
        return [words[process] for process in range(self.count)]

    def call_on_first(self, function: Callable[[], T]) -> T:
        """Calls the function in the first process only; all return its result, which JSON must hold.

        Where the function raises, the other processes wait until `end_together` ends them.
        """
        if self.count == 1:
            return function()
        return json.loads(self.all_gather(json.dumps(function()) if self.first else "")[0])

    def check_same(self, run: Run, **more: Any):
        """Refuses, in every process, that processes were started with different options.

        Args:
          run: the config of this process.
          more: other values that must be the same, by name.

        Raises:
          ValueError: with each option that differs, and two processes' values; or JAX has several
            processes that have not joined.
        """
        if jax.process_count() != self.count or (self.count > 1 and not jax.distributed.is_initialized()):
            raise ValueError(
                f"the devices belong to {jax.process_count()} processes that have not joined: call "
                "jax.distributed.initialize() first, or train by the command line, which does"
            )
        options = [json.loads(word) for word in self.all_gather(json.dumps(option_values(run) | more))]
        differing = []
        for name in dict.fromkeys(name for each in options for name in each):
            values = [each.get(name, "nothing") for each in options]
            other = next((process for process, value in enumerate(values) if value != values[0]), None)
            if other is not None:
                differing.append(f"{name}: {values[0]!r} in process 0, {values[other]!r} in process {other}")
        if differing:
            raise ValueError(f"the processes disagree on the config: {'; '.join(differing)}")

    def check_equal(self, word: str, what: str):
        """Refuses, in every process, that the word differs between processes.

        Raises:
          ValueError: it does; `what`, a plural, names it.
        """
        words = self.all_gather(word)
        if others := [process for process, each in enumerate(words) if each != words[0]]:
            raise ValueError(f"{what} of process {others[0]} are not those of process 0")

    @contextmanager
    def end_together(self) -> Iterator[None]:
        """Where one process raises inside, all processes exit with its status, and print a reason.

        That includes processes that wait for a device, for which JAX has no public way. A process that is
        killed leaves no reason: JAX ends the others once its heartbeats are missing (100 s), or their next
        exchange fails.
        """
        if self.count == 1:
            yield
            return
        over = threading.Event()
        watch = threading.Thread(target=self._watch, args=(over,), daemon=True)
        watch.start()
        try:
            yield
            self.all_gather("done")  # jax.distributed.shutdown waits too, but only for some minutes
        except BaseException as error:
            over.set()
            if not isinstance(error, SystemExit):
                traceback.print_exc()
            status = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
            cause = str(error.__cause__ or error) or type(error).__name__
            coordination.put(FAILED, self.index, json.dumps([status, cause]))
            self._exit(status)
        over.set()
        watch.join()
        jax.distributed.shutdown()

    def _name_missing(self, exchange: str):
        """Prints which processes have not come yet, in the first of those that have."""
        there = coordination.read(exchange)
        late = [str(process) for process in range(self.count) if process not in there]
        if late and self.index == min(there):
            several = f"processes {', '.join(late[:9])}{' …' * (len(late) > 9)}"
            print(f"waiting for {several if late[1:] else f'process {late[0]}'}", file=sys.stderr, flush=True)

    def _watch(self, over: threading.Event):
        """Ends this process once another one has failed."""
        while not over.wait(0.5):
            try:
                failed = coordination.read(FAILED)
            except jax.errors.JaxRuntimeError:  # the service is gone, and JAX ends this process
                return
            if failed and not over.wait(1.0):  # else this process is failing too, and prints its reason
                process = min(failed)
                status, cause = json.loads(failed[process])
                print(f"process {process} failed: {cause}", file=sys.stderr)
                self._exit(status)

    def _exit(self, status: int):
        """Exits at once, whatever the main thread waits for, when all processes have seen the reason."""
        with suppress(jax.errors.JaxRuntimeError):  # a process is dead or hangs
            coordination.wait_for_all(FAILED, GRACE)
        if self.first:  # it serves the reasons to the others
            time.sleep(1.0)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)  # sys.exit would wait for processes that may wait for this one


def check_shared(folder: Path, processes: Processes):
    """Refuses a folder of checkpoints that is not visible to all processes, which write to it together.

    Args:
      folder: created where missing. May be in a bucket.
      processes: of the run.

    Raises:
      ValueError: with the process that does not see it.
    """
    if processes.count == 1:
        return
    probe = folder / processes.call_on_first(lambda: f".seen-by-all-{uuid4().hex}")
    processes.call_on_first(lambda: _touch(probe))
    seen = processes.all_gather("seen" if probe.exists() else "")
    processes.call_on_first(probe.unlink)
    if "" in seen:
        raise ValueError(
            f"checkpoints.folder: process {seen.index('')} does not see what process 0 writes to {folder}; "
            "several processes need a folder for checkpoints that all of them share, such as a bucket's"
        )


def _touch(probe: Path):
    with writing(probe.parent):
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
