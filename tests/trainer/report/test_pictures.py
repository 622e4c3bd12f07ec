"""The pictures of runs of every kind: what they show is what was recorded."""

import math
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from train_cases import records_of, small_run, steps_of, validation_record, validations_of

from train.config.run import Run
from train.config.sections import Curriculum, Data, Model, Summarize
from train.report import pictures
from train.report.pictures import draw, draw_positions
from train.step.curriculum import growth


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved; they are drawn in full, but no file is written."""
    saved = []

    def save(figure, path):
        figure.draw_without_rendering()
        saved.append(figure)

    monkeypatch.setattr(Figure, "savefig", save)
    return saved


def drawn(run: Run, records, figures) -> tuple[list[Axes], Axes, Axes]:
    """The axes of the masks, of the loss and of the exposure."""
    assert draw(records, growth(run), run, pictures.Path("unused.png"))
    *masks, loss, exposure = figures[-1].axes
    return masks, loss, exposure


def line(ax: Axes, number: int) -> tuple[list, list]:
    x, y = ax.lines[number].get_data()
    return list(x), list(y)


def visible(ax: Axes) -> np.ndarray:
    return np.asarray(ax.images[0].get_array()) == 1


def test_the_picture_is_a_png(tmp_path):
    run = small_run(tmp_path)
    assert draw(records_of(run), growth(run), run, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_masks_go_from_the_first_step_to_the_first_that_shows_all(tmp_path, figures):
    run = small_run(tmp_path, steps=20, curriculum=Curriculum(start=4, share=0.5))
    masks, _, _ = drawn(run, records_of(run), figures)
    titles = [ax.get_title().splitlines()[0] for ax in masks]
    assert titles == [
        "step 0: chunks of 4",
        "step 3: chunks of 7",
        "step 6: chunks of 13",
        "step 10: chunks of 32",
    ]
    assert visible(masks[0]).sum() == 8 * (4 * 5 // 2)  # each of 8 chunks of 4 sees itself
    assert (visible(masks[-1]) == np.tri(32, dtype=bool)).all()


def test_masks_are_those_of_the_recorded_windows_whatever_moved_them(tmp_path, figures):
    run = small_run(tmp_path, steps=6, curriculum=Curriculum(start=4, kind="window", schedule="linear"))
    records = records_of(run)
    windows = [4 if record.step < 5 else 32 for record in steps_of(records)]  # the loss was slow to fall
    moved = [
        replace(record, window=window, exposure=window / 32)
        for record, window in zip(steps_of(records), windows, strict=True)
    ]
    masks, _, _ = drawn(run, [*moved, *validations_of(records)], figures)
    seen = [visible(ax)[31].sum() for ax in masks]
    assert seen == [4, 4, 4, 32]


def test_what_is_drawn_of_the_loss(tmp_path, figures):
    run = small_run(tmp_path)
    records = records_of(run, every=4)
    records[2] = replace(records[2], bits_per_byte=None)
    _, loss, exposure = drawn(run, records, figures)
    steps = steps_of(records)
    x, y = line(loss, 0)
    assert x == list(range(8))
    assert math.isnan(y[1])
    assert y[2:] == [r.bits_per_byte for r in steps[2:]]
    validations = validations_of(records)
    assert line(loss, 1) == ([0, 4, 8], [r.bits_per_byte for r in validations])
    assert line(exposure, 0)[1] == [r.exposure for r in steps]


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 1},
        {"steps": 2},
        {"steps": 3},
        {"curriculum": Curriculum(kind="full")},
        {"curriculum": Curriculum(kind="static", chunk=8)},
        {"curriculum": Curriculum(kind="reveal", chunk=8, start=4, order="random")},
        {"curriculum": Curriculum(start=4, end=16)},
        {"model": Model(layers=2, pattern=("local", "global"), local_window=8)},
    ],
)
def test_every_kind_of_run_is_drawn(tmp_path, figures, options):
    run = small_run(tmp_path, **options)
    masks, _, _ = drawn(run, records_of(run), figures)
    assert 1 <= len(masks) <= 4


def test_a_run_without_validations_or_steps(tmp_path, figures):
    run = small_run(tmp_path)
    records = records_of(run)
    steps = steps_of(records)
    drawn(run, steps, figures)
    assert not draw([r for r in records if r not in steps], growth(run), run, tmp_path / "unused.png")
    assert not draw_positions(steps, tmp_path / "unused.png")
    assert len(figures) == 1


def test_a_document_and_its_summary_meet_at_the_boundary(tmp_path, figures):
    run = small_run(
        tmp_path,
        task="summarize",
        data=Data(length=32, batch=2),
        summarize=Summarize(prefix="bidirectional"),
        curriculum=Curriculum(kind="reveal", chunk=8, start=4, schedule="linear"),
    )
    masks, _, _ = drawn(run, records_of(run), figures)
    first, last = visible(masks[0]), visible(masks[-1])
    document, summary = slice(24), slice(24, 32)
    assert last[document, document].all()
    assert not last[document, summary].any()
    assert (last[summary, summary] == np.tri(8, dtype=bool)).all()
    assert last[summary, document].all()
    assert (first[summary, summary] == np.tri(8, dtype=bool)).all()
    assert not first[summary, document].all()
    assert first[:8, :8].all()  # its own chunk, both ways


def test_the_loss_by_position_is_in_nats_a_token(tmp_path, figures):
    run = small_run(tmp_path, steps=4)
    records = records_of(run, every=2, bytes_per_token=2.0, positions={"0": 1.5, "64": 1.0, "128": None})
    assert draw_positions(records, tmp_path / "unused.png")
    (ax,) = figures[0].axes
    last = validations_of(records)[-1]
    nats = last.loss
    x, y = line(ax, -1)
    assert x == [0, 1]
    assert y == pytest.approx([1.5 * nats, nats])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "64"]
    assert ax.lines[-1].get_label() == "after step 4"


def test_early_validations_would_hide_the_slopes_of_late_ones(tmp_path, figures):
    run = small_run(tmp_path, steps=200)
    draw_positions(records_of(run, every=10), tmp_path / "unused.png")
    (ax,) = figures[0].axes
    names = [str(line.get_label()) for line in ax.lines]
    assert 2 <= len(names) <= pictures.LINES
    assert "after step 0" not in names
    assert names[-1] == "after step 200"
    darkness = [-sum(line.get_color()[:3]) for line in ax.lines]
    assert darkness == sorted(darkness)


def test_needles_are_drawn_by_depth(tmp_path, figures):
    run = small_run(tmp_path)
    records = records_of(run, needles=True)
    draw_positions(records, tmp_path / "unused.png")
    _, found, gain = figures[0].axes
    assert line(found, -1) == ([0.0, 1.0], [0.25, 0.75])
    assert line(gain, -1) == ([0.0, 1.0], [0.5, 1.0])


def test_nothing_is_drawn_of_a_loss_that_never_was_finite(tmp_path, figures):
    records = [validation_record(0, None, positions={"0": None})]
    assert not draw_positions(records, tmp_path / "unused.png")


def test_an_extension_is_drawn_from_before_to_after_at_both_contexts(tmp_path, figures):
    old = {"tokens": 64.0, "loss": 2.0, "bits_per_byte": 3.0, "positions/0": 1.5, "positions/64": 2.5}
    records = [
        replace(record, evaluators={"old_context": old | {"positions/64": 2.5 + record.step}})
        for record in validations_of(records_of(small_run(tmp_path, steps=200), every=50))
    ]
    assert records[0].loss > pictures.NEAR * records[-1].loss  # another run's would be left out
    draw_positions(records, tmp_path / "unused.png")
    (ax,) = figures[0].axes
    names = [str(line.get_label()) for line in ax.lines]
    assert names[0] == "after step 0"
    assert names[-2:] == ["step 0, chunks of 64", "step 200, chunks of 64"]
    assert line(ax, -1) == ([0, 1], [1.5, 202.5])
    solid = ax.lines[names.index("after step 200")]
    assert list(ax.lines[-1].get_color()) == list(solid.get_color())
