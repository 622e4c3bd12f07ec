"""The split: every token is trained on or held out, none is both."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.rows import Spans
from train.data.split import Split, by_documents, by_tokens


def whole(lengths) -> Split:
    stops = np.cumsum(lengths)
    return Split(Spans(stops - lengths, stops), np.arange(len(lengths)))


def tokens(split: Split) -> list[int]:
    spans = split.spans
    return [i for a, b in zip(spans.starts, spans.stops, strict=True) for i in range(a, b)]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.floats(0.01, 0.99))
def test_tokens_are_cut_in_two(lengths, share):
    train, held_out = by_tokens(whole(lengths), share)
    assert tokens(train) + tokens(held_out) == list(range(sum(lengths)))
    assert abs(len(tokens(held_out)) - sum(lengths) * share) <= 1.5
    for part in (train, held_out):
        assert len(part.documents) == len(part.spans)
        within = [
            (part.documents[i], part.spans.starts[i], part.spans.stops[i]) for i in range(len(part.spans))
        ]
        for document, start, stop in within:
            end = sum(lengths[: document + 1])
            assert end - lengths[document] <= start < stop <= end
            assert stop - start >= 2 or lengths[document] == 1  # nothing without a target is cut off


def test_one_large_document_is_divided():
    train, held_out = by_tokens(whole([100]), 0.2)
    assert (train.spans.starts.tolist(), train.spans.stops.tolist()) == ([0], [80])
    assert (held_out.spans.starts.tolist(), held_out.spans.stops.tolist()) == ([80], [100])
    assert train.documents.tolist() == held_out.documents.tolist() == [0]


@given(st.integers(2, 50), st.floats(0.001, 0.999))
def test_examples_are_held_out_whole_and_one_at_least_on_each_side(count, share):
    train, held_out = by_documents(whole([3] * count), share)
    assert tokens(train) + tokens(held_out) == list(range(3 * count))
    assert min(len(train.documents), len(held_out.documents)) >= 1
    assert abs(len(held_out.documents) - count * share) <= 1


def test_a_single_example_is_refused():
    with pytest.raises(
        ValueError, match=r"data\.paths has too few examples: 1, and one is needed to train on"
    ):
        by_documents(whole([3]), 0.5)
