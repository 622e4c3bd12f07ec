"""Time against exposure: causal windows of 1, 1/2, … of the tokens, one compilation for each length.

The aim: time at exposure e, over that of the full mask, is at most 1.15·e + 0.10 at 4,096 tokens, + 0.06 at
8,192, + 0.04 beyond.
"""

from dataclasses import asdict, dataclass

import jax.numpy as jnp

from benchmarks.calls import BOTH, FORWARD, WAYS, Size, both_ways, compiled
from benchmarks.markdown import seconds, share, table
from benchmarks.timing import compared
from dynmask_jax import Causal, Window, attention
from dynmask_jax.grain_choice import FINE_COST


@dataclass(frozen=True)
class Settings:
    """Lengths and windows.

    Attributes:
      tokens: lengths, each cut into windows of tokens / 1, / 2, … for `parts`, down to 32 tokens.
      most_pairs: windows that show more pairs are left out, for the time that they take.
    """

    tokens: tuple[int, ...]
    parts: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    most_pairs: int = 2**28
    heads: int = 8
    head_dim: int = 64


SHORTEST = 32
QUICK = Settings(tuple(2**n for n in range(10, 13)), parts=(1, 4, 16, 64))
FULL = Settings((4_096, 8_192, 16_384), parts=tuple(2**n for n in range(10)))


def measure(settings: Settings, repeats: int) -> dict:
    """For each length, the seconds of each window and the share of the causal mask's pairs it shows."""
    rows = []
    for tokens in settings.tokens:
        arrays = Size(tokens, settings.heads, settings.head_dim).arrays()
        ours = compiled(lambda q, k, v, length: attention(q, k, v, Causal() & Window(length)))
        windows = [tokens // n for n in settings.parts if tokens // n >= min(SHORTEST, tokens // 4)]
        windows = [window for window in windows if pairs(tokens, window) <= settings.most_pairs]
        calls = {str(window): both_ways(ours, *arrays, jnp.int32(window)) for window in windows}
        times = compared(calls, repeats)
        compilations = {way: function._cache_size() for way, function in ours.items()}
        rows += [
            {
                "tokens": tokens,
                "window": window,
                "pairs": pairs(tokens, window),
                "exposure": pairs(tokens, window) / pairs(tokens, tokens),
                "times": times[str(window)],
                "compilations": compilations,
            }
            for window in windows
        ]
    return {"settings": asdict(settings), "fine_cost": FINE_COST, "rows": rows}


def pairs(tokens: int, window: int) -> int:
    """Pairs that a causal window shows."""
    return window * tokens - window * (window - 1) // 2


def bound(exposure: float, tokens: int) -> float:
    """The greatest share of the full mask's time that the aim allows."""
    return 1.15 * exposure + next(beside for least, beside in BESIDE if tokens >= least)


BESIDE = (16_384, 0.04), (8_192, 0.06), (0, 0.10)
"""(tokens from which, share of the full mask's time beside what is in proportion to the pairs shown)."""


def section(results: dict) -> str:
    """The results as Markdown."""
    rows = results["rows"]
    full = {row["tokens"]: row["times"] for row in rows if row["window"] == row["tokens"]}
    lines = []
    for row in rows:
        shares = [_share(row["times"][way], full.get(row["tokens"], {}).get(way)) for way in WAYS]
        allowed = share(bound(row["exposure"], row["tokens"])) if row["tokens"] in full else "–"
        name = f"{row['tokens']:,} tokens, window {row['window']:,}"
        times = [seconds(row["times"][way]) for way in WAYS]
        each = seconds(row["times"][BOTH] / row["pairs"] * 1e6)
        lines.append([name, share(row["exposure"]), allowed, times[0], shares[0], times[1], shares[1], each])
    columns = ["causal window", "exposure", "bound", FORWARD, "of the full mask", BOTH, "of the full mask"]
    columns += ["a million pairs"]
    settings = results["settings"]
    return (
        f"{settings['heads']} heads of {settings['head_dim']}, float32; one compilation for all windows of a "
        "length. Exposure is pairs visible over those of the full causal mask; the bound is 1.15·e + 0.10 at "
        "4,096 tokens, + 0.06 at 8,192, + 0.04 at 16,384. Lines of 512 queries that show little are worked "
        "in blocks of 64, in which a pair costs about twice as much, for XLA multiplies small blocks on "
        f"one core; the choice took it for {results['fine_cost']} times, {FINE_COST} is the default now. "
        "Windows of more than "
        f"{settings['most_pairs']:,} pairs are left out for the time they take.\n\n{table(columns, lines)}"
    )


def _share(time: float, full: float | None) -> str:
    return "–" if full is None else share(time / full)
