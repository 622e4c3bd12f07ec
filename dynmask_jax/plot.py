"""Pictures of masks, curricula and plans. Needs matplotlib: `pip install "dynmask_jax[plot]"`.

In every picture a query is a row, from the top down, and a key is a column; both are numbered by
their place in the sequence. Each function returns the matplotlib figure, which a notebook shows by
itself and `figure.savefig(path)` writes; or draws on the `ax` it is given.

No picture grows beyond 512 x 512 cells. Where there are more tokens only every n-th is drawn, and the
axes say which: a pattern that repeats every few tokens is then better drawn over a shorter sequence.
"""

from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np

from dynmask_jax.array_typing import is_traced
from dynmask_jax.block_codes import FULL, SKIP
from dynmask_jax.curricula import Curriculum
from dynmask_jax.mask_algebra import Mask, head_count, mask_tensor
from dynmask_jax.plans import Plan, plan
from dynmask_jax.plot_cells import (
    BLOCK_COLOURS,
    MASK_COLOURS,
    PAIR_COLOURS,
    Axes,
    Cells,
    Figure,
    draw_cells,
    draw_edges,
    every_nth,
    figure_of,
    name_colours,
    name_outer_axes_only,
    new_panels,
)
from dynmask_jax.tokens import Tokens, check_tokens

__all__ = ["draw_curriculum", "draw_heads", "draw_mask", "draw_masks", "draw_plan"]


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
    ax = new_panels(1, (q.shape[0], k.shape[0]))[0] if ax is None else ax
    _draw_pairs(ax, mask, q, k)
    return figure_of(ax)


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
    ax = new_panels(1, plan.lengths, legend=legend)[0] if ax is None else ax
    if pairs:
        _draw_blocks_and_pairs(ax, plan, row, codes)
    else:
        _draw_blocks(ax, plan, codes)
    draw_edges(ax, plan.lengths, (plan.block_q, plan.block_k))
    ax.set_title(f"{(codes == SKIP).mean():.1%} of blocks skipped")
    if legend:
        name_colours(ax, PAIR_COLOURS if pairs else BLOCK_COLOURS)
    return figure_of(ax)


def _draw_panels(
    titled: Sequence[tuple[str, Mask]], tokens: tuple[Tokens, Tokens], axes: Iterable[Axes] | None
) -> Figure:
    if not titled:
        raise ValueError("nothing to draw: there is no mask")
    masks = [_of_head(mask, None) for _, mask in titled]
    q, k = tokens
    panels = new_panels(len(titled), (q.shape[0], k.shape[0])) if axes is None else list(axes)
    if len(panels) != len(titled):
        raise ValueError(f"axes must hold one for each of {len(titled)} panels, got {len(panels)}")
    for ax, (title, _), mask in zip(panels, titled, masks, strict=True):
        _draw_pairs(ax, mask, q, k)
        ax.set_title(title, fontsize="medium")
    if axes is None:
        name_outer_axes_only(panels)
    return figure_of(panels[0])


def _draw_pairs(ax: Axes, mask: Mask, q: Tokens, k: Tokens):
    every = every_nth(q.shape[0]), every_nth(k.shape[0])
    visible = np.asarray(mask_tensor(mask, q[:: every[0]], k[:: every[1]]))
    lengths = q.shape[0], k.shape[0]
    draw_cells(ax, Cells(visible.astype(np.uint8), lengths, every, pitch=every), MASK_COLOURS)


def _draw_blocks(ax: Axes, plan: Plan, codes: np.ndarray):
    every = every_nth(codes.shape[0]), every_nth(codes.shape[1])
    pitch = every[0] * plan.block_q, every[1] * plan.block_k
    cells = Cells(codes[:: every[0], :: every[1]], plan.lengths, every, pitch, kind="block")
    draw_cells(ax, cells, BLOCK_COLOURS)


def _draw_blocks_and_pairs(ax: Axes, plan: Plan, row: int, codes: np.ndarray):
    (t, s), every = plan.lengths, (every_nth(plan.lengths[0]), every_nth(plan.lengths[1]))
    q_index, k_index = np.arange(0, t, every[0]), np.arange(0, s, every[1])
    seen = np.asarray(mask_tensor(plan.mask, plan.q_tokens[row, q_index], plan.kv_tokens[row, k_index]))
    seen = seen.any(axis=0) if seen.ndim == 3 else seen
    code = codes[q_index // plan.block_q][:, k_index // plan.block_k]
    place = np.select([code == SKIP, code == FULL], [0, 3], default=1 + seen)  # in PAIR_COLOURS
    draw_cells(ax, Cells(place, (t, s), every, pitch=every), PAIR_COLOURS)


def _sequences(q_tokens: Tokens, kv_tokens: Tokens | None, row: int) -> tuple[Tokens, Tokens]:
    """The queries `[T]` and keys `[S]` of one sequence of the batch."""
    both = q_tokens, q_tokens if kv_tokens is None else kv_tokens
    check_tokens(*both)
    _check_concrete(both, "tokens")
    batches = {tokens.shape[0] for tokens in both if len(tokens.shape) == 2}
    _check_range("row", row, max(batches, default=1))
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
            f"a traced {name} cannot be drawn: return it from the jitted function and draw it outside"
        )


def _check_range(name: str, index: int, count: int):
    if not 0 <= index < count:
        raise ValueError(f"{name} must lie in 0…{count - 1}, got {index}")
