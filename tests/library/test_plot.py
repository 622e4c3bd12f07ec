"""Pictures: what is drawn is what the mask and the plan say, and what cannot be drawn is refused."""

import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from slow import mostly

from dynmask_jax import (
    Causal,
    Chunks,
    Everything,
    Prefix,
    SameSegment,
    Tokens,
    Window,
    growing_window,
    linear,
    mask_tensor,
    plan,
)

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from dynmask_jax.plot import (
    draw_curriculum,
    draw_heads,
    draw_mask,
    draw_masks,
    draw_plan,
)
from dynmask_jax.plot_cells import BLOCK_COLOURS, MASK_COLOURS, PAIR_COLOURS

TOKENS = Tokens.sequence(12)
BANDED = Causal() & Window(4)
PER_HEAD = Causal() & Window(np.array([1, 4, 9], np.int32))


def drawn(figure: Figure, panel: int = 0) -> np.ndarray:
    """The cells of a panel, as places in its table of colours."""
    (image,) = figure.axes[panel].images
    return np.asarray(image.get_array())


def colours(figure: Figure) -> list[str]:
    """What the places of the first panel stand for, in order, as `#rrggbb`."""
    image = figure.axes[0].images[0]
    places = image.cmap(image.norm(np.arange(image.cmap.N)))
    return ["#" + "".join(f"{round(part * 255):02x}" for part in rgba[:3]) for rgba in places]


def titles(figure: Figure) -> list[str]:
    return [ax.get_title() for ax in figure.axes]


def test_a_mask_is_drawn_pair_by_pair_with_queries_going_down():
    mask, keys = Causal() | Prefix(3), Tokens.sequence(7)
    figure = draw_mask(mask, TOKENS, keys)
    ax = figure.axes[0]
    np.testing.assert_array_equal(drawn(figure), mask_tensor(mask, TOKENS, keys))
    assert colours(figure) == list(MASK_COLOURS.values())
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("query", "key")
    assert ax.get_ylim() == (11.5, -0.5)
    assert ax.get_xlim() == (-0.5, 6.5)


@pytest.mark.parametrize(("length", "ticks"), [(5, [0, 1, 2, 3, 4]), (64, [0, 16, 32, 48])])
def test_ticks_are_whole_tokens(length, ticks):
    ax = draw_mask(Causal(), Tokens.sequence(length)).axes[0]
    for axis in (ax.xaxis, ax.yaxis):
        low, high = sorted(axis.get_view_interval())
        assert [tick for tick in axis.get_ticklocs() if low < tick < high] == ticks


def test_a_row_of_a_batch_is_drawn_with_its_own_tokens():
    lengths = ([4, 8], [7, 5])
    rows = [Tokens.packed(row) for row in lengths]
    batch = jax.tree.map(lambda *x: np.stack(x), *rows)
    mask = Causal() & SameSegment()
    for row, tokens in enumerate(rows):
        np.testing.assert_array_equal(drawn(draw_mask(mask, batch, row=row)), mask_tensor(mask, tokens))
    # Keys shared by the batch go with any row of the queries.
    expected = mask_tensor(mask, rows[1], TOKENS)
    np.testing.assert_array_equal(drawn(draw_mask(mask, batch, TOKENS, row=1)), expected)


def test_every_head_has_its_own_picture():
    panels = draw_heads(PER_HEAD, TOKENS)
    assert titles(panels) == ["head 0", "head 1", "head 2"]
    for head, length in enumerate((1, 4, 9)):
        expected = mask_tensor(Causal() & Window(length), TOKENS)
        np.testing.assert_array_equal(drawn(panels, head), expected)
        np.testing.assert_array_equal(drawn(draw_mask(PER_HEAD, TOKENS, head=head)), expected)


def test_a_long_sequence_is_thinned_out_and_says_so():
    figure = draw_mask(Causal() & Window(100), Tokens.sequence(1_500), Tokens.sequence(600))
    ax = figure.axes[0]
    queries, keys = np.arange(0, 1_500, 3), np.arange(0, 600, 2)
    distance = queries[:, None] - keys[None, :]
    np.testing.assert_array_equal(drawn(figure), (distance >= 0) & (distance < 100))
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("query (1 token in 3)", "key (1 token in 2)")
    # Token i lies at i on the axis, however few are drawn.
    assert ax.images[0].get_extent() == [-0.5, 599.5, 1_499.5, -0.5]


