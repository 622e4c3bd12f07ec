"""Pairs at the full mask, counted from how many tokens come before each, against the mask itself."""

from dataclasses import replace

import numpy as np
import pytest
from train_cases import small_run

from tests.trainer.step.test_program import LENGTH, LOCAL, TASKS, pairs_of
from train.step.curriculum import full_mask, full_pairs


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("window", [1, 5, LENGTH, 3 * LENGTH])
def test_full_pairs_are_those_of_the_full_mask(tmp_path, task, window):
    batch, options = TASKS[task]
    rows = options.get("rows", "packed")
    options = {name: value for name, value in options.items() if name != "rows"}
    run = small_run(tmp_path, model=replace(LOCAL, local_window=window))
    run = replace(run, data=replace(run.data, rows=rows), **options)
    found = {reach: float(count) for reach, count in full_pairs(run, batch).items()}
    mask = full_mask(run)
    assert found == {"global": pairs_of(mask, batch, rows), "local": pairs_of(mask, batch, rows, window)}


def test_a_long_row_is_counted_without_overflow(tmp_path):
    batch, _ = TASKS["chunked"]
    long = np.zeros((2, 65_536), np.int32)
    run = small_run(tmp_path)
    run = replace(run, data=replace(run.data, length=65_536, rows="chunked"))
    pairs = full_pairs(run, replace(batch, inputs=long))
    assert float(pairs["global"]) == pytest.approx(65_536 * 65_537, rel=1e-6)
