"""The grain that is chosen while the program runs, beside fixed ones: FlashMask's masks and packed rows.

The aim: the chosen one takes at most 1.1 times as long as the best of the fixed ones.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import jax
import numpy as np

from benchmarks.calls import BOTH, Size, compiled
from benchmarks.flashmask_masks import PATTERNS, Pattern
from benchmarks.markdown import ratio, seconds, share, table
from benchmarks.timing import medians
from dynmask_jax import Causal, SameSegment, Tokens, attention, plan
from dynmask_jax.grain_choice import FINE_COST

CHOSEN = "chosen"
SHORTEST, LONGEST = 300, 1_500
"""Tokens in a document of packed rows."""


def packed_rows(tokens: int) -> Pattern:
    """k ≤ q in one of many short documents, their lengths drawn evenly."""
    drawn = np.random.default_rng(0).integers(SHORTEST, LONGEST + 1, -(-tokens // SHORTEST))
    ends = np.minimum(np.cumsum(drawn), tokens)
    parts = np.diff(ends, prepend=0)
    return Pattern(Causal() & SameSegment(), Tokens.packed(parts[parts > 0].tolist()))


MASKS: dict[str, Callable[[int], Pattern]] = PATTERNS | {"packed rows": packed_rows}


@dataclass(frozen=True)
class Settings:
    """Masks over sequences of these lengths, in blocks of these sizes and in those that are chosen."""

    tokens: tuple[int, ...]
    masks: tuple[str, ...] = tuple(MASKS)
    fixed: tuple[int, ...] = (64, 128, 256, 512)
    heads: int = 8
    head_dim: int = 64


QUICK = Settings((2_048,), fixed=(64, 512))
FULL = Settings((2_048, 4_096, 8_192))


def measure(settings: Settings, repeats: int) -> dict:
    """Of each mask and length the seconds forward and backward in each grain, and what is computed."""
    rows = []
    for tokens in settings.tokens:
        arrays = Size(tokens, settings.heads, settings.head_dim).arrays()
        for name in settings.masks:
            pattern = MASKS[name](tokens)
            functions = {block: _attention(block) for block in (None, *settings.fixed)}
            calls = {
                CHOSEN if block is None else str(block): _call(function, arrays, pattern)
                for block, function in functions.items()
            }
            seen = jax.jit(plan)(pattern.mask, pattern.tokens)
            rows.append(
                {
                    "tokens": tokens,
                    "mask": name,
                    "exposure": float(seen.exposure()),
                    "computed": float(seen.computed_pairs()) / tokens**2,
                    "small": float(seen.takes_fine().mean()),
                    "times": medians(calls, repeats),
                }
            )
    return {
        "settings": asdict(settings),
        "fine_cost": FINE_COST,
        "rows": rows,
        "programs": _programs(settings, repeats),
    }


def _attention(block: int | None):
    return compiled(
        lambda q, k, v, mask, tokens: attention(q, k, v, plan(mask, tokens, block_q=block, block_k=block))
    )[BOTH]


def _call(function, arrays, pattern: Pattern) -> Callable:
    return lambda: function(*arrays, pattern.mask, pattern.tokens)


def _programs(settings: Settings, repeats: int) -> dict[str, dict[str, float]]:
    """What two grains are to the compiler, beside the largest alone: seconds, and lines of the program."""
    tokens, blocks = settings.tokens[0], {CHOSEN: None, str(settings.fixed[-1]): settings.fixed[-1]}
    arrays, pattern = Size(tokens, settings.heads, settings.head_dim).arrays(), MASKS["causal"](tokens)
    found = {name: [] for name in blocks}
    for _ in range(repeats):
        for name, block in blocks.items():
            jax.clear_caches()
            begun = time.process_time()
            lowered = _attention(block).lower(*arrays, pattern.mask, pattern.tokens)
            program = lowered.compile()
            sizes = (len((text or "").splitlines()) for text in (lowered.as_text(), program.as_text()))
            found[name].append((time.process_time() - begun, *sizes))
    return {
        name: dict(
            zip(
                ("seconds", "lowered", "compiled"),
                map(statistics.median, zip(*each, strict=True)),
                strict=True,
            )
        )
        for name, each in found.items()
    }


def section(results: dict) -> str:
    """The results as Markdown."""
    settings, lines = results["settings"], []
    fixed = [str(size) for size in settings["fixed"]]
    for row in results["rows"]:
        best = min(row["times"][size] for size in fixed)
        what = [share(row[name]) for name in ("exposure", "computed", "small")]
        times = [seconds(row["times"][size]) for size in (CHOSEN, *fixed)]
        over = ratio(row["times"][CHOSEN], best)
        lines.append([f"{row['tokens']:,} tokens, {row['mask']}", *what, *times, over])
    columns = ["mask", "pairs visible", "pairs computed", "lines in small blocks", "chosen, " + BOTH]
    columns += [f"blocks of {size}" for size in fixed] + ["chosen over the best"]
    of_programs = [
        [name, f"{each['seconds']:.1f}", f"{each['lowered']:,}", f"{each['compiled']:,}"]
        for name, each in results["programs"].items()
    ]
    return (
        f"{settings['heads']} heads of {settings['head_dim']}, float32, forward and backward, the plan made "
        f"in the call. Packed rows are documents of {SHORTEST} to {LONGEST:,} tokens. The choice took a "
        f"pair in a small block to cost {results['fine_cost']} times one in a large block; {FINE_COST} is "
        "the default now. Columns of the same program, of full masks say, differ by the noise alone.\n\n"
        f"{table(columns, lines)}\n\n"
        "What the compiler has to do for the plain causal mask, attention forward and backward alone: CPU "
        "seconds to trace and compile, lines of the program before and after.\n\n"
        f"{table(['blocks', 'seconds', 'lowered', 'compiled'], of_programs)}"
    )
