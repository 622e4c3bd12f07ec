"""`create_block_mask` at lengths where it may not fit: tried in a process of its own first.

    python -m benchmarks.block_masks MASK TOKENS [--compiled]

makes one block mask, within the memory that is free, and prints nothing; a failure's last line says why.
"""

import argparse
import importlib
import os
import resource
import subprocess
import sys
from pathlib import Path

from benchmarks import peers
from benchmarks.timing import Call

SURELY_FITS = 16_384


def call(name: str, tokens: int, compiled: bool, limit: float) -> Call | str:
    """The call that makes a block mask of `plans.MASKS[name]`, or why there is none."""
    if reason := peers.missing("torch"):
        return reason
    if tokens > SURELY_FITS and (reason := _refusal(name, tokens, compiled, limit)):
        return reason
    return _call(name, tokens, compiled)


def _call(name: str, tokens: int, compiled: bool) -> Call:
    plans, torch_peers = (importlib.import_module(f"benchmarks.{name}") for name in ("plans", "torch_peers"))
    return torch_peers.block_mask(*plans.MASKS[name](tokens), compile=compiled)


def _refusal(name: str, tokens: int, compiled: bool, limit: float) -> str | None:
    command = [sys.executable, "-m", "benchmarks.block_masks", name, str(tokens)]
    try:
        tried = subprocess.run(
            command + ["--compiled"] * compiled, timeout=limit, capture_output=True, text=True, check=False
        )
    except subprocess.TimeoutExpired:
        return f"over {limit:.0f} s"
    if tried.returncode == 0:
        return None
    last = (tried.stderr.strip().splitlines() or [f"ended with status {tried.returncode}"])[-1]
    out_of_memory = "allocate memory" in tried.stderr or "MemoryError" in tried.stderr or tried.returncode < 0
    return "out of memory" if out_of_memory else last


def main():
    """Makes one block mask, or fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("mask")
    parser.add_argument("tokens", type=int)
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args()
    make = _call(options.mask, options.tokens, options.compiled)
    _limit_memory_to_what_is_free()
    make()


def _limit_memory_to_what_is_free():
    """So that its own allocator refuses, not the system, which may end another process instead."""
    pages = Path("/proc/self/statm")
    if pages.exists():
        most = int(pages.read_text(encoding="utf-8").split()[0]) + os.sysconf("SC_AVPHYS_PAGES")
        size = most * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


if __name__ == "__main__":
    main()
