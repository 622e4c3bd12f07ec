"""Times of functions measured side by side, and the machine they were measured on."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version

import jax


def medians(functions: Mapping[str, Callable], repeats: int) -> dict[str, float]:
    """Seconds each call takes: the median over `repeats` rounds, each of which calls every function.

    Interleaving spreads the noise of a shared machine over all of them, so that ratios hold. Each is
    called once before, to compile.
    """
    for function in functions.values():
        jax.block_until_ready(function())
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def machine() -> dict[str, str | int]:
    """Where and with what the numbers were taken."""
    return {
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
