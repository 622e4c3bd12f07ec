"""ROUGE of summaries, and the baseline that any summary should beat: the document's beginning."""

from collections.abc import Sequence

KINDS = ("rouge1", "rouge2", "rougeL")


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The mean F-measures of predictions, in percent: {"rouge1": …, "rouge2": …, "rougeL": …}.

    Words are stemmed (Porter); rougeL is of the longest common subsequence of the whole texts.

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

    scorer = RougeScorer(KINDS, use_stemmer=True)
    scores = [scorer.score(*pair) for pair in zip(references, predictions, strict=True)]
    return {kind: 100 * sum(s[kind].fmeasure for s in scores) / len(scores) for kind in KINDS}


def lead(document: str, words: int) -> str:
    """The document's first words, parted by single spaces.

    >>> lead("One  two\\nthree four", 3)
    'One two three'
    """
    # Split so far as is needed, and no farther: documents may be long.
    return " ".join(document.split(maxsplit=words)[:words])
