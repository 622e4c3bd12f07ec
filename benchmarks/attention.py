"""Times attention on this machine: against `jax.nn` under the full causal mask, and under windows.

    python -m benchmarks.attention [--repeats 5] [--json FILE]

Two claims are measured, forward and forward + backward apart: that plain causal attention is faster
than `jax.nn.dot_product_attention(is_causal=True)`, and that attention costs what the mask shows.
"""

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.timing import machine, medians
from dynmask_jax import Causal, Window, attention

HEADS, HEAD_DIM = 8, 64
CAUSAL_TOKENS, WINDOW_TOKENS = 4_096, 16_384
WINDOW_SHARES = (1, 2, 4, 8, 16, 32)


def main(arguments: list[str] | None = None):
    """Measures, prints the tables, and writes the JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="rounds; the median is reported")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args(arguments)
    results = {
        "machine": machine(),
        "causal": causal_against_jax_nn(options.repeats),
        "windows": windows(options.repeats),
    }
    print(report(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def causal_against_jax_nn(repeats: int) -> dict[str, float]:
    """Seconds for 4,096 tokens under the full causal mask, ours and `jax.nn`'s."""
    arrays = _arrays(CAUSAL_TOKENS)

    def ours(q, k, v):
        return attention(q, k, v, Causal())

    def theirs(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    return medians(
        {**_both_ways("dynmask_jax", ours, arrays), **_both_ways("jax.nn", theirs, arrays)}, repeats
    )


def windows(repeats: int) -> dict[str, float]:
    """Seconds for 16,384 tokens under causal windows of 1, 1/2, … of them: one compilation each way."""
    arrays = _arrays(WINDOW_TOKENS)

    def ours(q, k, v, length):
        return attention(q, k, v, Causal() & Window(length))

    calls = {}
    for share in WINDOW_SHARES:
        calls |= _both_ways(f"1/{share}", ours, (*arrays, jnp.int32(WINDOW_TOKENS // share)))
    return medians(calls, repeats)


def report(results: dict) -> str:
    """The results as text."""
    causal, times = results["causal"], results["windows"]
    lines = [", ".join(f"{name} {value}" for name, value in results["machine"].items()), ""]
    lines += [f"full causal, {CAUSAL_TOKENS:,} tokens, {HEADS} heads, head dim {HEAD_DIM}, float32"]
    for way in ("forward", "forward+backward"):
        ours, theirs = causal[f"dynmask_jax {way}"], causal[f"jax.nn {way}"]
        lines.append(f"  {way:<17} {ours:8.3f} s   jax.nn {theirs:8.3f} s   {theirs / ours:5.2f}x faster")
    lines += [
        "",
        f"causal windows, {WINDOW_TOKENS:,} tokens (time and visible pairs over those of the whole)",
    ]
    lines += ["  window   visible   forward            forward+backward"]
    for share in WINDOW_SHARES:
        cells = [
            f"{times[f'1/{share} {way}']:7.3f} s ({_over_whole(times, share, way):5.1%})" for way in _WAYS
        ]
        lines.append(f"  1/{share:<5}  {visible_share(share):7.1%}   " + "   ".join(cells))
    return "\n".join(lines)


_WAYS = ("forward", "forward+backward")


def visible_share(share: int) -> float:
    """Pairs under a causal window of 1/share of the tokens, over those of the full causal mask."""
    tokens, window = WINDOW_TOKENS, WINDOW_TOKENS // share
    return (window * tokens - window * (window - 1) / 2) / (tokens * (tokens + 1) / 2)


def _over_whole(times: dict[str, float], share: int, way: str) -> float:
    return times[f"1/{share} {way}"] / times[f"1/1 {way}"]


def _arrays(tokens: int) -> tuple[jax.Array, ...]:
    shape = (1, tokens, HEADS, HEAD_DIM)
    return tuple(jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 3))


@functools.cache
def _compiled(attend: Callable) -> tuple[Callable, Callable]:
    def loss(*arrays):
        return attend(*arrays).sum()

    return jax.jit(attend), jax.jit(jax.value_and_grad(loss, (0, 1, 2)))


def _both_ways(name: str, attend: Callable, arrays: tuple) -> dict[str, Callable]:
    forward, backward = _compiled(attend)
    return {
        f"{name} forward": functools.partial(forward, *arrays),
        f"{name} forward+backward": functools.partial(backward, *arrays),
    }


if __name__ == "__main__":
    main()
