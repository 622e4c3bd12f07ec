"""What a config refuses, and how it is compared with a saved one."""

import json
from dataclasses import replace

import pytest

from dynmask_jax import Tokens, mask_tensor
from train.config import Curriculum, Data, Model, Optimizer, Run, differences, option_names, to_json
from train.curriculum import growth
from train.presets import PRESETS


@pytest.mark.parametrize(
    ("section", "field", "value", "words"),
    [
        (Model, "layers", 0, r"model\.layers must be at least 1, got 0"),
        (Model, "width", 36, r"model\.width must be a multiple of 2 \* model\.heads \(8\).*got 36"),
        (Model, "kv_heads", 3, r"model\.kv_heads must divide model\.heads \(4\), got 3"),
        (Model, "backend", "cuda", r"model\.backend must be one of dense, xla, xla_wide, tpu, got 'cuda'"),
        (Model, "rope_theta", 0.0, r"model\.rope_theta must be positive, got 0\.0"),
        (Data, "length", 1, r"data\.length must be at least 2, got 1"),
        (Data, "held_out", 1.0, r"data\.held_out must lie between 0 and 1, got 1\.0"),
        (Optimizer, "learning_rate", 0.0, r"optimizer\.learning_rate must be positive, got 0\.0"),
        (Optimizer, "warmup", 1.0, r"optimizer\.warmup must lie in 0…1 \(1 excluded\), got 1\.0"),
        (Optimizer, "final", 1.5, r"optimizer\.final must lie in 0…1, got 1\.5"),
        (Optimizer, "beta2", 1.0, r"optimizer\.beta2 must lie between 0 and 1, got 1\.0"),
        (Curriculum, "kind", "windows", r"curriculum\.kind must be one of 'full', 'static', .*got 'windows'"),
        (Curriculum, "schedule", "fast", r"curriculum\.schedule must be one of 'linear', .*got 'fast'"),
        (Curriculum, "order", "newest", r"curriculum\.order must be one of 'nearest', .*got 'newest'"),
        (Curriculum, "share", 0.0, r"curriculum\.share must lie in 0…1 \(0 excluded\), got 0\.0"),
        (Curriculum, "end", 16, r"curriculum\.end must be at least start \(32\), got 16"),
        (Run, "steps", 0, r"steps must be at least 1, got 0"),
        (Run, "name", "a/b", r"name must be one folder's name, without separators, got 'a/b'"),
        (Run, "data", Data(length=16), r"curriculum\.start and end must not exceed data\.length \(16\)"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(section, field, value, words):
    with pytest.raises(ValueError, match=words):
        section(**{field: value})


def test_a_window_that_multiple_of_does_not_divide_is_refused_by_name():
    run = Run(curriculum=Curriculum(start=32, multiple_of=24))
    with pytest.raises(ValueError, match=r"curriculum\.start must be a multiple of .*\(24\), got 32"):
        growth(run)


def test_a_saved_config_equals_the_run_it_was_saved_from():
    run = Run(data=Data(paths=("a.txt", "b")))
    assert differences(json.loads(to_json(run)), run) == []


def test_differences_name_the_field_and_both_values():
    saved = json.loads(to_json(Run()))
    saved["model"]["layers"] = 7
    del saved["seed"]
    assert differences(saved, Run()) == [
        "model.layers: 7 saved, 4 asked for",
        "seed: 'nothing' saved, 0 asked for",
    ]


def test_every_field_is_an_option():
    names = option_names(Run())
    assert names[0] == "name"
    assert {"steps", "model.kv_heads", "data.paths", "optimizer.clip", "curriculum.order"} < set(names)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_say_what_they_are(name):
    preset = PRESETS[name]
    assert growth(preset()).window(0) >= 1
    assert preset.__doc__


SMALL = Run(steps=10, data=Data(length=8), curriculum=Curriculum(start=2, chunk=4, share=0.5))


def rows_seen(curriculum: Curriculum, step: int) -> list[list[int]]:
    mask = growth(replace(SMALL, curriculum=curriculum)).mask(step)
    return mask_tensor(mask, Tokens.sequence(8)).astype(int).tolist()


@pytest.mark.parametrize("kind", ["window", "chunks", "reveal"])
def test_a_growing_curriculum_begins_small_and_shows_everything_after_its_share(kind):
    curriculum = replace(SMALL.curriculum, kind=kind)
    full = rows_seen(replace(curriculum, kind="full"), 0)
    assert rows_seen(curriculum, 0) != full
    assert rows_seen(curriculum, 4) != full
    assert rows_seen(curriculum, 5) == full


def test_each_kind_shows_its_own_tokens_at_the_start():
    last_row = {
        kind: rows_seen(replace(SMALL.curriculum, kind=kind, order="partial"), 0)[6]
        for kind in ("full", "static", "window", "chunks", "reveal")
    }
    assert last_row == {
        "full": [1, 1, 1, 1, 1, 1, 1, 0],
        "static": [0, 0, 0, 0, 1, 1, 1, 0],
        "window": [0, 0, 0, 0, 0, 1, 1, 0],
        "chunks": [0, 0, 0, 0, 0, 0, 1, 0],
        "reveal": [0, 0, 0, 1, 1, 1, 1, 0],  # of the earlier chunk the last quarter, 2 of 8 tokens
    }


def test_static_chunks_never_grow():
    static = replace(SMALL.curriculum, kind="static")
    assert rows_seen(static, 10) == rows_seen(static, 0)


@pytest.mark.parametrize("schedule", ["linear", "exponential", "sine", "root", "cubic", "staircase"])
def test_every_schedule_goes_from_start_to_end(schedule):
    window = growth(replace(SMALL, curriculum=replace(SMALL.curriculum, schedule=schedule))).window
    assert (int(window(0)), int(window(5)), int(window(10))) == (2, 8, 8)
