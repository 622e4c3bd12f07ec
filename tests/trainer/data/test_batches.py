"""The pipeline: whole epochs, in rows of one document's tokens a segment, and the same ones when resumed."""

import json
from collections import Counter

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.config.operation import Evaluation
from train.config.run import Run
from train.config.sections import Curriculum, Data, Summarize
from train.data.batches import batches, held_out_batches
from train.data.pair_layout import PairLayout
from train.data.rows import DocumentPieces, Pairs, Spans, Stream
from train.data.tokenizers import load_tokenizer

LENGTH = 12


def BYTES(inputs, targets):
    return targets % 4


DOCUMENTS = (30, 3, 5, 2, 9, 14, 4, 7, 25, 6)


def run(**options) -> Run:
    named = {"length": LENGTH, "packing_bins": 3, "batch": 1} | options.pop("data", {})
    return Run(data=Data(**named), curriculum=Curriculum(start=4), **options)


def cut(kind, lengths=DOCUMENTS):
    """Documents of the tokens 0, 1, 2, … (and pairs of which the last two are the summary)."""
    stops = np.cumsum(lengths)
    spans = Spans(stops - lengths, stops)
    tokens = np.arange(stops[-1], dtype=np.uint16)
    if kind is Pairs:
        bodies = np.array(lengths) - 4
        layout = PairLayout.of(Summarize(), load_tokenizer("bytes"))
        return Pairs(tokens, spans, bodies, np.minimum(bodies, LENGTH - 3), LENGTH, layout)
    return kind(tokens, spans, LENGTH)


def first(count: int, source, asked: Run) -> list:
    iterator = iter(batches(source, asked, BYTES))
    found = [next(iterator) for _ in range(count)]
    iterator.close()
    return found


def segments(rows) -> list[np.ndarray]:
    """The inputs of each segment of some batches, after the laws that hold in every row."""
    found = []
    for batch in rows:
        for row in range(len(batch.inputs)):
            inputs, targets, position, segment, context, weight = (
                getattr(batch, name)[row]
                for name in ("inputs", "targets", "positions", "segments", "context", "weights")
            )
            real = segment > 0
            assert (np.diff(real.astype(int)) <= 0).all(), "padding stands at the end"
            assert not any(leaf[~real].any() for leaf in (inputs, targets, position, context, weight))
            for number in range(1, segment.max() + 1):
                own = segment == number
                assert (targets[own] == inputs[own] + 1).all()
                assert (np.diff(inputs[own]) == 1).all()
                assert (np.diff(position[own]) == 1).all()
                assert context[own].tolist() == list(range(own.sum()))
                found.append(inputs[own])
    return found


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=15),
    bins=st.integers(1, 6),
    seed=st.integers(0, 2**40),
)
def test_packed_rows_hold_every_token_equally_often(lengths, bins, seed):
    source = cut(DocumentPieces, lengths)
    packs = 3 + 2 * len(source) // bins  # rows of several epochs
    rows = first(packs * bins, source, run(seed=seed, data={"packing_bins": bins}))
    documents = np.repeat(np.arange(len(lengths)), lengths)
    pieces = segments(rows)
    assert all(len(set(documents[piece])) == 1 for piece in pieces)
    assert all(batch.positions.max() < LENGTH for batch in rows)
    read = Counter(int(token) for piece in pieces for token in piece)
    ends = np.cumsum(lengths) - 1
    assert set(read) == set(range(sum(lengths))) - set(ends.tolist())  # an end is a target alone
    assert max(read.values()) - min(read.values()) <= 1  # whole packs break off in the midst of an epoch


