"""Cells of a picture: a matrix over queries and keys, in named colours, on matplotlib's axes.

What masks, curricula and plans draw with (`dynmask_jax.plot`). Needs matplotlib, but not pyplot.
"""

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence

import numpy as np

try:
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MultipleLocator
    from matplotlib.transforms import ScaledTranslation
except ImportError as cause:
    raise ImportError('pictures need matplotlib: pip install "dynmask_jax[plot]"') from cause

MOST_CELLS = 512
MOST_COLUMNS = 5
MOST_GRID_LINES = 32

# Okabe and Ito's colours, which the colour-blind tell apart; in grey print each is darker than the last.
UNSEEN, ASKED_HIDDEN, ASKED, SEEN = "#ececec", "#fae3b4", "#e69f00", "#0072b2"
MASK_COLOURS = {"hidden": UNSEEN, "visible": SEEN}
BLOCK_COLOURS = {"skip": UNSEEN, "test": ASKED, "full": SEEN}
PAIR_COLOURS = {"skip": UNSEEN, "test: hidden": ASKED_HIDDEN, "test: visible": ASKED, "full": SEEN}


@dataclasses.dataclass(frozen=True)
class Cells:
    """What to draw of T x S tokens; each pair is over (queries, keys).

    Attributes:
      values: places in a table of colours.
      lengths: T and S.
      every: n where every n-th token or block is drawn.
      pitch: tokens from one cell to the next.
      kind: what a cell stands for, "token" or "block".
    """

    values: np.ndarray
    lengths: tuple[int, int]
    every: tuple[int, int]
    pitch: tuple[int, int]
    kind: str = "token"


def every_nth(count: int) -> int:
    """n such that every n-th of `count` is at most MOST_CELLS."""
    return -(-count // MOST_CELLS)


def draw_cells(ax: Axes, cells: Cells, colours: Mapping[str, str]):
    """The cells on the axes, queries going down, in the colours that their values are places of."""
    (rows, columns), (t, s) = cells.values.shape, cells.lengths
    ax.imshow(
        cells.values,
        cmap=ListedColormap(list(colours.values())),
        vmin=-0.5,
        vmax=len(colours) - 0.5,
        # Colours are averaged where cells are smaller than pixels; the mean of two codes is a third.
        interpolation="antialiased",
        interpolation_stage="rgba",
        aspect="auto",
        extent=(-0.5, columns * cells.pitch[1] - 0.5, rows * cells.pitch[0] - 0.5, -0.5),
    )
    # The last cell may reach beyond the sequence: a ragged block, or the tokens after a drawn one.
    ax.set(xlim=(-0.5, s - 0.5), ylim=(t - 0.5, -0.5), box_aspect=_aspect((t, s)))
    for axis, name, length, n in (
        (ax.yaxis, "query", t, cells.every[0]),
        (ax.xaxis, "key", s, cells.every[1]),
    ):
        axis.set_label_text(name if n == 1 else f"{name} (1 {cells.kind} in {n})")
        axis.set_major_locator(MultipleLocator(_tick_distance(length, min(1, length / max(t, s)))))


def _tick_distance(length: int, share: float) -> int:
    """A power of two, as block and chunk sizes mostly are, for up to five ticks, or `share` of that.

    `share` is of the picture's longer side: a narrow one has room for two.
    """
    return 2 ** max(0, math.ceil(math.log2(length / max(2, 5 * share))))


def _aspect(lengths: tuple[int, int]) -> float:
    """Height over width of a picture of T x S tokens: to scale, but never a mere line."""
    return min(max(lengths[0] / lengths[1], 1 / 4), 4)


def draw_edges(ax: Axes, lengths: tuple[int, int], block: tuple[int, int]):
    """Lines between blocks of queries and of keys, unless there are so many that they hide the cells."""
    for line, length, size in zip((ax.axhline, ax.axvline), lengths, block, strict=True):
        if length <= size * MOST_GRID_LINES:
            for edge in range(size, length, size):
                line(edge - 0.5, color="white", linewidth=0.8)


def name_colours(ax: Axes, colours: Mapping[str, str]):
    """A legend below the axes."""
    names = [Patch(facecolor=colour, edgecolor="grey", label=name) for name, colour in colours.items()]
    columns = len(names) if len(names) < 4 else 2
    # Below the ticks and the name of the keys, which take up inches, not a share of the axes.
    below = ax.transAxes + ScaledTranslation(0, -0.45, figure_of(ax).dpi_scale_trans)
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "bbox_transform": below}
    ax.legend(handles=names, ncols=columns, frameon=False, **place)


def new_panels(count: int, lengths: tuple[int, int], *, legend: bool = False) -> list[Axes]:
    """The axes of a new figure, in lines of at most MOST_COLUMNS; T x S tokens fit into each."""
    lines = -(-count // MOST_COLUMNS)
    columns = -(-count // lines)
    side, aspect = (3.5 if count == 1 else 1.8), _aspect(lengths)  # inches
    # Ticks and names stand to the left, and below with the title above. Title and legend need width.
    width = max(side * min(1, 1 / aspect) + 0.5, 3.4 if legend else 1.6)
    height = side * min(1, aspect) + 1.0 + 0.6 * legend
    figure = Picture(figsize=(width * columns, height * lines), layout="compressed")
    return [figure.add_subplot(lines, columns, place) for place in range(1, count + 1)]


def name_outer_axes_only(panels: Sequence[Axes]):
    """Leaves "query" to the first column of panels, and "key" to the last line."""
    for ax in panels:
        place = ax.get_subplotspec()
        assert place is not None
        if not place.is_first_col():
            ax.set_ylabel("")
        if not place.is_last_row():
            ax.set_xlabel("")


def figure_of(ax: Axes) -> Figure:
    """The figure that holds the axes, also where they stand in a part of it."""
    figure = ax.figure
    return figure if isinstance(figure, Figure) else figure.figure


class Picture(Figure):
    """A figure that a notebook shows as the value of a cell.

    pyplot's figures do that through pyplot's list of open figures, which keeps every picture alive
    until it is closed, and needs a backend. This one belongs to its caller.
    """

    def _repr_png_(self) -> bytes:
        png = io.BytesIO()
        self.savefig(png, format="png")
        return png.getvalue()
