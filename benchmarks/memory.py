"""Peak memory against the number of tokens: forward+backward of a window, in a process for each length.

    python -m benchmarks.memory TOKENS WINDOW HEADS HEAD_DIM

prints what one call adds to the resident memory of a fresh process, as JSON.
"""

import ctypes
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.calls import BOTH, Size, compiled
from benchmarks.markdown import megabytes, table
from dynmask_jax import Causal, Window, attention


@dataclass(frozen=True)
class Settings:
    """Lengths, and the window that is shown at each of them."""

    tokens: tuple[int, ...]
    window: int = 2_048
    heads: int = 8
    head_dim: int = 64


QUICK = Settings(tuple(2**n for n in range(10, 14)))
FULL = Settings(tuple(2**n for n in range(10, 18)))


def measure(settings: Settings, repeats: int) -> dict:
    """For each length, bytes: of the arrays, added by the call, and of XLA's own plan of temporaries.

    `repeats` are of no use: a peak is not a time. `jax.nn` is compiled, not run.
    """
    rows = []
    for tokens in settings.tokens:
        arguments = (tokens, min(settings.window, tokens), settings.heads, settings.head_dim)
        command = [sys.executable, "-m", "benchmarks.memory", *map(str, arguments)]
        # It is the host's memory that is asked for, whatever JAX computes on in this process.
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if child.returncode:
            raise RuntimeError(f"{' '.join(command[1:])} failed:\n{child.stderr}")
        rows.append(
            {
                "tokens": tokens,
                "window": arguments[1],
                "arrays": 4 * 4 * tokens * settings.heads * settings.head_dim,
                **json.loads(child.stdout.splitlines()[-1]),
            }
        )
    return {"repeats": None, "settings": asdict(settings), "rows": rows}


def peaks(size: Size, window: int) -> dict[str, int | None]:
    """Bytes that the first call adds to this process at its peak, and of temporaries, ours and `jax.nn`'s.

    None where it cannot be asked.
    """
    arrays = jax.block_until_ready(size.arrays())
    program = compiled(_windowed)[BOTH].lower(*arrays, jnp.int32(window)).compile()
    before = _begin_peak()
    jax.block_until_ready(program(*arrays, jnp.int32(window)))
    added = None if before is None else _status("VmHWM") - before
    # Only now: what compiling this one frees would hide what a call takes.
    theirs = compiled(_jax_nn)[BOTH].lower(*arrays).compile()
    return {
        "added": added,
        "temporaries": _temporary_bytes(program),
        "jax_nn_temporaries": _temporary_bytes(theirs),
    }


def _windowed(q, k, v, length):
    return attention(q, k, v, Causal() & Window(length))


def _jax_nn(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def _temporary_bytes(program) -> int | None:
    analysis = program.memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)


def _begin_peak() -> int | None:
    """Resident bytes now, from which Linux counts the peak anew."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what compilation freed must not hide what the call takes
        Path("/proc/self/clear_refs").write_bytes(b"5")
    except (OSError, AttributeError):
        return None
    return _status("VmRSS")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def section(results: dict) -> str:
    """The results as Markdown."""
    rows = [
        [
            f"{row['tokens']:,} tokens, window {row['window']:,}",
            *(megabytes(row[name]) for name in ("arrays", "added", "temporaries", "jax_nn_temporaries")),
            "–" if row["added"] is None else f"{row['added'] / row['tokens'] / 1024:.1f} KiB",
        ]
        for row in results["rows"]
    ]
    columns = ["forward+backward", "q, k, v, cotangent", "added at the peak", "XLA's temporaries"]
    columns += ["`jax.nn`'s temporaries", "added for each token"]
    settings = results["settings"]
    return (
        f"{settings['heads']} heads of {settings['head_dim']}, float32, a fresh process for each row. What a "
        "call adds holds its results: out and three gradients. `jax.nn` is only compiled.\n\n"
        f"{table(columns, rows)}"
    )


if __name__ == "__main__":
    tokens, window, heads, head_dim = map(int, sys.argv[1:])
    print(json.dumps(peaks(Size(tokens, heads, head_dim), window)))