def test_as_many_tokens_as_fit_are_all_drawn():
    assert drawn(draw_mask(Causal(), Tokens.sequence(512))).shape == (512, 512)
    assert drawn(draw_mask(Causal(), Tokens.sequence(513))).shape == (257, 257)


def test_masks_stand_side_by_side_under_their_names():
    masks = {f"Chunks({n})": Chunks(n) for n in (1, 2, 3, 4, 6, 12)}
    figure = draw_masks(masks, TOKENS)
    assert titles(figure) == list(masks)
    for panel, mask in enumerate(masks.values()):
        np.testing.assert_array_equal(drawn(figure, panel), mask_tensor(mask, TOKENS))
    # Two lines of three panels: only the outer ones name their axes.
    assert [ax.get_ylabel() for ax in figure.axes] == ["query", "", ""] * 2
    assert [ax.get_xlabel() for ax in figure.axes] == [""] * 3 + ["key"] * 3


def test_a_curriculum_shows_its_steps_and_their_exposure():
    curriculum = growing_window(linear(1, 12, steps=11))
    figure = draw_curriculum(curriculum, [0, 3, 1_100], TOKENS)
    for panel, step in enumerate((0, 3, 1_100)):
        np.testing.assert_array_equal(drawn(figure, panel), mask_tensor(curriculum(step), TOKENS))
    # Of 78 causal pairs a window of 1 shows 12, and one of 4 shows 12 + 11 + 10 + 9.
    assert titles(figure) == [
        "step 0\nexposure 15.4%",
        "step 3\nexposure 53.8%",
        "step 1,100\nexposure 100.0%",
    ]


def test_exposure_is_measured_against_the_final_step():
    curriculum = growing_window(linear(1, 12, steps=11))
    assert titles(draw_curriculum(curriculum, [0], TOKENS)) == ["step 0\nexposure 100.0%"]
    assert titles(draw_curriculum(curriculum, [0], TOKENS, final_step=11)) == ["step 0\nexposure 15.4%"]


def test_exposure_counts_tokens_that_are_not_drawn():
    # A window of 1 shows the diagonal of 1,024 · 1,025 / 2 pairs; on every other token alone it
    # would be 512 of 512 · 513 / 2.
    curriculum = growing_window(linear(1, 1_024, steps=10))
    figure = draw_curriculum(curriculum, [0], Tokens.sequence(1_024), final_step=10)
    assert titles(figure) == [f"step 0\nexposure {2 / 1_025:.1%}"]
    assert drawn(figure).shape == (512, 512)


def test_one_head_of_a_curriculum_has_its_own_exposure():
    figure = draw_curriculum(lambda step: PER_HEAD, [0], TOKENS, head=1)
    np.testing.assert_array_equal(drawn(figure), mask_tensor(BANDED, TOKENS))
    growing = lambda step: Causal() & Window(np.array([1, 12], np.int32) * step)  # noqa: E731
    assert titles(draw_curriculum(growing, [1, 12], TOKENS, head=0))[0] == "step 1\nexposure 15.4%"
    assert titles(draw_curriculum(growing, [1, 12], TOKENS, head=1))[0] == "step 1\nexposure 100.0%"


def test_a_plan_is_drawn_block_by_block():
    the_plan = plan(Causal() & Window(6), TOKENS, block_q=3, block_k=2)
    figure = draw_plan(the_plan)
    np.testing.assert_array_equal(drawn(figure), the_plan.codes[0])
    assert colours(figure) == list(BLOCK_COLOURS.values())
    codes = np.asarray(the_plan.codes[0])
    assert {0, 1, 2} == set(codes.ravel().tolist())
    assert titles(figure) == [f"{(codes == 0).mean():.1%} of blocks skipped"]
    legend = figure.axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["skip", "test", "full"]


def test_a_plan_can_show_the_pairs_inside_its_blocks():
    mask, names = Causal() & Window(6), list(PAIR_COLOURS)
    the_plan = plan(mask, TOKENS, block_q=3, block_k=2)
    figure = draw_plan(the_plan, pairs=True)
    places = drawn(figure)
    assert colours(figure) == list(PAIR_COLOURS.values())
    seen = (places == names.index("test: visible")) | (places == names.index("full"))
    np.testing.assert_array_equal(seen, mask_tensor(mask, TOKENS))
    codes = np.kron(np.asarray(the_plan.codes[0]), np.ones((3, 2), int))
    np.testing.assert_array_equal(places == names.index("skip"), codes == 0)
    np.testing.assert_array_equal(places == names.index("full"), codes == 2)


