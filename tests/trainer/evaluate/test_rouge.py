"""ROUGE and lead-k: against values by hand, and against figures measured elsewhere."""

import gzip
import json
from pathlib import Path

import pytest

from train.data.words import first_words, word_count, words
from train.evaluate.rouge import rouge

DATA = Path(__file__).parents[4] / "shared" / "data"


def test_by_hand():
    """Reference of 6 words, prediction of 4: 3 words in common, 1 pair of neighbours, 3 in order."""
    score = rouge(["the cat lay quiet"], ["the cat sat on a quiet"])
    assert score == pytest.approx({"rouge1": 60.0, "rouge2": 25.0, "rougeL": 60.0})


def test_order_counts_in_rouge_l_alone():
    score = rouge(["b a"], ["a b"])
    assert score == pytest.approx({"rouge1": 100.0, "rouge2": 0.0, "rougeL": 50.0})


def test_words_are_stemmed_and_scores_are_means():
    assert rouge(["masks growing"], ["mask grows"])["rouge1"] == pytest.approx(100)
    assert rouge(["a", "b"], ["a", "c"])["rouge1"] == pytest.approx(50)
    assert rouge([""], ["a"]) == {"rouge1": 0, "rouge2": 0, "rougeL": 0}


@pytest.mark.parametrize(("predictions", "references"), [([], []), (["a"], []), (["a"], ["a", "b"])])
def test_texts_that_do_not_pair_are_refused(predictions, references):
    with pytest.raises(ValueError, match="as many references as predictions, and one at least, got"):
        rouge(predictions, references)


def test_lead():
    assert first_words("a b  c\n\nd", 3) == "a b c"
    assert first_words("  a b", 9) == "a b"
    assert first_words("", 3) == ""


@pytest.mark.parametrize(
    ("file", "count", "expected"),
    [("qmsum_ami_icsi", 120, (19.3, 3.3, 11.4)), ("peps", 75, (29.8, 6.4, 16.7))],
)
def test_lead_baselines_of_real_documents(file, count, expected):
    path = DATA / f"{file}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path.name} is not in ../shared/data")
    with gzip.open(path, "rt") as lines:
        examples = [json.loads(line) for line in lines]
    leads = [first_words(example["document"], count) for example in examples]
    score = rouge(leads, [example["summary"] for example in examples])
    assert tuple(score.values()) == pytest.approx(expected, abs=0.05)


TEXTS = [
    "हिन्दी में एक वाक्य",
    "今天天气很好",
    "Сегодня хорошая погода",
    "Η γλώσσα είναι ελληνική",
    "สวัสดีครับ",
    "für",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_itself_in_any_script(text):
    assert rouge([text], [text])["rouge1"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("für", "fär", 0),
        ("今天好", "今天坏", 200 / 3),
        ("क का", "का", 200 / 3),
        ("e\u0301", "é", 100),
        ("می\u200cروم", "میروم", 100),
        ("\ufb01ne", "fine", 100),
        ("погода, Сегодня!", "сегодня погода", 100),
        ("كتاب", "كتب", 0),
    ],
)
def test_words_of_other_scripts_are_told_apart(prediction, reference, score):
    assert rouge([prediction], [reference])["rouge1"] == pytest.approx(score)


def test_english_scores_are_the_packages():
    from rouge_score.rouge_scorer import RougeScorer

    reference = "The 2 masks weren't growing as fast_as expected; $5 said O'Neil (again)."
    prediction = "Masks grow, isn't it? 2 and 5: fast as the expected ones were."
    expected = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(reference, prediction)
    found = rouge([prediction], [reference])
    assert found == pytest.approx({name: 100 * score.fmeasure for name, score in expected.items()})


def test_words_are_counted_in_scripts_without_spaces_too():
    assert first_words("今天天气很好。明天也好", 4) == "今天天气"
    assert first_words("one, two-three  four", 2) == "one, two-three"
    assert first_words("word " * 10_000, 3) == "word word word"
    assert word_count("one, two-three 你好") == 4
    assert words("The naïve fox's x_y") == ["the", "naïve", "fox", "s", "x", "y"]
