"""The needle probe: what its rows say, and what it makes of a model that finds every needle, or none."""

import random
from dataclasses import dataclass, replace
from typing import Any

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_cases import small_run

from train.config.operation import Evaluation
from train.config.sections import Summarize
from train.data.batch import Batch
from train.data.pair_layout import PairLayout
from train.data.tokenizers import load_tokenizer
from train.evaluate.needle import DEPTHS, Probe, by_depth, riddle
from train.step.program import begin

LENGTH = 160
BYTES = load_tokenizer("bytes", None)


@dataclass
class Text:
    """As much of a corpus as the probe reads: words without a digit, and some padding."""

    held_out: list[Batch]
    layout: PairLayout | None = None
    tokenizer: Any = BYTES


def text() -> Text:
    words = " ".join(random.Random(1).choices(["mask", "key", "query", "step"], k=100)).encode()
    inputs = np.frombuffer(words[:300] + b"9" * 20, np.uint8).astype(np.int32).reshape(2, 160)
    segments = (np.arange(320).reshape(2, 160) < 300).astype(np.int32)
    return Text(
        [Batch(inputs, inputs, np.ones((2, 160), np.float32), segments, segments, segments, segments)]
    )


def run_of(tmp_path, **options):
    run = small_run(tmp_path, evaluation=Evaluation(rows=2, needles=3), **options)
    return replace(run, data=replace(run.data, length=LENGTH, rows="packed", batch=4))


def told(tokens) -> str:
    return BYTES.decode(tokens)


@pytest.fixture
def rows(tmp_path):
    """The rows of one depth after the other: depths, needles, right and wrong."""
    run = run_of(tmp_path)
    program, _ = begin(run, BYTES.vocabulary)
    probe = Probe(program, text())
    stacked = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:30], *probe._batches)
    return jax.tree.map(lambda leaf: leaf.reshape(len(DEPTHS), 3, 2, LENGTH), stacked)


def test_a_row_tells_a_number_and_asks_for_it(rows):
    for depth, needle in np.ndindex(5, 3):
        right, wrong = (told(rows.inputs[depth, needle, which]) for which in (0, 1))
        weights = rows.weights[depth, needle, 0] > 0
        answer = told(rows.targets[depth, needle, 0][weights])
        assert len(answer) == 6
        assert answer.strip().isdigit()
        name = right.split("The code of ")[1].split(" is")[0]
        assert right.endswith(f"\nThe code of {name} is{answer[:-1]}")
        assert f"\nThe code of {name} is{answer}.\n" in right
        assert answer.strip() not in wrong.replace(f"The code of {name} is{answer[:-1]}", "")
        elsewhere = rows.inputs[depth, needle, 0] != rows.inputs[depth, needle, 1]
        assert elsewhere.sum() == 5, "the two differ in the five digits that are told, and in nothing else"
        assert (rows.targets[depth, needle, 0][weights] == rows.targets[depth, needle, 1][weights]).all()


def test_needles_lie_at_their_depth(rows):
    first = (rows.inputs[:, :, 0] != rows.inputs[:, :, 1]).argmax(axis=-1)
    room = LENGTH + 1 - 30 - 31
    for depth, places in zip(DEPTHS, first, strict=True):
        assert (np.abs(places - (depth * room + len("\nThe code of Gustav is "))) <= 6).all(), depth


def test_the_hay_is_real_text(rows):
    assert not (rows.inputs == ord("9")).all(axis=-1).any()
    assert "999" not in told(rows.inputs[0, 0, 0])


def test_a_summaries_question_stands_where_summaries_do(tmp_path):
    run, layout = replace(run_of(tmp_path), task="summarize"), PairLayout.of(Summarize(), BYTES)
    program, _ = begin(run, BYTES.vocabulary)
    batch = Probe(program, replace(text(), layout=layout))._batches[0]
    ends = batch.inputs == BYTES.end
    assert (ends.sum(axis=1) == 1).all()
    assert (batch.positions[ends] == LENGTH).all()
    assert (np.diff(batch.positions, axis=1) == 1).all()


class Finder(nnx.Module):
    """Predicts of the last six tokens the number that was told first, or a wrong one."""

    def __init__(self, right: bool):
        self.right = right

    def __call__(self, inputs, plans):
        pattern = jnp.asarray([ord(c) for c in " is "])
        windows = jnp.stack([jnp.roll(inputs, -i, axis=1) for i in range(4)], axis=-1)
        found = (windows == pattern[None, None, :]).all(axis=-1).argmax(axis=1)[:, None]
        number = jnp.take_along_axis(inputs, found + 3 + jnp.arange(6)[None, :], axis=1)
        number = number if self.right else 105 - number
        tokens = jnp.concatenate([inputs[:, 6:], number], axis=1)
        return 9.0 * jax.nn.one_hot(tokens, 256)

    def unembed(self, hidden):
        return hidden


@pytest.mark.parametrize("right", [True, False])
def test_a_model_that_finds_every_needle_and_one_that_finds_none(tmp_path, right):
    run = run_of(tmp_path)
    program, _ = begin(run, BYTES.vocabulary)
    graph, params = nnx.split(Finder(right))
    found = Probe(replace(program, graph=graph), text())(params)
    assert by_depth(found, "found") == dict.fromkeys(DEPTHS, float(right))
    if right:  # five of six tokens: 9 nats better than a wrong digit that the other needle makes likely
        assert by_depth(found, "gain") == pytest.approx(
            dict.fromkeys(DEPTHS, 9 * 5 / 6 / np.log(2)), rel=1e-4
        )


def test_a_row_too_short_for_a_needle_is_refused(tmp_path):
    run = run_of(tmp_path)
    run = replace(run, data=replace(run.data, length=40))
    program, _ = begin(run, BYTES.vocabulary)
    with pytest.raises(ValueError, match=r"evaluation\.needles needs data\.length of at least \d+ .*got 40"):
        Probe(program, text())


def test_a_riddles_numbers_differ_in_every_digit():
    for seed in range(20):
        asked = riddle(BYTES, random.Random(seed))
        differing = asked.needle != asked.other
        assert differing.sum() == 5
        assert told(asked.needle[differing]) == told(asked.answer).strip()
