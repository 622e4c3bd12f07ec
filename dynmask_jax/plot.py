"""Pictures of masks, curricula and plans. Needs matplotlib: `pip install "dynmask_jax[plot]"`.

In every picture a query is a row, from the top down, and a key is a column; both are numbered by
their place in the sequence. Each function returns the matplotlib figure, which a notebook shows by
itself and `figure.savefig(path)` writes; or draws on the `ax` it is given.

No picture grows beyond 512 x 512 cells. Where there are more tokens only every n-th is drawn, and the
axes say which: a pattern that repeats every few tokens is then better drawn over a shorter sequence.
"""

import dataclasses
import io
import math
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np

from dynmask_jax.array_typing import is_traced
from dynmask_jax.curricula import Curriculum
from dynmask_jax.masks import Mask, head_count, mask_tensor
from dynmask_jax.plans import FULL, SKIP, Plan, plan
from dynmask_jax.tokens import Tokens

try:
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MultipleLocator
    from matplotlib.transforms import ScaledTranslation
except ImportError as cause:
    raise ImportError('pictures need matplotlib: pip install "dynmask_jax[plot]"') from cause

__all__ = ["draw_curriculum", "draw_heads", "draw_mask", "draw_masks", "draw_plan"]

MOST_CELLS = 512
MOST_COLUMNS = 5
MOST_GRID_LINES = 32

# Okabe and Ito's colours, which the colour-blind tell apart; in grey print each is darker than the last.
UNSEEN, ASKED_HIDDEN, ASKED, SEEN = "#ececec", "#fae3b4", "#e69f00", "#0072b2"
MASK_COLOURS = {"hidden": UNSEEN, "visible": SEEN}
BLOCK_COLOURS = {"skip": UNSEEN, "test": ASKED, "full": SEEN}
PAIR_COLOURS = {"skip": UNSEEN, "test: hidden": ASKED_HIDDEN, "test: visible": ASKED, "full": SEEN}


