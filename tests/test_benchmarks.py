"""The benchmarks' own arithmetic. Nothing here measures time."""

import pytest

from benchmarks.attention import WINDOW_SHARES, report, visible_share
from benchmarks.timing import machine, medians


def test_rounds_call_every_function_in_turn():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    assert set(medians(functions, repeats=3)) == {"a", "b"}
    assert "".join(calls) == "ab" * 4, "once to compile, then three interleaved rounds"


def test_the_visible_share_counts_pairs():
    assert visible_share(1) == 1.0
    tokens, window = 16_384, 4_096
    pairs = sum(min(i + 1, window) for i in range(tokens))
    assert visible_share(4) == pytest.approx(pairs / (tokens * (tokens + 1) / 2))


def test_the_report_gives_ratios_within_the_run():
    ways = ("forward", "forward+backward")
    causal = {f"{name} {way}": s for name, s in (("dynmask_jax", 0.5), ("jax.nn", 2.0)) for way in ways}
    windows = {f"1/{share} {way}": 4.0 / share for share in WINDOW_SHARES for way in ways}
    text = report({"machine": machine(), "causal": causal, "windows": windows})
    assert "4.00x faster" in text
    assert "43.7%" in text
    assert "1.000 s (25.0%)" in text