def test_examples_keep_their_boundary_in_whatever_segment():
    asked = run(task="summarize", data={"packing_bins": 2})
    source = cut(Pairs, (6, 5, 7, 5, 6))
    numbers = set()
    for batch in first(30, source, asked):
        for number in range(1, batch.segments.max() + 1):
            own = batch.segments == number
            # The summary's two tokens and the end after them are asked for, at the positions from T.
            assert batch.weights[own].tolist() == [0] * (own.sum() - 3) + [1] * 3
            assert batch.positions[own][-3:].tolist() == [LENGTH, LENGTH + 1, LENGTH + 2]
            numbers.add(number)
    assert numbers == {1, 2, 3}


def test_a_stream_is_read_once_in_an_epoch_and_then_in_another_order():
    source = cut(Stream)
    rows = [batch.inputs[0, 0] for batch in first(2 * len(source), source, run(data={"rows": "chunked"}))]
    one, two = rows[: len(source)], rows[len(source) :]
    assert sorted(one) == sorted(two) == [LENGTH * i for i in range(len(source))]
    assert one != two


def test_the_seed_chooses_the_order_and_seeds_may_be_large():
    def order(seed):
        return [s.tolist() for s in segments(first(12, cut(DocumentPieces), run(seed=seed)))]

    assert order(3) == order(3)
    assert len({str(order(seed)) for seed in (0, 1, 2**32, 2**32 + 1, 2**70)}) == 5


@pytest.mark.parametrize(
    ("kind", "options"),
    [(DocumentPieces, {"rows": "packed", "batch": 2}), (Pairs, {"batch": 2}), (Stream, {"rows": "chunked"})],
)
def test_a_run_resumed_at_any_batch_reads_the_same_batches(kind, options):
    source = cut(kind, (6, 5, 7, 5, 6, 8, 9) if kind is Pairs else DOCUMENTS)
    asked = run(task="summarize" if kind is Pairs else "lm", data=options)
    pipeline = batches(source, asked, BYTES)
    iterator, states, expected = iter(pipeline), [], []
    for _ in range(25):  # more than two epochs; 3 bins are open, and 2 rows are in a batch
        states.append(json.dumps(iterator.get_state()))
        expected.append(next(iterator))
    assert len({str(batch.inputs) for batch in expected}) >= 8
    other = iter(pipeline)
    for start in (*range(25), 3):  # and backwards
        other.set_state(json.loads(states[start]))
        assert json.loads(json.dumps(other.get_state())) == json.loads(states[start])
        for batch in expected[start : start + 5]:
            jax.tree.map(np.testing.assert_array_equal, next(other), batch)
    iterator.close()
    other.close()


@pytest.mark.parametrize(("rows", "batch"), [(1, 1), (5, 2), (5, 8), (99, 4)])
@pytest.mark.parametrize("kind", [DocumentPieces, Stream])
def test_held_out_batches_have_one_shape_and_the_last_is_filled_up(kind, rows, batch):
    source = cut(kind)
    asked = run(
        data={"rows": "chunked" if kind is Stream else "packed", "batch": batch},
        evaluation=Evaluation(rows=rows),
    )
    found = held_out_batches(source, asked, BYTES)
    real = sum(int((held.segments > 0).any(axis=1).sum()) for held in found)
    assert {held.inputs.shape for held in found} == {(min(batch, real), LENGTH)}
    assert real <= rows
    assert len(found) == -(-real // min(batch, real))
    assert np.concatenate([held.segments for held in found])[:real].any(axis=1).all()
    if rows == 99:
        read = [int(token) for tokens in segments(found) for token in tokens]
        assert len(read) == len(set(read)) == sum(len(source[i]["tokens"]) for i in range(len(source)))
    again = held_out_batches(source, asked, BYTES)
    jax.tree.map(np.testing.assert_array_equal, found, again)


def test_held_out_rows_of_a_stream_are_spread_evenly():
    source = cut(Stream)
    asked = run(data={"rows": "chunked"}, evaluation=Evaluation(rows=2))
    assert len(source) == 8
    assert [int(held.inputs[0, 0]) for held in held_out_batches(source, asked, BYTES)] == [0, 4 * LENGTH]
