"""Balance over devices: the layout that the simulator picks at each stage of a curriculum, beside fixed ones.

Nothing is timed: work, hops and bytes are counted, and the same each time. Estimates follow from data sheets.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import get_args

from benchmarks.markdown import ratio, table
from dynmask_jax import (
    V5P,
    Balance,
    Causal,
    Choice,
    Curriculum,
    balance,
    exponential,
    growing_chunks,
    growing_window,
    linear,
    reveal,
)
from dynmask_jax.curricula import Order

PICKED, ZIGZAG, CONTIGUOUS = "picked", "zigzag", "contiguous"
FIXED = (ZIGZAG, CONTIGUOUS)
FULL_MASK = "full causal mask"
END = 1_000


@dataclass(frozen=True)
class Settings:
    """A row, the devices that it is split over, and the curricula.

    Attributes:
      start: tokens that curricula which grow in tokens begin with.
      chunk: of `reveal`; a multiple of nothing, so that no layout has its boundaries for free.
      stages: steps out of 1,000, at the last of which the mask is full.
    """

    tokens: int
    devices: int = 64
    block: int = 512
    start: int = 32
    chunk: int = 10_000
    stages: tuple[int, ...] = (0, 10, 20, 50, 100, 200, 300, 400, 500, 600, 700, 800, 900, 990, END)


QUICK, FULL = Settings(2**18, stages=(0, 50, 300, 700, END)), Settings(2**20)


def measure(settings: Settings, repeats: int) -> dict:
    """For each curriculum and stage, what the pick costs and each fixed layout; repeats change nothing."""
    del repeats
    rows = [
        {"curriculum": name, "stage": stage, **_choices(_simulated(curriculum, stage, settings))}
        for name, curriculum in curricula(settings).items()
        for stage in (settings.stages if name != FULL_MASK else (END,))
    ]
    return {"settings": asdict(settings), "repeats": None, "simulated": V5P.name, "rows": rows}


def curricula(settings: Settings) -> dict[str, Curriculum]:
    """The full mask, and every shipped curriculum that ends in it."""
    growths = {
        "linear": linear(settings.start, settings.tokens, END),
        "exponential": exponential(settings.start, settings.tokens, END),
    }
    amount = linear(0.0, 1.0, END)
    return {
        FULL_MASK: lambda step: Causal(),
        **{f"growing window, {name}": growing_window(length) for name, length in growths.items()},
        **{f"growing chunks, {name}": growing_chunks(length) for name, length in growths.items()},
        **{f"reveal, {order}": reveal(settings.chunk, amount, order) for order in get_args(Order)},
    }


def _simulated(curriculum: Curriculum, stage: int, settings: Settings) -> Balance:
    how = {"block": settings.block, "strategies": ["ring"]}
    return balance(curriculum(stage), settings.tokens, settings.devices, **how)


def _choices(found: Balance) -> dict[str, dict]:
    """The pick, the fixed layouts, and the fastest by the estimate alone."""
    chosen = {PICKED: found.pick, **{name: found.best(name) for name in FIXED}, "fastest": found.fastest}
    return {name: _facts(choice) for name, choice in chosen.items()}


def _facts(choice: Choice) -> dict:
    cost = choice.cost
    return {
        "layout": choice.name,
        "imbalance": round(choice.imbalance, 4),
        "critical": round(cost.critical / cost.work.mean(), 4),
        "ahead": cost.ahead,
        "behind": cost.behind,
        "bytes": cost.bytes,
        "milliseconds": round(1e3 * cost.seconds, 3),
    }


def section(results: dict) -> str:
    """The worst and the sum of every curriculum, then every stage."""
    return f"{_legend(results)}\n\n{summary(results)}\n\nEvery stage:\n\n{stages(results)}"


def _legend(results: dict) -> str:
    settings = results["settings"]
    return (
        f"{settings['tokens']:,} tokens over {settings['devices']} devices in blocks of {settings['block']}, "
        "a ring of 32 query heads and 8 key heads of 128 in bfloat16: one layer, forward and backward. "
        "Max/mean is the work of the device that has most over the mean of all, at the worst stage; bytes "
        f"are those each device sends, times are estimates for {results['simulated']}, and both are summed "
        f"over the stages. Chunks of `reveal` are of {settings['chunk']:,} tokens. Nothing is timed: all of "
        "it is counted, or follows from data sheets."
    )


def summary(results: dict) -> str:
    """A line for each curriculum: at its worst stage, and over all of them."""
    columns = ["curriculum"]
    columns += [f"max/mean, {name}" for name in (PICKED, *FIXED)]
    columns += [f"{what}, of {name}" for what in ("bytes", "time") for name in FIXED]
    lines = []
    for name, rows in _by_curriculum(results):
        worst = [f"{max(row[which]['imbalance'] for row in rows):.2f}" for which in (PICKED, *FIXED)]
        shares = [
            ratio(_total(rows, PICKED, what), _total(rows, which, what))
            for what in ("bytes", "milliseconds")
            for which in FIXED
        ]
        lines.append([name, *worst, *shares])
    return table(columns, lines)


def stages(results: dict) -> str:
    """A line for each stage: the pick's layout, and all three in figures."""
    columns = ["curriculum, share of its growth", "picked"]
    columns += [f"{what}, {name}" for what in ("max/mean", "hops", "GiB") for name in (PICKED, *FIXED)]
    lines = []
    for row in results["rows"]:
        of_each = [row[which] for which in (PICKED, *FIXED)]
        lines.append(
            [
                f"{row['curriculum']}, {row['stage'] / END:.0%}",
                row[PICKED]["layout"],
                *(f"{each['imbalance']:.2f}" for each in of_each),
                *(f"{each['ahead']}+{each['behind']}" for each in of_each),
                *(f"{each['bytes'] / 2**30:.1f}" for each in of_each),
            ]
        )
    return table(columns, lines)


def _by_curriculum(results: dict) -> Iterator[tuple[str, list[dict]]]:
    for name, rows in groupby(results["rows"], key=lambda row: row["curriculum"]):
        yield name, list(rows)


def _total(rows: list[dict], which: str, what: str) -> float:
    return sum(row[which][what] for row in rows)
