"""Rows: every token is a target once, no item spans documents, positions count up."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.pair_layout import PairLayout
from train.data.rows import CONTEXT, SEGMENTS, TOKENS, DocumentPieces, Pairs, Spans, Stream, as_batch, fitting


def BYTES(inputs, targets):
    return targets % 4


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def spans(lengths, seed: int) -> Spans:
    """Documents of the tokens 0, 1, 2, …, in an order of the seed's."""
    order = np.random.default_rng(seed).permutation(len(lengths))
    stops = np.cumsum(lengths)
    return Spans((stops - lengths)[order], stops[order])


def stream(lengths) -> np.ndarray:
    return np.arange(sum(lengths), dtype=np.uint16)


@given(LENGTHS, st.integers(1, 12), st.integers(0, 3))
def test_each_token_but_a_documents_first_is_the_target_of_one_piece(lengths, length, seed):
    parts = spans(lengths, seed)
    pieces = DocumentPieces(stream(lengths), parts, length)
    items = [pieces[i][TOKENS] for i in range(len(pieces))]
    targets = [int(t) for item in items for t in item[:, 1]]
    expected = [t for a, b in zip(parts.starts, parts.stops, strict=True) for t in range(a + 1, b)]
    assert targets == expected
    documents = np.repeat(np.arange(len(lengths)), lengths)
    for item in items:
        assert 1 <= len(item) <= length
        assert item.dtype == np.int32
        assert (item[:, 1] == item[:, 0] + 1).all()
        assert len(set(documents[item[:, :2]].ravel())) == 1
        assert item[:, 2].tolist() == list(range(len(item)))


def test_all_pieces_of_a_document_but_the_last_fill_a_row():
    pieces = DocumentPieces(stream([11]), spans([11], 0), 4)
    assert [pieces[i][TOKENS][:, 0].tolist() for i in range(len(pieces))] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
    ]


@given(LENGTHS, st.integers(1, 12), st.integers(0, 3))
def test_a_stream_is_all_documents_end_to_end_in_rows(lengths, length, seed):
    parts = spans(lengths, seed)
    rows = Stream(stream(lengths), parts, length)
    expected = [t for a, b in zip(parts.starts, parts.stops, strict=True) for t in range(a, b)]
    assert len(rows) == (len(expected) - 1) // length
    for i in reversed(range(len(rows))):
        tokens = rows[np.int64(i)][TOKENS]
        assert tokens[:, 0].tolist() == expected[i * length : (i + 1) * length]
        assert tokens[:, 1].tolist() == expected[i * length + 1 : (i + 1) * length + 1]
        assert tokens[:, 2].tolist() == rows[i][CONTEXT].tolist() == list(range(length))
        assert (rows[i][SEGMENTS] == 1).all()


def pair(body: int, summary: int, kept: int, length: int) -> np.ndarray:
    ids = np.arange(10, 10 + body + summary + 2)
    one = np.array([len(ids)])
    around = layout(between=ids[body : body + 1], after=ids[-1:])
    return Pairs(ids, Spans(one * 0, one), np.array([body]), np.array([kept]), length, around)[0][TOKENS]


def layout(before=(), between=(7,), after=(9,)) -> PairLayout:
    """Of these tokens."""
    around = (np.array(tokens, np.int32) for tokens in (before, between, after))
    return PairLayout(*around, spaces=("", ""), goes_on=(False, False), ends=(9,))


def test_an_example_is_document_end_summary_end_around_a_fixed_position():
    tokens = pair(body=3, summary=2, kept=3, length=8)
    assert tokens[:, 0].tolist() == [10, 11, 12, 13, 14, 15]  # 13 is the first end, 16 the last
    assert tokens[:, 1].tolist() == [11, 12, 13, 14, 15, 16]
    assert tokens[:, 2].tolist() == [5, 6, 7, 8, 9, 10]
    assert pair(3, 2, 2, 8).tolist() == [[10, 11, 6], [11, 13, 7], [13, 14, 8], [14, 15, 9], [15, 16, 10]]


