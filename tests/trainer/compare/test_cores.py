"""Processes on cores, with programs that need no JAX."""

import os
import sys
import time
from pathlib import Path

import pytest

from train.compare.cores import Cores, Job, JobFailed

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system pins no processes to cores"
)


def job(folder: Path, name: str, code: str) -> Job:
    return Job(name, [sys.executable, "-S", "-c", code], folder / f"{name}.log")


def wait(cores: Cores, count: int) -> list[Job]:
    ended: list[Job] = []
    while len(ended) < count:
        ended += cores.ended()
        time.sleep(0.01)
    return ended


def test_each_has_its_own_core_and_one_thread(tmp_path):
    there = sorted(os.sched_getaffinity(0))[:2]
    code = "import os; print(os.sched_getaffinity(0), os.environ['XLA_FLAGS'])"
    with Cores(there) as cores:
        started = [cores.start(job(tmp_path, f"j{number}", code)) for number in there]
        assert started == there
        assert cores.free == []
        assert cores.running == {number: f"j{number}" for number in there}
        assert {each.name for each in wait(cores, len(there))} == {f"j{number}" for number in there}
        assert cores.free == there
    for number in there:
        printed = (tmp_path / f"j{number}.log").read_text()
        assert f"{{{number}}}" in printed
        assert "--xla_cpu_multi_thread_eigen=false" in printed
    assert sorted(os.sched_getaffinity(0))[:2] == there


def test_what_fails_is_said(tmp_path):
    first = min(os.sched_getaffinity(0))
    with Cores([first]) as cores:
        cores.start(job(tmp_path, "wrong", "import sys; sys.exit('no such thing')"))
        with pytest.raises(JobFailed, match=r"wrong ended with status 1 .*no such thing"):
            wait(cores, 1)


def test_what_still_runs_is_asked_to_stop(tmp_path):
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('saved')))\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    with Cores([min(os.sched_getaffinity(0))]) as cores:
        cores.start(job(tmp_path, "long", code))
        while not (tmp_path / "long.log").read_text():
            time.sleep(0.01)
    assert (tmp_path / "long.log").read_text() == "ready\nsaved\n"


def test_cores_that_are_not_there():
    first = min(os.sched_getaffinity(0))
    with pytest.raises(ValueError, match=r"cores must be of .*, got 9999"):
        Cores([first, 9999])
    with pytest.raises(ValueError, match="cores must differ from each other"):
        Cores([first, first])
