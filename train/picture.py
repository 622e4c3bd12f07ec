"""The picture of a run: its mask at several steps beside its loss."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynmask_jax import Tokens
from dynmask_jax.plot import draw_masks
from train.config import Run
from train.curriculum import Growth
from train.metrics import Record

PANELS = 4


def draw(records: list[Record], growth: Growth, run: Run, path: Path):
    """Writes the picture as a PNG.

    Args:
      records: the run's metrics.
      growth: its curriculum.
      run: its config.
      path: of the file.
    """
    steps = [r for r in records if "loss" in r]
    figure = Figure(figsize=(12, 5), dpi=120, layout="constrained")
    axes = figure.subplot_mosaic("01L\n23L", width_ratios=(1, 1, 2.4))
    shown = _spread(steps, growing=round(run.steps * run.curriculum.share))
    titles = {
        f"step {r['step']:,}: window {r['window']:,}\nexposure {r['exposure']:.1%}": growth.mask(r["step"])
        for r in shown
    }
    panels = [axes[str(n)] for n in range(PANELS)]
    draw_masks(titles, Tokens.sequence(run.data.length), axes=panels[: len(shown)])
    for ax in panels[len(shown) :]:
        ax.set_visible(False)
    _draw_loss(axes["L"], steps, [r for r in records if "validation_loss" in r])
    figure.savefig(path)


def _spread(steps: list[Record], growing: int) -> list[Record]:
    """Up to PANELS of the steps, evenly spaced from the first to where the growth ends."""
    last = min(growing, len(steps) - 1)
    return [steps[i] for i in sorted({last * n // (PANELS - 1) for n in range(PANELS)})]


def _draw_loss(ax: Axes, steps: list[Record], validations: list[Record]):
    numbers = [r["step"] for r in steps]
    ax.plot(numbers, [r["bits_per_byte"] for r in steps], linewidth=0.8, label="training, at the step's mask")
    ax.plot(
        [r["step"] for r in validations],
        [r["validation_bits_per_byte"] for r in validations],
        "o-",
        label="validation, at the full mask",
    )
    ax.set(xlabel="step", ylabel="bits per byte", ylim=(0, None))
    exposure = ax.twinx()
    exposure.plot(numbers, [r["exposure"] for r in steps], color="grey", linestyle=":", label="exposure")
    exposure.set(ylabel="exposure", ylim=(0, 1.05))
    lines = [*ax.lines, *exposure.lines]
    names = [str(line.get_label()) for line in lines]
    ax.legend(lines, names, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(lines), frameon=False)
