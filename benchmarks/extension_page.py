"""The results of `benchmarks.extension` as a table and a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.markdown import seconds, share, table

COLORS = {"before": "#969696", "growing": "#08519c", "full": "#e6550d"}


def section(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    arms, old, new = results["arms"], results["settings"]["old"], results["settings"]["new"]
    budget = results["settings"]["budget"]
    before = next(iter(arms.values()))["before"]
    columns = {"before": before, **{f"after, {name}": arm["after"] for name, arm in arms.items()}}
    rows = [
        [
            f"full mask, {int(start):,} bytes before",
            *(f"{c['positions'][start]:.3f}" for c in columns.values()),
        ]
        for start in before["positions"]
    ]
    rows += [
        [f"full mask, rows of {new:,}", *(f"{c['validation_loss']:.4f}" for c in columns.values())],
        [f"chunks of {old:,}", *(f"{c['old_context']['loss']:.4f}" for c in columns.values())],
        ["needle's gain, bits a token", *(f"{_gain(c):+.3f}" for c in columns.values())],
    ]
    times = results["step_seconds"]
    speeds = [
        [f"{window:,}", seconds(time), share(time / times["seconds"][-1])]
        for window, time in zip(times["windows"], times["seconds"], strict=True)
    ]
    taken = "; ".join(
        f"{name}: {arm['steps']:,} steps, {arm['seconds_as_run']:,.0f} s as they ran"
        for name, arm in arms.items()
    )
    parts = [
        f"Nats a byte on held-out text. By the times below {budget:,.0f} s each; {taken}.",
        table(["", *columns], rows),
        table(["chunks", "seconds a step", "of the full mask's"], speeds),
    ]
    if "scalings" in results:
        kinds = [
            [kind, f"{found['old_context']['loss']:.4f}", f"{found['loss']:.4f}"]
            for kind, found in results["scalings"].items()
        ]
        parts.append(table(["rotary scaling, before training", f"chunks of {old:,}", "full mask"], kinds))
    return "\n\n".join(parts)


def _gain(validation: Mapping[str, Any]) -> float:
    needle = validation["needle"]
    return float(np.mean([value for name, value in needle.items() if name.startswith("gain/")]))


def draw(results: Mapping[str, Any], path: Path):
    """Writes the loss by position, before and after each extension, at both contexts, as a PNG."""
    arms, settings = results["arms"], results["settings"]
    figure = Figure(figsize=(9, 4.8), dpi=120, layout="constrained")
    ax = figure.subplots()
    before = next(iter(arms.values()))["before"]
    _line(ax, before, "before", "before", settings["old"])
    for name, arm in arms.items():
        _line(ax, arm["after"], name, f"after, {name}, {arm['steps']:,} steps", settings["old"])
    starts = list(before["positions"])
    ax.set_xticks(range(len(starts)), [f"{int(start):,}" for start in starts])
    ax.set(xlabel="bytes of the document before, at least", ylabel="nats a byte")
    ax.set_title(f"From rows of {settings['old']:,} bytes to {settings['new']:,}")
    ax.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    figure.savefig(path)


def _line(ax: Axes, validation: Mapping[str, Any], color: str, label: str, old: int):
    losses = validation["positions"]
    near = {
        name.removeprefix("positions/"): v for name, v in validation["old_context"].items() if "/" in name
    }
    ax.plot(range(len(losses)), list(losses.values()), "o-", color=COLORS[color], label=label)
    values = [near[start] for start in losses]
    ax.plot(values, "s--", color=COLORS[color], markersize=3, label=f"{label}, chunks of {old:,}")
