"""ROUGE of summaries, and the baseline that any summary should beat: the document's beginning."""

from collections.abc import Sequence

from train.data.words import UNSPACED, words

SEGMENTATION = (
    "Words are runs of letters, marks and digits, in any script, split by the library tokenizers; of scripts "
    f"without spaces ({', '.join(UNSPACED)}) each character is one. Those of the English alphabet are "
    "stemmed (Porter)."
)
"""How texts are cut for scoring, for the report."""
KINDS = ("rouge1", "rouge2", "rougeL")


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The mean F-measures of predictions, in percent: {"rouge1": …, "rouge2": …, "rougeL": …}.

    Words are those of `train.data.words`, in any script; those of the English alphabet are stemmed (Porter).
    Of English these are the scores of the package `rouge_score` as it is. rougeL is of the longest common
    subsequence of the whole texts.

    Args:
      predictions: summaries, generated or otherwise.
      references: what each should say.

    Raises:
      ValueError: there are none, or not one for each.

    Reference: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries".

    >>> rouge(["the mask grows"], ["The masks grow fast"])["rouge2"]
    80.0
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            "rouge needs as many references as predictions, and one at least, got "
            f"{len(references)} and {len(predictions)}"
        )
    from rouge_score.rouge_scorer import RougeScorer  # more than a second, for all that score nothing

    scorer = RougeScorer(KINDS, tokenizer=_Words())
    scores = [scorer.score(*pair) for pair in zip(references, predictions, strict=True)]
    return {kind: 100 * sum(s[kind].fmeasure for s in scores) / len(scores) for kind in KINDS}


class _Words:
    """Words for `rouge_score`."""

    def __init__(self):
        from nltk.stem.porter import PorterStemmer

        self._stem = PorterStemmer().stem

    def tokenize(self, text: str) -> list[str]:
        """The words of a text, stemmed where the stemmer knows their letters; short ones stay, as there."""
        return [self._stem(word) if len(word) > 3 and word.isascii() else word for word in words(text)]
