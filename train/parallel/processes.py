"""Several processes, one run: how they find each other, agree, and end together."""

import itertools
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import jax
from jax._src import distributed

from train.config.run import Run, option_values
from train.disk import writing

T = TypeVar("T")

DAY = 24 * 3600 * 1000
"""In ms; for others to come, who may be reading texts: those that died are found by their heartbeats."""
PATIENCE = 60.0
"""Seconds of waiting for others after which it is said whom for."""
TOLD = itertools.count()
"""Numbers what this process has told the others: a place for words is taken once in its life."""
FAILED = "dynmask/failed"
GRACE = 10.0
"""Seconds that those who fail at the same time have for words of their own."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them sees them; made by `join` or `here`.

    What they tell each other goes through JAX's coordination service and not through devices, so that
    it may take as long as it likes.

    Attributes:
      index: which this is, from 0, as JAX counts.
      count: how many there are.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def here(cls) -> "Processes":
        """Those that JAX knows of; asks for its devices."""
        return cls(jax.process_index(), jax.process_count())

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.index == 0

    def gathered(self, word: str) -> list[str]:
        """What each process says here, by its number; all must come, and who is late is named on stderr."""
        if self.count == 1:
            return [word]
        place = f"dynmask/{next(TOLD)}/"
        client: Any = distributed.global_state.client  # JAX has no public way to it; orbax takes this too
        client.key_value_set(f"{place}{self.index}", word)
        clock = threading.Timer(PATIENCE, self._name_the_late, [place])
        clock.daemon = True
        clock.start()
        try:
            client.wait_at_barrier(place, DAY)
        finally:
            clock.cancel()
        words = _told(place)
        return [words[process] for process in range(self.count)]

    def first_says(self, function: Callable[[], T]) -> T:
        """What the function returns in the first process, which alone calls it; JSON must hold it.

        Where it fails, the others wait until `ending_together` ends them.
        """
        if self.count == 1:
            return function()
        word = json.dumps(function()) if self.first else ""
        return json.loads(self.gathered(word)[0])

    def check_same(self, run: Run, **more: Any):
        """Refuses processes that were started with other options, in all of them.

        Args:
          run: the config of this one.
          more: what else must be the same, by its name.

        Raises:
          ValueError: with each option that differs, and who has what; or processes have not joined.
        """
        if jax.process_count() != self.count or (self.count > 1 and not jax.distributed.is_initialized()):
            raise ValueError(
                f"the devices belong to {jax.process_count()} processes that have not joined: call "
                "jax.distributed.initialize() first, or train by the command line, which does"
            )
        told = [json.loads(word) for word in self.gathered(json.dumps(option_values(run) | more))]
        differing = []
        for name in dict.fromkeys(name for each in told for name in each):
            values = [each.get(name, "nothing") for each in told]
            other = next((process for process, value in enumerate(values) if value != values[0]), None)
            if other is not None:
                differing.append(f"{name}: {values[0]!r} in process 0, {values[other]!r} in process {other}")
        if differing:
            raise ValueError(f"the processes disagree on the config: {'; '.join(differing)}")

    def check_equal(self, word: str, what: str):
        """Refuses processes that hold different things, in all of them.

        Raises:
          ValueError: `word` is not the same in all; `what` names it.
        """
        words = self.gathered(word)
        if others := [process for process, each in enumerate(words) if each != words[0]]:
            raise ValueError(f"{what} of process {others[0]} are not those of process 0")

    @contextmanager
    def ending_together(self) -> Iterator[None]:
        """Where one process fails within, all end with its exit status, each in its own words or in those.

        Not even a process that waits for devices is left behind. One that is killed has no words: JAX
        ends the others once its heartbeats have been missed (100 s), or their next exchange fails.
        """
        if self.count == 1:
            yield
            return
        over = threading.Event()
        watch = threading.Thread(target=self._watch, args=(over,), daemon=True)
        watch.start()
        try:
            yield
            self.gathered("done")  # JAX would wait for the others at the exit too, but not for long
        except BaseException as error:
            if not isinstance(error, SystemExit):
                traceback.print_exc()
            self._fail(error, over)
        over.set()
        watch.join()
        jax.distributed.shutdown()

    def _name_the_late(self, place: str):
        """Prints which processes have not told their word yet; the first of those that have does."""
        there = _told(place)
        late = [str(process) for process in range(self.count) if process not in there]
        if late and self.index == min(there):
            several = f"processes {', '.join(late[:9])}{' …' * (len(late) > 9)}"
            print(f"waiting for {several if late[1:] else f'process {late[0]}'}", file=sys.stderr, flush=True)

    def _fail(self, error: BaseException, over: threading.Event):
        """Tells the others, and ends this process."""
        over.set()
        status = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        words = str(error.__cause__ or error) or type(error).__name__
        client: Any = distributed.global_state.client
        client.key_value_set(f"{FAILED}/{self.index}", json.dumps([status, words]), allow_overwrite=True)
        self._end(status)

    def _watch(self, over: threading.Event):
        """Ends this process once another one has failed."""
        client: Any = distributed.global_state.client
        while not over.wait(0.5):
            try:
                failed = client.key_value_dir_get(FAILED)
            except jax.errors.JaxRuntimeError:  # the service is gone, and JAX will say so
                return
            if failed and not over.wait(1.0):  # if this one is failing too it has words of its own
                key, word = min(failed)
                status, words = json.loads(word)
                print(f"process {key.rpartition('/')[2]} failed: {words}", file=sys.stderr)
                self._end(status)

    def _end(self, status: int):
        # At once, for JAX would wait at its exit for processes that may be waiting for this one; but
        # not before all know why, of which the first, who keeps the words, is the last to go.
        try:
            client: Any = distributed.global_state.client
            client.wait_at_barrier(FAILED, int(GRACE * 1000))
        except jax.errors.JaxRuntimeError:
            pass  # one is dead, or hangs: what it has heard is all it will
        if self.first:
            time.sleep(1.0)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def _told(place: str) -> dict[int, str]:
    """What processes have told there so far, by their numbers."""
    client: Any = distributed.global_state.client
    return {int(key.rpartition("/")[2]): word for key, word in client.key_value_dir_get(place)}


def check_shared(folder: Path, processes: Processes):
    """Refuses a folder for checkpoints that some of the processes do not see; several write to it together.

    Args:
      folder: made if need be. May be in a bucket.
      processes: of the run.

    Raises:
      ValueError: with the process that does not see it.
    """
    if processes.count == 1:
        return
    probe = folder / processes.first_says(lambda: f".seen-by-all-{uuid4().hex}")
    processes.first_says(lambda: _touch(probe))
    seen = processes.gathered("seen" if probe.exists() else "")
    processes.first_says(probe.unlink)
    if "" in seen:
        raise ValueError(
            f"checkpoints.folder: process {seen.index('')} does not see what process 0 writes to {folder}; "
            "several processes need a folder for checkpoints that all of them share, such as a bucket's"
        )


def _touch(probe: Path):
    with writing(probe.parent):
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