def test_a_plan_over_heads_shows_what_any_head_sees():
    figure = draw_plan(plan(PER_HEAD, TOKENS, block_q=3, block_k=3), pairs=True)
    seen = np.isin(drawn(figure), [list(PAIR_COLOURS).index(name) for name in ("test: visible", "full")])
    np.testing.assert_array_equal(seen, mask_tensor(Causal() & Window(9), TOKENS))


def test_a_ragged_block_ends_with_the_sequence():
    ax = draw_plan(plan(Everything(), TOKENS, block_q=5, block_k=8)).axes[0]
    assert ax.images[0].get_extent() == [-0.5, 15.5, 14.5, -0.5]
    assert (ax.get_xlim(), ax.get_ylim()) == ((-0.5, 11.5), (11.5, -0.5))


def test_a_plan_of_many_blocks_is_thinned_out_and_says_so():
    the_plan = plan(BANDED, Tokens.sequence(1_100), block_q=1, block_k=4)
    figure = draw_plan(the_plan)
    np.testing.assert_array_equal(drawn(figure), the_plan.codes[0, ::3])
    assert figure.axes[0].get_ylabel() == "query (1 block in 3)"
    assert figure.axes[0].get_xlabel() == "key"
    # The share in the title is that of all blocks.
    assert titles(figure) == [f"{(np.asarray(the_plan.codes) == 0).mean():.1%} of blocks skipped"]
    pairs = drawn(draw_plan(the_plan, pairs=True))
    seen = mask_tensor(BANDED, Tokens.sequence(1_100))[::3, ::3]
    np.testing.assert_array_equal(np.isin(pairs, (2, 3)), seen)


def test_a_plan_s_row_has_its_own_blocks_and_share():
    batch = jax.tree.map(lambda *x: np.stack(x), Tokens.packed([6, 6]), Tokens.packed([12]))
    the_plan = plan(SameSegment(), batch, block_q=6, block_k=6)
    assert titles(draw_plan(the_plan, row=0)) == ["50.0% of blocks skipped"]
    assert titles(draw_plan(the_plan, row=1)) == ["0.0% of blocks skipped"]
    np.testing.assert_array_equal(drawn(draw_plan(the_plan, row=0)), the_plan.codes[0])
    # One block holds all, so that only the pairs tell the rows apart.
    whole = plan(SameSegment(), batch, block_q=12, block_k=12)
    assert [int((drawn(draw_plan(whole, row=row, pairs=True)) >= 2).sum()) for row in (0, 1)] == [72, 144]


def test_lines_part_the_blocks_while_there_is_room():
    ax = draw_plan(plan(BANDED, TOKENS, block_q=5, block_k=4)).axes[0]
    lines = [line.get_xydata()[0].tolist() for line in ax.lines]
    # Across at queries 5 and 10, down at keys 4 and 8; an axis line starts at the edge, 0.
    assert lines == [[0, 4.5], [0, 9.5], [3.5, 0], [7.5, 0]]
    assert len(draw_plan(plan(BANDED, Tokens.sequence(33), block_q=1, block_k=33)).axes[0].lines) == 0


LENGTHS = [(12, 12), (300, 20), (20, 300), (16_384, 16_384)]


@pytest.mark.parametrize(("queries", "keys"), mostly(LENGTHS, LENGTHS[:2]))
def test_nothing_is_cut_off_at_the_edge(queries, keys):
    q, k = Tokens.sequence(queries), Tokens.sequence(keys)
    the_plan = plan(BANDED, q, k)
    for figure in (
        draw_mask(BANDED, q, k),
        draw_plan(the_plan),
        draw_plan(the_plan, pairs=True),
        draw_curriculum(lambda step: BANDED, range(4), q, k),
        draw_masks({f"Chunks({n})": Chunks(n) for n in (1, 2, 3, 4, 6, 12)}, q, k),
    ):
        figure.draw_without_rendering()
        inches = figure.get_tightbbox()
        assert min(inches.x0, inches.y0) >= 0
        assert inches.x1 <= figure.get_figwidth()
        assert inches.y1 <= figure.get_figheight()


def test_pictures_are_drawn_on_the_axes_given():
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert draw_mask(BANDED, TOKENS, ax=left) is figure
    assert draw_plan(plan(BANDED, TOKENS), ax=right, legend=False) is figure
    assert [len(ax.images) for ax in (left, right)] == [1, 1]
    assert right.get_legend() is None
    within = Figure().subfigures(1, 2)[0]
    assert draw_masks({"a": BANDED}, TOKENS, axes=[within.subplots()]) is within.figure


