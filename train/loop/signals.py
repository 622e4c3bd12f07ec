"""Signals that ask a run to stop: remembered, so that the step at hand is finished and saved first."""

import os
import signal
import threading
from contextlib import ExitStack
from types import FrameType

import jax

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Takes SIGTERM and SIGINT while used as a context.

    A second SIGINT stops at once, as if there were no context. A signal that is ignored outside, as
    SIGINT is under nohup, stays ignored. Outside the main thread nothing is taken, as Python has it;
    nor by one of several processes, which agree on a step to stop after (see
    `Checkpoints.reached_preemption`).

    Attributes:
      received: the name of the first signal, or None.
    """

    def __init__(self):
        self.received: str | None = None
        self._restore = ExitStack()

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            for number in SIGNALS:
                if (before := signal.getsignal(number)) is not signal.SIG_IGN:
                    signal.signal(number, self._remember)
                    self._restore.callback(signal.signal, number, before)
        return self

    def __exit__(self, *error):
        self._restore.close()

    def _remember(self, number: int, frame: FrameType | None):
        self.received = self.received or signal.Signals(number).name
        if signal.getsignal(signal.SIGINT) == self._remember:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            # Not print: it cannot be entered twice, and the signal may have come in the midst of one.
            os.write(2, b"\nfinishing the step and saving; Ctrl-C stops at once\n")
