"""Times of functions measured side by side, and the machine they were measured on."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import jax

Call = Callable[[], Any]
Ways = dict[str, Call | str]
"""way -> what to time, or why there is nothing to time."""
Times = dict[str, dict[str, float | str]]
"""name -> way -> seconds, or why there are none."""

SHORT = 0.25
"""Seconds below which a call is made once untimed before each timed one."""

Name = TypeVar("Name", bound=Hashable)


def compared(calls: Mapping[str, Ways], repeats: int) -> Times:
    """The seconds that each call of each name takes, all in the same rounds; reasons stay in their place."""
    present = {
        (name, way): call for name, ways in calls.items() for way, call in ways.items() if callable(call)
    }
    seconds = medians(present, repeats)
    return {
        name: {way: call if isinstance(call, str) else seconds[name, way] for way, call in ways.items()}
        for name, ways in calls.items()
    }


def medians(functions: Mapping[Name, Call], repeats: int) -> dict[Name, float]:
    """Seconds each call takes: the median over `repeats` rounds, each of which calls every function.

    Interleaving spreads the noise of a shared machine over all of them, so that ratios hold. Each is
    called once before, to compile; and a short one once more in each round, untimed, since what it
    finds in caches and allocator is otherwise its predecessor's (PyTorch's SDPA at 2,048 tokens took
    38 ms after `jax.nn` and 26 ms after itself).
    """
    for function in functions.values():
        jax.block_until_ready(function())
    times: dict[Name, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            if min(times[name], default=0.0) < SHORT:
                jax.block_until_ready(function())
            start = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def attempt(call: Call) -> Call | str:
    """The call, once it has been made; where it fails, the first line of why. For peers, never for us."""
    try:
        jax.block_until_ready(call())
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return call


def machine() -> dict[str, str | int]:
    """Where and with what the numbers were taken: the processor, and the versions of all that ran."""
    packages = ("jax", "jaxlib", "torch", "tokamax", "transformers")
    return {
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
        "python": platform.python_version(),
        **{name: found for name in packages if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