def test_a_template_lies_around_the_document_and_only_the_document_is_cut():
    ids = np.array([10, 11, 12, 13, 1, 20, 21, 1])
    one, around = np.array([len(ids)]), layout((2, 3), (4, 5, 6), (8, 9))
    kept = fitting(cache((4, 2)), 12, around, truncate=True)
    assert kept.tolist() == [4]
    assert fitting(cache((4, 2)), 11, around, truncate=True).tolist() == [3]
    assert fitting(cache((4, 2)), 9, around, truncate=True).tolist() == [1]
    with pytest.raises(ValueError, match="some of the document must fit beside its summary"):
        fitting(cache((4, 2)), 8, around, truncate=True)
    with pytest.raises(ValueError, match="a row of 12 holds all"):
        fitting(cache((4, 2)), 11, around, truncate=False)
    pairs = Pairs(ids, Spans(one * 0, one), np.array([4]), np.array([3]), 11, around)
    tokens = pairs[0][TOKENS]
    assert tokens[:, 0].tolist() == [2, 3, 10, 11, 12, 4, 5, 6, 20, 21, 8]
    assert tokens[:, 1].tolist() == [3, 10, 11, 12, 4, 5, 6, 20, 21, 8, 9]
    assert tokens[5, 2] == 11, "what comes between begins at data.length"
    assert tokens[7].tolist() == [6, 20, pairs.loss_from]
    segments, context = np.ones((1, 11), np.int32), np.arange(11, dtype=np.int32)[None]
    batch = as_batch({TOKENS: tokens[None], SEGMENTS: segments, CONTEXT: context}, pairs.loss_from, BYTES)
    assert batch.weights.tolist() == [[0] * 7 + [1] * 4], "the summary and what ends it"


def cache(*sizes: tuple[int, int]) -> SimpleNamespace:
    """What `fitting` reads of a cache of pairs of such documents and summaries."""
    bodies, summaries = (np.array(column) for column in zip(*sizes, strict=True))
    stops = np.cumsum(bodies + summaries + 2)
    starts = stops - bodies - summaries - 2
    return SimpleNamespace(
        bodies=bodies, starts=starts, stops=stops, origin=lambda i: f"x.jsonl, line {i + 1}"
    )


@given(st.integers(1, 30), st.integers(1, 30), st.integers(2, 40))
def test_an_example_fits_a_row_or_its_document_is_cut_until_it_does(body, summary, length):
    pairs = cache((body, summary))
    if summary + 2 > length:
        with pytest.raises(ValueError, match=r"with --summarize\.truncate some of the document must fit"):
            fitting(pairs, length, layout(), truncate=True)
        return
    (kept,) = fitting(pairs, length, layout(), truncate=True)
    assert len(pair(body, summary, kept, length)) == min(length, body + summary + 1)
    if kept == body:
        assert fitting(pairs, length, layout(), truncate=False) == [body]
    else:
        with pytest.raises(ValueError, match="do not fit"):
            fitting(pairs, length, layout(), truncate=False)


def test_examples_that_do_not_fit_are_named_and_counted():
    pairs = cache((5, 2), (6, 2), (7, 2), (8, 2), (1, 9), (1_000, 2))
    words = (
        r"^data\.length: 5 of 6 examples do not fit a row of 8 tokens \(x\.jsonl, line 2: a document of 6 "
        r"tokens and a summary of 2; .*line 3: .*; .*line 4: a document of 8 .*; and 2 more\): a row of "
        r"1,003 holds all; --summarize\.truncate cuts documents"
    )
    with pytest.raises(ValueError, match=words):
        fitting(pairs, 8, layout(), truncate=False)
    with pytest.raises(ValueError, match=r"1 of 6 examples .*\(x\.jsonl, line 5: a document of 1 tokens"):
        fitting(pairs, 8, layout(), truncate=True)


def test_a_batch_is_weighted_where_a_token_is_asked_for():
    tokens = np.stack([pair(3, 2, 3, 8), np.zeros((6, 3), np.int64)])
    segments = np.array([[1] * 6, [0] * 6], np.int32)
    context = np.tile(np.arange(6, dtype=np.int32), (2, 1))
    batch = as_batch({TOKENS: tokens, SEGMENTS: segments, CONTEXT: context}, 8, BYTES)
    assert batch.weights.tolist() == [[0, 0, 0, 1, 1, 1], [0] * 6]  # the summary and the end after it
    assert batch.weights.dtype == np.float32
    np.testing.assert_array_equal(batch.target_bytes, batch.targets % 4)
    everything = as_batch({TOKENS: tokens, SEGMENTS: segments, CONTEXT: context}, 0, BYTES)
    assert everything.weights.tolist() == [[1] * 6, [0] * 6]
    assert everything.positions.tolist() == [[5, 6, 7, 8, 9, 10], [0] * 6]
    assert (everything.segments.tolist(), everything.context.tolist()) == (
        segments.tolist(),
        context.tolist(),
    )
