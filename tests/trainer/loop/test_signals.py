"""Signals are remembered; a second Ctrl-C is not."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from train.loop.signals import StopSignals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_remembered_and_what_was_before_comes_back(number):
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    with StopSignals() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received == number.name
        os.kill(os.getpid(), signal.SIGTERM)  # schedulers ask more than once
        assert stop.received == number.name
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert {each: signal.getsignal(each) for each in before} == before


def test_the_next_context_knows_nothing_of_it():
    with StopSignals():
        os.kill(os.getpid(), signal.SIGTERM)
    with StopSignals() as stop:
        assert stop.received is None


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.received is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_nothing_is_taken():
    seen = []

    def enter():
        with StopSignals():
            seen.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]


TWICE = """
import os, signal
from train.loop.signals import StopSignals
with StopSignals() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    print(stop.received, flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("not reached")
"""


def test_a_second_interrupt_stops_at_once():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", TWICE], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT
    assert done.stdout == "SIGINT\n"
    assert "finishing the step and saving; Ctrl-C stops at once" in done.stderr
