"""The pictures of an experiment: losses, use of context, retrieval and exposure of its arms."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from train.compare.outcome import ArmOutcome, Results, losses_of
from train.compare.tables import retrieval

STYLES = {"steps": "-", "seconds": "--"}


def draw_all(results: Results, folder: Path) -> list[str]:
    """Draws what the records have, as PNG files `NAME.….png`; returns the files' names."""
    name = results.plan.experiment.name
    drawings: dict[str, Callable[[Results], Figure | None]] = {
        "loss": draw_losses,
        "context": draw_contexts,
        "retrieval": draw_retrieval,
        "exposure": draw_exposure,
    }
    names = []
    for kind, draw in drawings.items():
        figure = draw(results)
        if figure is not None:
            figure.savefig(folder / f"{name}.{kind}.png", metadata={"Software": None})
            names.append(f"{name}.{kind}.png")
    return names


def draw_losses(results: Results) -> Figure | None:
    """The validation loss at the full mask, against steps and against seconds; each seed is a line."""
    if not results.arms:
        return None
    figure, (left, right) = _figure(2)
    for outcome in _ended(results.arms):
        for record in outcome.records:
            losses = np.where(np.isfinite(losses_of(record)), losses_of(record), np.nan)
            own = {"color": _color(results, outcome), "linestyle": STYLES[outcome.budget], "linewidth": 1.2}
            if outcome.budget == "steps":
                left.plot(record.curve.steps, losses, **own)
            right.plot(outcome.curve_seconds(record), losses, **own)
    left.set(xlabel="step", ylabel="bits per byte, full mask", title="Equal steps")
    right.set(xlabel="seconds of steps", ylabel="bits per byte, full mask", title="By seconds")
    _legend(figure, results, "full lines: schedules for equal steps; dashes: for equal seconds")
    return figure


def draw_contexts(results: Results) -> Figure | None:
    """The loss by how much context a token has, and by how much it may use."""
    outcomes = [outcome for outcome in _ended(results.arms) if outcome.budget == results.arms[0].budget]
    if not outcomes:
        return None
    figure, (left, right) = _figure(2)
    length = results.plan.experiment.base.data.length
    for outcome in outcomes:
        color = _color(results, outcome)
        for record in (record for record in outcome.records if not record.failure):
            positions = {int(start): value for start, value in (record.positions or {}).items()}
            left.plot(range(len(positions)), _numbers(positions.values()), "o-", color=color, markersize=3)
            left.set_xticks(range(len(positions)), [f"{start:,}" for start in positions], rotation=30)
            seen = {int(c): found.bits_per_byte for c, found in (record.contexts or {}).items()}
            seen[length] = record.loss
            right.plot(list(seen), _numbers(seen.values()), "o-", color=color, markersize=3)
    left.set(xlabel="tokens of the document before, at least", ylabel="nats a token, full mask")
    right.set(xlabel="tokens that a token sees at most", ylabel="bits per byte", xscale="log")
    ticks = sorted({*results.plan.experiment.contexts, length})
    right.set_xticks(ticks, [f"{tick:,}" for tick in ticks], minor=False)
    right.minorticks_off()
    _legend(figure, results, f"equal {results.arms[0].budget}")
    return figure


def draw_retrieval(results: Results) -> Figure | None:
    """The share of right answers by distance."""
    found = retrieval(_ended(results.arms))
    if not found:
        return None
    figure, (ax,) = _figure(1)
    for outcome in results.arms:
        accuracy = found.get((outcome.arm, outcome.budget), {})
        points = {
            distance: np.mean(spread.values) for distance, spread in sorted(accuracy.items()) if spread.values
        }
        style = STYLES[outcome.budget]
        ax.plot(
            list(points),
            list(points.values()),
            style,
            marker="o",
            color=_color(results, outcome),
            markersize=3,
        )
    ax.set(xlabel="tokens back", ylabel="right", ylim=(-0.03, 1.03))
    ax.set_xscale("symlog", base=2, linthresh=1)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    _legend(figure, results, "means of seeds; full lines: equal steps; dashes: equal seconds")
    return figure


def draw_exposure(results: Results) -> Figure | None:
    """What each arm shows, by its share of the steps, of the first seed."""
    outcomes = _ended(results.arms)
    if not outcomes:
        return None
    figure, (ax,) = _figure(1)
    for outcome in (each for each in outcomes if each.budget == outcomes[0].budget):
        record = next(record for record in outcome.records if not record.failure)
        ax.plot(record.exposure.steps, record.exposure.shown, color=_color(results, outcome), linewidth=1.2)
    ax.set(xlabel="step", ylabel="exposure", ylim=(0, 1.05))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    _legend(figure, results, f"equal {outcomes[0].budget}, seed {outcomes[0].records[0].trial.seed}")
    return figure


def _figure(panels: int) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(1.5 + 5 * panels, 4.4), dpi=110, layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for ax in axes:
        ax.grid(alpha=0.3)
    return figure, axes


def _ended(outcomes: Sequence[ArmOutcome]) -> list[ArmOutcome]:
    """Those of which a seed has a result."""
    return [each for each in outcomes if any(not record.failure for record in each.records)]


def _names(results: Results) -> list[str]:
    return [arm.name for arm in results.plan.experiment.arms]


def _color(results: Results, outcome: ArmOutcome):
    place = _names(results).index(outcome.arm)
    return colormaps["tab10" if len(_names(results)) <= 10 else "tab20"](place)


def _legend(figure: Figure, results: Results, note: str):
    shown = {outcome.arm: _color(results, outcome) for outcome in results.arms}
    lines = [figure.axes[0].plot([], [], color=color, label=name)[0] for name, color in shown.items()]
    figure.legend(handles=lines, loc="outside right upper", frameon=False, fontsize="small")
    figure.suptitle(f"{results.plan.experiment.name}: {note}", fontsize="small")


def _numbers(values) -> list[float]:
    return [np.nan if value is None else value for value in values]
