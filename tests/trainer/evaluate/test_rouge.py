"""ROUGE and lead-k: against values by hand, and against figures measured elsewhere."""

import gzip
import json
from pathlib import Path

import pytest

from train.evaluate.rouge import lead, rouge

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
    assert lead("a b  c\n\nd", 3) == "a b c"
    assert lead("  a b", 9) == "a b"
    assert lead("", 3) == ""


@pytest.mark.parametrize(
    ("file", "words", "expected"),
    [("qmsum_ami_icsi", 120, (19.3, 3.3, 11.4)), ("peps", 75, (29.8, 6.4, 16.7))],
)
def test_lead_baselines_of_real_documents(file, words, expected):
    path = DATA / f"{file}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path.name} is not in ../shared/data")
    with gzip.open(path, "rt") as lines:
        examples = [json.loads(line) for line in lines]
    leads = [lead(example["document"], words) for example in examples]
    score = rouge(leads, [example["summary"] for example in examples])
    assert tuple(score.values()) == pytest.approx(expected, abs=0.05)