def test_the_readme_s_picture_is_drawn(tmp_path):
    docs = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "make_pictures.py"))
    figure, path = docs["curriculum_picture"](), tmp_path / "curriculum.png"
    panels = [ax.get_title() for ax in figure.axes if ax.images]
    # Of 16 x 16 blocks the causal mask skips the 120 above the diagonal; the first window needs 31.
    assert panels[0] == f"step 0\n{225 / 256:.1%} of blocks skipped"
    assert panels[-1] == f"step 1,000\n{120 / 256:.1%} of blocks skipped"
    docs["save"](figure, path)
    assert path.stat().st_size < 200_000


def test_a_picture_is_shown_by_a_notebook_without_pyplot():
    code = (
        "import sys; from dynmask_jax import *; from dynmask_jax.plot import draw_mask\n"
        "png = draw_mask(Causal(), Tokens.sequence(4))._repr_png_()\n"
        "assert png.startswith(b'\\x89PNG'), png[:8]\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_matplotlib_the_library_imports_and_its_pictures_say_what_to_install():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import dynmask_jax\n"
        "try:\n    import dynmask_jax.plot\n"
        "except ImportError as error:\n    print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == 'pictures need matplotlib: pip install "dynmask_jax[plot]"'


CURRICULUM = growing_window(linear(1, 12, steps=10))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: draw_mask(CURRICULUM, TOKENS), TypeError, "call a curriculum with the step first"),
        (lambda: draw_mask(BANDED, 12), TypeError, "q_tokens must be Tokens .*got int"),
        (lambda: draw_mask(BANDED, TOKENS, 12), TypeError, "kv_tokens must be Tokens"),
        (lambda: draw_mask(BANDED, TOKENS, row=1), ValueError, "row must lie in 0…0, got 1"),
        (lambda: draw_mask(BANDED, TOKENS, head=0), ValueError, "same for every head: leave out head=0"),
        (lambda: draw_mask(PER_HEAD, TOKENS), ValueError, "leaves for 3 heads: choose one with head="),
        (lambda: draw_mask(PER_HEAD, TOKENS, head=3), ValueError, "head must lie in 0…2, got 3"),
        (lambda: draw_heads(BANDED, TOKENS), ValueError, "same for every head: draw it with draw_mask"),
        (lambda: draw_masks({}, TOKENS), ValueError, "nothing to draw"),
        (lambda: draw_masks({"a": PER_HEAD}, TOKENS), ValueError, "leaves for 3 heads"),
        (lambda: draw_masks({"a": BANDED}, TOKENS, axes=[]), ValueError, "each of 1 panels, got 0"),
        (lambda: draw_curriculum(CURRICULUM, [], TOKENS), ValueError, "steps is empty"),
        (lambda: draw_curriculum(BANDED, [0], TOKENS), TypeError, "function step -> Mask"),
        (
            lambda: draw_curriculum(lambda step: Causal() & Window(0), [0], TOKENS),
            ValueError,
            "shows nothing",
        ),
        (lambda: draw_plan(BANDED), TypeError, "plan must be a Plan, got And"),
        (lambda: draw_plan(plan(BANDED, TOKENS), row=-1), ValueError, "row must lie in 0…0, got -1"),
        (lambda: jax.jit(lambda n: draw_mask(Window(n), TOKENS))(3), ValueError, "traced mask"),
        (lambda: jax.jit(lambda t: draw_mask(BANDED, t))(TOKENS), ValueError, "traced tokens"),
        (lambda: jax.jit(lambda n: draw_plan(plan(Window(n), TOKENS)))(3), ValueError, "traced plan"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_words(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_tokens_batch_out_of_range_is_refused():
    batch = Tokens(np.zeros((2, 12), np.int32))
    with pytest.raises(ValueError, match="row must lie in 0…1, got 2"):
        draw_mask(BANDED, batch, row=2)
    with pytest.raises(ValueError, match=r"kv_tokens must have shape \[T\] or \[B, T\]"):
        draw_mask(BANDED, TOKENS, batch[None])
    with pytest.raises(ValueError, match=r"one batch size, got \(2, 12\) and \(1, 12\)"):
        draw_mask(BANDED, batch, batch[:1])
