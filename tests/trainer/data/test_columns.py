"""Columns: the usual names are found, two of them or none are refused with what there is."""

import pytest

from train.data.columns import check_columns, columns_of
from train.data.tasks import PAIRS, TEXTS


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_goes_by_any_of_its_usual_names(name):
    assert columns_of(["id", name], "lm", {}) == (name,)


@pytest.mark.parametrize("pair", PAIRS)
def test_a_pair_goes_by_any_of_its_usual_names(pair):
    assert columns_of(["id", *pair], "summarize", {}) == pair
    assert columns_of(["id", *reversed(pair)], None, {}) == pair


def test_named_columns_go_before_usual_ones():
    assert columns_of(["text", "body", "story"], "lm", {"text": "story"}) == ("story",)
    there = ["document", "summary", "story", "gist"]
    assert columns_of(there, "summarize", {"document": "story", "summary": "gist"}) == ("story", "gist")


def test_one_named_column_goes_with_a_usual_one():
    assert columns_of(["story", "summary"], "summarize", {"document": "story"}) == ("story", "summary")
    assert columns_of(["article", "gist"], "summarize", {"summary": "gist"}) == ("article", "gist")


def test_for_a_tokenizer_texts_do_where_there_is_no_pair():
    assert columns_of(["id", "text"], None, {}) == ("text",)


def test_for_a_tokenizer_a_named_text_goes_before_a_pair():
    there = ["document", "summary", "body"]
    assert columns_of(there, None, {"text": "body"}) == ("body",)
    assert columns_of(there, None, {"document": "body"}) == ("body", "summary")


@pytest.mark.parametrize(
    ("there", "task", "words"),
    [
        (
            ["b", "a"],
            "lm",
            r"none of the usual names for text among the columns a, b: .*data\.columns text NAME",
        ),
        (["text", "body"], "lm", r"several of the usual names for text among the columns body, text"),
        ([], "lm", r"none of the usual names for text among the columns of an empty record"),
        (["document"], "summarize", r"none .* for a document and its summary .* document NAME summary NAME"),
        (["document", "summary", "article", "highlights"], "summarize", r"several of the usual names"),
    ],
)
def test_what_is_not_clear_is_refused(there, task, words):
    with pytest.raises(ValueError, match=words):
        columns_of(there, task, {})


def test_a_document_is_not_its_own_summary():
    with pytest.raises(ValueError, match="none of the usual names for a document and its summary"):
        columns_of(["summary", "id"], "summarize", {"document": "summary"})


@pytest.mark.parametrize(
    ("task", "name", "words"),
    [
        ("lm", "summary", r"data\.columns: the task lm reads text, got a column for summary"),
        ("summarize", "text", r"the task summarize reads document and summary, got a column for text"),
    ],
)
def test_a_column_that_the_task_does_not_read_is_refused(task, name, words):
    with pytest.raises(ValueError, match=words):
        check_columns(task, {name: "x"})
    check_columns(task, {"text" if task == "lm" else "summary": "x"})
