"""The pictures of a run: its masks beside its loss, and its loss by where in a document a token stands."""

import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from dynmask_jax import Tokens
from dynmask_jax.plot import draw_masks
from train.config.run import Run
from train.data.tasks import task_of
from train.evaluate.needle import by_depth
from train.metrics.record import Record, StepRecord, ValidationRecord
from train.report.evaluators import by_start, chunks_of
from train.step.curriculum import Growth

PANELS = 4
LINES = 8
NEAR = 1.4
TRAINING, VALIDATION = "#9ecae1", "#08519c"


def draw(records: list[Record], growth: Growth, run: Run, path: Path) -> bool:
    """Writes the masks at some steps beside the loss at all, as a PNG.

    Args:
      records: the run's metrics.
      growth: its curriculum.
      run: its config.
      path: of the file.

    Returns:
      whether there was a step to draw.
    """
    steps = [record for record in records if isinstance(record, StepRecord)]
    if not steps:
        return False
    shown = _evenly_spaced(steps)
    figure = Figure(figsize=(13, 5.6), dpi=120, layout="constrained")
    grid = figure.add_gridspec(1, 2, width_ratios=(1, 1.35))
    masks, loss = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    columns = min(2, len(shown))
    lines = -(-len(shown) // columns)
    axes = [masks.add_subplot(lines, columns, n + 1) for n in range(len(shown))]
    titles = {
        f"step {r.step:,}: {_window(run, r.window)}\nexposure {r.exposure:.1%}": growth.mask(clock)
        for r, clock in zip(shown, _clocks(growth, shown), strict=True)
    }
    draw_masks(titles, _tokens(run), axes=axes)
    for ax in axes:
        ax.tick_params(labelsize="small")
    masks.suptitle(_subject(run), fontsize="medium")
    _draw_loss(loss.subplots(), steps, [r for r in records if isinstance(r, ValidationRecord)])
    figure.savefig(path)
    return True


def _window(run: Run, tokens: int) -> str:
    match run.curriculum.kind:
        case "full":
            return "full mask"
        case "reveal":
            return f"{tokens / run.data.length:.0%} revealed"
        case "window":
            return f"window of {tokens:,}"
        case _:
            return f"chunks of {tokens:,}"


def _subject(run: Run) -> str:
    layers = "" if "local" not in run.model.pattern else ", in a global layer"
    return task_of(run).row.format(last=run.data.length - 1) + layers


def _tokens(run: Run) -> Tokens:
    """What a row holds: one document, or three quarters of one and a quarter of summary."""
    length = run.data.length
    if task_of(run).has_boundary:
        return Tokens.sequence(length, start=length - 3 * length // 4)
    return Tokens.sequence(length)


def _evenly_spaced(steps: list[StepRecord]) -> list[StepRecord]:
    """Up to PANELS of the steps, evenly spaced from the first to the first that shows the most."""
    most = max(record.exposure for record in steps)
    # Exposure is a share of what each batch could show: it need not be exactly the same twice.
    last = next(i for i, record in enumerate(steps) if record.exposure >= most - 1e-3)
    return [steps[i] for i in sorted({last * n // (PANELS - 1) for n in range(PANELS)})]


def _clocks(growth: Growth, records: list[StepRecord]) -> list[int]:
    """Where on the curriculum's clock, which a loss may move, each record's window was reached."""
    windows = jax.vmap(lambda clock: jnp.asarray(growth.window(clock)))(jnp.arange(growth.steps + 1))
    found = np.searchsorted(np.asarray(windows), [record.window for record in records])
    return [int(clock) for clock in np.minimum(found, growth.steps)]


def _draw_loss(ax: Axes, steps: list[StepRecord], validations: list[ValidationRecord]):
    numbers = [record.step for record in steps]
    marker = "." if len(steps) == 1 else ""
    losses = _values(steps, "bits_per_byte")
    name = "training, at the step's mask"
    ax.plot(numbers, losses, color=TRAINING, linewidth=0.8, marker=marker, label=name)
    bits = _values(validations, "bits_per_byte")
    at = [record.step for record in validations]
    ax.plot(at, bits, "o-", color=VALIDATION, markersize=4, label="validation, at the full mask")
    if len(bits) and math.isfinite(bits[-1]):
        below = (at[-1], bits[-1]), (0, -15)
        value = f"{bits[-1]:.3f}"
        ax.annotate(value, *below, textcoords="offset points", ha="center", color=VALIDATION)
    ax.set(xlabel="step", ylabel="bits per byte", ylim=(0, None))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    ax.grid(alpha=0.3)
    exposure = ax.twinx()
    shares = [record.exposure for record in steps]
    exposure.plot(numbers, shares, color="grey", linestyle=":", marker=marker, label="exposure")
    exposure.set(ylabel="exposure", ylim=(0, 1.05))
    exposure.yaxis.set_major_formatter(PercentFormatter(1.0))
    lines = [*ax.lines, *exposure.lines]
    names = [str(line.get_label()) for line in lines]
    ax.legend(lines, names, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(lines), frameon=False)


def _values(records: Sequence[StepRecord | ValidationRecord], name: str) -> np.ndarray:
    """The numbers of a name, NaN where there was none."""
    return np.array([math.nan if (value := getattr(record, name)) is None else value for record in records])


def draw_positions(records: list[Record], path: Path) -> bool:
    """Writes the validation loss by how many tokens of its document a token has before it, as a PNG.

    Where long contexts are used, lines fall to the right. Beside it, where there is a probe, what came
    of the needles. Each line is a validation, from light to dark; early ones, whose loss is far above
    the last, are left out, for the others' slopes would not be seen. Of a model that was extended the first
    is drawn in any case, and of first and last, dashed, what they reach in chunks of the old context.

    Returns:
      whether there was anything to draw.
    """
    validations = [r for r in records if isinstance(r, ValidationRecord) and losses_by_position(r)]
    if not validations:
        return False
    lines = _chosen(validations)
    probed = [record for record in lines if "needle" in record.evaluators]
    columns = 3 if probed else 1
    figure = Figure(figsize=(8.4 + 4 * (columns - 1), 4.6), dpi=120, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, width_ratios=[1.5, 1, 1][:columns])[0]
    _draw_positions(axes[0], lines)
    if probed:
        for ax, name in zip(axes[1:], ("found", "gain"), strict=True):
            found = [by_depth(record.evaluators["needle"], name) for record in probed]
            _draw_lines(ax, probed, [(list(depths), list(depths.values())) for depths in found])
        axes[1].set(title="Needles found", ylim=(-0.03, 1.03))
        axes[1].yaxis.set_major_formatter(PercentFormatter(1.0))
        axes[2].set(title="What the needle tells of its answer", ylabel="bits a token")
        for ax in axes[1:]:
            ax.set_xlabel("where the needle lies, 0: the text's beginning")
    figure.legend(handles=axes[0].lines, loc="outside right upper", frameon=False, fontsize="small")
    figure.savefig(path)
    return True


def _draw_positions(ax: Axes, validations: list[ValidationRecord]):
    found = [losses_by_position(record) for record in validations]
    starts = sorted({start for losses in found for start in losses})
    points = [([starts.index(start) for start in losses], list(losses.values())) for losses in found]
    _draw_lines(ax, validations, points)
    _draw_old_context(ax, validations, starts)
    # Buckets double: places side by side are a logarithmic scale that has room for 0.
    ax.set_xticks(range(len(starts)), [f"{start:,}" for start in starts], rotation=30)
    ax.set(xlabel="tokens of the document before, at least", ylabel="nats a token")
    ax.set_title("Validation by context, at the full mask")


def _draw_old_context(ax: Axes, validations: list[ValidationRecord], starts: list[int]):
    found = [record for record in validations if "old_context" in record.evaluators]
    for record in found[:1] + found[1:][-1:]:
        old = record.evaluators["old_context"]
        losses = {starts.index(start): loss for start, loss in by_start(old).items() if start in starts}
        color = ax.lines[validations.index(record)].get_color()
        label = f"step {record.step:,}, {chunks_of(old)}"
        y = [math.nan if loss is None else loss for loss in losses.values()]
        ax.plot(list(losses), y, "s--", color=color, markersize=3, linewidth=1.2, label=label)


def _draw_lines(ax: Axes, records: list[ValidationRecord], points: Sequence[tuple[list, list]]):
    shades = colormaps["Blues"](np.linspace(0.35, 1.0, len(records)) if len(records) > 1 else [1.0])
    for record, shade, (x, y) in zip(records, shades, points, strict=True):
        ax.plot(x, y, "o-", color=shade, markersize=4, label=f"after step {record.step:,}")
    ax.grid(alpha=0.3)


def _chosen(validations: list[ValidationRecord]) -> list[ValidationRecord]:
    """Up to LINES of those near to the last one's loss, evenly spaced, the last included.

    The first is among them, as what was before, where a model was extended.
    """
    most = NEAR * (validations[-1].loss or math.inf)
    before = validations[0] if "old_context" in validations[0].evaluators else None
    near = [r for r in validations if r is before or (r.loss or math.inf) <= most]
    last = len(near) - 1
    return [near[i] for i in sorted({last * n // (LINES - 1) for n in range(LINES)})]


def losses_by_position(record: ValidationRecord) -> dict[int, float]:
    """Nats a token by the least tokens before, of those that are finite.

    Not bits per byte: tokens at the beginnings of documents spell more or fewer bytes than others.
    """
    return {int(start): loss for start, loss in record.positions.items() if loss is not None}
