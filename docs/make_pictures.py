"""Draws the pictures of the documentation, docs/*.png: `python docs/make_pictures.py`.

curriculum.png is drawn from the library, balance.png from docs/benchmarks/balance.json.
"""

import io
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from dynmask_jax import Plan, Tokens, growing_window, linear, plan
from dynmask_jax.plot import draw_plan
from dynmask_jax.plot_cells import PAIR_COLOURS

TOKENS = Tokens.sequence(128)
BLOCK = 8
END = 1_000
STEPS = (0, 250, 500, 750, END)
CURRICULUM = growing_window(linear(8, 128, END))
MEANING = {
    "skip": "no pair visible: never computed",
    "full": "every pair visible: computed without the mask",
    "test: visible": "some pairs visible: computed …",
    "test: hidden": "… and the others masked",
}
BALANCE_CURRICULA = ("growing window, linear", "growing chunks, linear", "reveal, nearest")
BALANCE_PANELS = {
    "max/mean work": ("imbalance", 1),
    "GiB each device sends": ("bytes", 2**30),
    "estimated seconds a layer": ("milliseconds", 1e3),
}
LAYOUT_STYLES = {
    "contiguous": {"color": "#0072b2", "linestyle": "--", "linewidth": 2},
    "zigzag": {"color": "#e69f00", "linestyle": "-.", "linewidth": 2},
    "picked": {"color": "#d55e00", "linewidth": 2.5, "marker": "o", "markersize": 4},
}


def plan_at(step) -> Plan:
    return plan(CURRICULUM(step), TOKENS, block_q=BLOCK, block_k=BLOCK)


def curriculum_picture() -> Figure:
    """The plan at five steps, above the exposure and the work at every step."""
    figure = Figure(figsize=(16, 7.4), dpi=100)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    grid = figure.add_gridspec(2, 1, height_ratios=(4.9, 2.5))
    plans, work = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    plans.suptitle("The mask is a function of the training step. Attention costs what it shows.", fontsize=19)
    for place, step in enumerate(STEPS, start=1):
        ax = plans.add_subplot(1, len(STEPS), place)
        draw_plan(plan_at(step), pairs=True, legend=False, ax=ax)
        ax.set_title(f"step {step:,}\n{ax.get_title()}", fontsize=14)
        ax.set_xlabel("key", fontsize=13)
        ax.set_ylabel("query" if place == 1 else "", fontsize=13)
    names = [Patch(facecolor=PAIR_COLOURS[kind], edgecolor="grey", label=MEANING[kind]) for kind in MEANING]
    plans.legend(handles=names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=13)
    draw_work(work.subplots())
    return figure


def draw_work(ax):
    """Blocks computed and pairs visible, as shares of those at the end of the curriculum."""
    steps = np.arange(END + 1)
    # The step is data: one compilation serves them all.
    pairs, blocks = jax.lax.map(lambda step: _work(plan_at(step)), jnp.asarray(steps))
    ax.plot(steps, 100 * blocks / blocks[-1], color="#d55e00", linewidth=2.5, label="blocks computed")
    ax.plot(
        steps, 100 * pairs / pairs[-1], "--", color="black", linewidth=2, label="pairs visible (exposure)"
    )
    ax.set(xlim=(0, END), ylim=(0, 105), xticks=STEPS, yticks=(0, 50, 100), yticklabels=("0", "50%", "100%"))
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.tick_params(labelsize=12)
    ax.set_xlabel("training step", fontsize=13)
    ax.set_ylabel("of the final mask", fontsize=13)
    ax.grid(alpha=0.3)
    ax.legend(loc="lower right", fontsize=13)


def _work(the_plan: Plan):
    return the_plan.visible_pairs(), the_plan.active


def balance_picture(results: dict) -> Figure:
    """Evenness, traffic and time of three layouts over three curricula, from the benchmark's results."""
    figure = Figure(figsize=(14, 8.6), dpi=100, layout="constrained")
    panels = figure.subplots(len(BALANCE_PANELS), len(BALANCE_CURRICULA), sharex=True, sharey="row")
    for column, name in zip(panels.T, BALANCE_CURRICULA, strict=True):
        rows = [row for row in results["rows"] if row["curriculum"] == name]
        for ax, (what, unit) in zip(column, BALANCE_PANELS.values(), strict=True):
            for layout, style in LAYOUT_STYLES.items():
                values = [row[layout][what] / unit for row in rows]
                ax.plot([row["stage"] / 10 for row in rows], values, label=layout, **style)
            ax.grid(alpha=0.3)
        column[0].axhline(1.15, color="grey", linestyle=":", linewidth=1.5, label="1.15")
        column[0].set_title(name, fontsize=13)
        column[-1].set_xlabel("share of the growth, %", fontsize=12)
    for ax, label in zip(panels[:, 0], BALANCE_PANELS, strict=True):
        ax.set_ylabel(label, fontsize=12)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=12)
    return figure


def save(figure: Figure, path: Path):
    """Writes a PNG of 64 colours, a third of the size of the full range's."""
    png = io.BytesIO()
    figure.savefig(png)
    Image.open(png).convert("RGB").quantize(64).save(path, optimize=True)


if __name__ == "__main__":
    docs = Path(__file__).parent
    save(curriculum_picture(), docs / "curriculum.png")
    balance = json.loads((docs / "benchmarks" / "balance.json").read_text(encoding="utf-8"))
    save(balance_picture(balance), docs / "balance.png")