def draw_mask(
    mask: Mask,
    q_tokens: Tokens,
    kv_tokens: Tokens | None = None,
    *,
    row: int = 0,
    head: int | None = None,
    ax: Axes | None = None,
) -> Figure:
    """The mask between tokens: a dark cell where the query (row) sees the key (column).

    Args:
      mask: any mask.
      q_tokens: the queries, `[T]` or `[B, T]`.
      kv_tokens: the keys, `[S]` or `[B, S]`; left out, the queries are the keys too.
      row: which sequence of a batch, from 0.
      head: which query head, from 0; needed where a leaf of the mask is per-head.
      ax: where to draw; by default a new figure.

    Returns:
      the figure. At most 512 x 512 tokens are drawn: every n-th, as the axes say.

    Raises:
      ValueError: a row or head out of range, a per-head mask without `head` (see `draw_heads`), or
        traced arguments.
      TypeError: the mask or the tokens are something else.

    >>> figure = draw_mask(Causal() & Window(2), Tokens.sequence(3))
    >>> figure.axes[0].images[0].get_array().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    q, k = _sequences(q_tokens, kv_tokens, row)
    mask = _of_head(mask, head)
    ax = _new_panels(1, (q.shape[0], k.shape[0]))[0] if ax is None else ax
    _draw_pairs(ax, mask, q, k)
    return _figure_of(ax)


def draw_masks(
    masks: Mapping[str, Mask],
    q_tokens: Tokens,
    kv_tokens: Tokens | None = None,
    *,
    row: int = 0,
    axes: Iterable[Axes] | None = None,
) -> Figure:
    """One panel for each mask, under its title.

    Args:
      masks: title -> mask.
      axes: where to draw, one for each; by default a new figure. The rest is as in `draw_mask`.

    Raises:
      ValueError: no masks, another number of axes, or as `draw_mask`.
    """
    return _draw_panels(list(masks.items()), _sequences(q_tokens, kv_tokens, row), axes)


def draw_heads(
    mask: Mask,
    q_tokens: Tokens,
    kv_tokens: Tokens | None = None,
    *,
    row: int = 0,
    axes: Iterable[Axes] | None = None,
) -> Figure:
    """One panel for each query head of a mask with per-head leaves. Arguments as in `draw_masks`.

    Raises:
      ValueError: no leaf is per-head, so that every head's picture would be the same; or as
        `draw_masks`.
    """
    _check_mask(mask)
    heads = head_count(mask)
    if heads is None:
        raise ValueError(f"{mask!r} is the same for every head: draw it with draw_mask")
    titled = [(f"head {n}", _of_head(mask, n)) for n in range(heads)]
    return _draw_panels(titled, _sequences(q_tokens, kv_tokens, row), axes)


def draw_curriculum(
    curriculum: Curriculum,
    steps: Sequence[int],
    q_tokens: Tokens,
    kv_tokens: Tokens | None = None,
    *,
    final_step: int | None = None,
    row: int = 0,
    head: int | None = None,
    axes: Iterable[Axes] | None = None,
) -> Figure:
    """The curriculum's mask at each of `steps`, in a panel titled with the step and the exposure.

    Args:
      curriculum: `step -> Mask`.
      steps: the training steps to draw.
      final_step: the exposure is visible pairs ÷ those at this step; by default the last of `steps`.
        It counts every token, drawn or not.
      row, head: which sequence of a batch and which query head, as in `draw_mask`.
      axes: where to draw, one for each step; by default a new figure.

    Raises:
      ValueError: no steps, nothing visible at `final_step`, or as `draw_masks`.
      TypeError: the curriculum is no function of the step, or as `draw_mask`.
    """
    if isinstance(curriculum, Mask) or not callable(curriculum):
        raise TypeError(f"curriculum must be a function step -> Mask, got {curriculum!r}")
    if len(steps) == 0:
        raise ValueError("nothing to draw: steps is empty")
    q, k = _sequences(q_tokens, kv_tokens, row)
    final = plan(_of_head(curriculum(steps[-1] if final_step is None else final_step), head), q, k)
    if final.visible_pairs() == 0:
        raise ValueError("the exposure has no measure: the curriculum shows nothing at its final step")
    titled = []
    for step in steps:
        mask = _of_head(curriculum(step), head)
        titled.append((f"step {step:,}\nexposure {float(plan(mask, q, k).exposure(final)):.1%}", mask))
    return _draw_panels(titled, (q, k), axes)


def draw_plan(
    plan: Plan, *, row: int = 0, pairs: bool = False, legend: bool = True, ax: Axes | None = None
) -> Figure:
    """The plan's blocks, skip, test and full, titled with the share that is skipped.

    Args:
      plan: a concrete plan, made outside `jit` or returned from it.
      row: which of the plan's rows, from 0. The share is of this row.
      pairs: also tell apart, inside the blocks to test, the pairs that are visible from those that
        are hidden. With per-head leaves, visible is what any head sees.
      legend: name the colours, below the picture.
      ax: where to draw; by default a new figure.

    Returns:
      the figure. At most 512 x 512 blocks (with `pairs`, tokens) are drawn, every n-th.

    Raises:
      ValueError: a row out of range, or a traced plan.
      TypeError: it is no plan.
    """
    _check_plan(plan, row)
    codes = np.asarray(plan.codes[row])
    ax = _new_panels(1, plan.lengths, legend=legend)[0] if ax is None else ax
    if pairs:
        _draw_blocks_and_pairs(ax, plan, row, codes)
    else:
        _draw_blocks(ax, plan, codes)
    _draw_block_edges(ax, plan)
    ax.set_title(f"{(codes == SKIP).mean():.1%} of blocks skipped")
    if legend:
        _name_colours(ax, PAIR_COLOURS if pairs else BLOCK_COLOURS)
    return _figure_of(ax)


class _Picture(Figure):
    """A figure that a notebook shows as the value of a cell.

    pyplot's figures do that through pyplot's list of open figures, which keeps every picture alive
    until it is closed, and needs a backend. This one belongs to its caller.
    """

    def _repr_png_(self) -> bytes:
        png = io.BytesIO()
        self.savefig(png, format="png")
        return png.getvalue()


def _draw_panels(
    titled: Sequence[tuple[str, Mask]], tokens: tuple[Tokens, Tokens], axes: Iterable[Axes] | None
) -> Figure:
    if not titled:
        raise ValueError("nothing to draw: there is no mask")
    masks = [_of_head(mask, None) for _, mask in titled]
    q, k = tokens
    panels = _new_panels(len(titled), (q.shape[0], k.shape[0])) if axes is None else list(axes)
    if len(panels) != len(titled):
        raise ValueError(f"axes must hold one for each of {len(titled)} panels, got {len(panels)}")
    for ax, (title, _), mask in zip(panels, titled, masks, strict=True):
        _draw_pairs(ax, mask, q, k)
        ax.set_title(title, fontsize="medium")
    if axes is None:
        _name_outer_axes_only(panels)
    return _figure_of(panels[0])


def _draw_pairs(ax: Axes, mask: Mask, q: Tokens, k: Tokens):
    every = _every(q.shape[0]), _every(k.shape[0])
    visible = np.asarray(mask_tensor(mask, q[:: every[0]], k[:: every[1]]))
    lengths = q.shape[0], k.shape[0]
    _draw_cells(ax, _Cells(visible.astype(np.uint8), lengths, every, pitch=every), MASK_COLOURS)


def _draw_blocks(ax: Axes, plan: Plan, codes: np.ndarray):
    every = _every(codes.shape[0]), _every(codes.shape[1])
    pitch = every[0] * plan.block_q, every[1] * plan.block_k
    cells = _Cells(codes[:: every[0], :: every[1]], plan.lengths, every, pitch, kind="block")
    _draw_cells(ax, cells, BLOCK_COLOURS)


def _draw_blocks_and_pairs(ax: Axes, plan: Plan, row: int, codes: np.ndarray):
    (t, s), every = plan.lengths, (_every(plan.lengths[0]), _every(plan.lengths[1]))
    q_index, k_index = np.arange(0, t, every[0]), np.arange(0, s, every[1])
    seen = np.asarray(mask_tensor(plan.mask, plan.q_tokens[row, q_index], plan.kv_tokens[row, k_index]))
    seen = seen.any(axis=0) if seen.ndim == 3 else seen
    code = codes[q_index // plan.block_q][:, k_index // plan.block_k]
    place = np.select([code == SKIP, code == FULL], [0, 3], default=1 + seen)  # in PAIR_COLOURS
    _draw_cells(ax, _Cells(place, (t, s), every, pitch=every), PAIR_COLOURS)


@dataclasses.dataclass(frozen=True)
class _Cells:
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


def _draw_cells(ax: Axes, cells: _Cells, colours: Mapping[str, str]):
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


def _name_outer_axes_only(panels: Sequence[Axes]):
    for ax in panels:
        place = ax.get_subplotspec()
        assert place is not None
        if not place.is_first_col():
            ax.set_ylabel("")
        if not place.is_last_row():
            ax.set_xlabel("")


def _draw_block_edges(ax: Axes, plan: Plan):
    for line, size, length in (
        (ax.axhline, plan.block_q, plan.lengths[0]),
        (ax.axvline, plan.block_k, plan.lengths[1]),
    ):
        if length <= size * MOST_GRID_LINES:
            for edge in range(size, length, size):
                line(edge - 0.5, color="white", linewidth=0.8)


def _name_colours(ax: Axes, colours: Mapping[str, str]):
    names = [Patch(facecolor=colour, edgecolor="grey", label=name) for name, colour in colours.items()]
    columns = len(names) if len(names) < 4 else 2
    # Below the ticks and the name of the keys, which take up inches, not a share of the axes.
    below = ax.transAxes + ScaledTranslation(0, -0.45, _figure_of(ax).dpi_scale_trans)
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "bbox_transform": below}
    ax.legend(handles=names, ncols=columns, frameon=False, **place)


def _every(count: int) -> int:
    """n such that every n-th of `count` is at most MOST_CELLS."""
    return -(-count // MOST_CELLS)


def _tick_distance(length: int, share: float) -> int:
    """A power of two, as block and chunk sizes mostly are, for up to five ticks, or `share` of that.

    `share` is of the picture's longer side: a narrow one has room for two.
    """
    return 2 ** max(0, math.ceil(math.log2(length / max(2, 5 * share))))


def _aspect(lengths: tuple[int, int]) -> float:
    """Height over width of a picture of T x S tokens: to scale, but never a mere line."""
    return min(max(lengths[0] / lengths[1], 1 / 4), 4)


def _new_panels(count: int, lengths: tuple[int, int], *, legend: bool = False) -> list[Axes]:
    """The axes of a new figure, in lines of at most MOST_COLUMNS; T x S tokens fit into each."""
    lines = -(-count // MOST_COLUMNS)
    columns = -(-count // lines)
    side, aspect = (3.5 if count == 1 else 1.8), _aspect(lengths)  # inches
    # Beside the picture stand ticks and names: to the left, and below it with the title above.
    width, height = side * min(1, 1 / aspect) + 0.5, side * min(1, aspect) + 1.0 + 0.6 * legend
    figure = _Picture(figsize=(width * columns, height * lines), layout="constrained")
    return [figure.add_subplot(lines, columns, place) for place in range(1, count + 1)]


def _figure_of(ax: Axes) -> Figure:
    figure = ax.figure
    return figure if isinstance(figure, Figure) else figure.figure


def _sequences(q_tokens: Tokens, kv_tokens: Tokens | None, row: int) -> tuple[Tokens, Tokens]:
    """The queries `[T]` and keys `[S]` of one sequence of the batch."""
    both = q_tokens, q_tokens if kv_tokens is None else kv_tokens
    for name, tokens in zip(("q_tokens", "kv_tokens"), both, strict=True):
        if not isinstance(tokens, Tokens):
            raise TypeError(f"{name} must be Tokens (Tokens.sequence(T), say), got {type(tokens).__name__}")
        if len(tokens.shape) not in (1, 2) or 0 in tokens.shape:
            raise ValueError(f"{name} must have shape [T] or [B, T], none of them 0, got {tokens.shape}")
    _check_concrete(both, "tokens")
    batch = max((tokens.shape[0] for tokens in both if len(tokens.shape) == 2), default=1)
    _check_range("row", row, batch)
    q, k = (tokens[row] if len(tokens.shape) == 2 else tokens for tokens in both)
    return q, k


def _of_head(mask: Mask, head: int | None) -> Mask:
    """The mask of one head, all of its leaves scalars."""
    _check_mask(mask)
    heads = head_count(mask)
    if heads is None:
        if head is not None:
            raise ValueError(f"{mask!r} is the same for every head: leave out head={head}")
        return mask
    if head is None:
        raise ValueError(f"the mask has leaves for {heads} heads: choose one with head=, or use draw_heads")
    _check_range("head", head, heads)
    return jax.tree.map(lambda leaf: leaf[head] if np.ndim(leaf) else leaf, mask)


def _check_mask(mask: Mask):
    if not isinstance(mask, Mask):
        remedy = "; call a curriculum with the step first, or use draw_curriculum" if callable(mask) else ""
        raise TypeError(f"mask must be a Mask, got {type(mask).__name__}{remedy}")
    _check_concrete(mask, "mask")


def _check_plan(plan: Plan, row: int):
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan, got {type(plan).__name__}; draw a mask with draw_mask")
    _check_concrete(plan, "plan")
    _check_range("row", row, plan.rows)


def _check_concrete(value, name: str):
    if any(map(is_traced, jax.tree.leaves(value))):
        raise ValueError(
            f"a traced {name} cannot be drawn: return it from the jitted function, draw it there"
        )


def _check_range(name: str, index: int, count: int):
    if not 0 <= index < count:
        raise ValueError(f"{name} must lie in 0…{count - 1}, got {index}")
