"""What is measured beside the loss at each validation: a table of evaluators."""

from collections.abc import Callable
from typing import Any

from train.data.corpus import Corpus
from train.evaluate.needle import needle_probe
from train.evaluate.old_context import old_context_loss
from train.evaluate.recall import recall_score
from train.step.program import Program

Evaluator = Callable[[Any], dict[str, float]]
"""`params -> numbers by name`. A name may have parts, `found/0.5`, by which charts group them."""

EVALUATORS: dict[str, Callable[[Program, Corpus], Evaluator | None]] = {
    "needle": needle_probe,
    "old_context": old_context_loss,
    "recall": recall_score,
}
"""name -> what makes the evaluator of a run; None where the config does not ask for it.

Records, charts and the report show its numbers under its name."""


def evaluators(program: Program, corpus: Corpus) -> dict[str, Evaluator]:
    """The evaluators that a run's config asks for, by their names."""
    made = {name: make(program, corpus) for name, make in EVALUATORS.items()}
    return {name: evaluator for name, evaluator in made.items() if evaluator is not None}
