"""Validation: the loss on held-out rows under the full mask, by how much context a token has."""

from dataclasses import dataclass, field

import jax
import numpy as np

from dynmask_jax import Mask
from dynmask_jax.array_typing import Int
from train.data.batch import Batch
from train.data.corpus import Corpus
from train.evaluate.evaluators import evaluators
from train.evaluate.totals import by_position, mean, total
from train.parallel.feed import pad_rows, place_batch
from train.step.program import Program
from train.step.state import Evaluated, State, bits_per_byte


@dataclass(frozen=True)
class Validation:
    """What a validation found.

    Attributes:
      loss: mean nats a token under the full mask.
      bits_per_byte: the nats of all scored targets, in bits, over the bytes of text that they spell.
      positions: the same for tokens with so many of their document before them, by the least of
        them: "64" for 64 … 127. Where there were none, the key is missing.
      pace_loss: mean nats a token under the mask of now, where the curriculum's pace follows it.
      evaluators: what each evaluator of `train.evaluate.evaluators` found, by its name.
    """

    loss: float
    bits_per_byte: float
    positions: dict[str, float]
    pace_loss: float | None = None
    evaluators: dict[str, dict[str, float]] = field(default_factory=dict)


class Validator:
    """Validates states of one run, always on the same rows.

    Args:
      program: of the run.
      corpus: whose held-out rows are read.
      order: of the tokens of a row over the devices of a mesh, `Layouts.full`; any is right.
    """

    def __init__(self, program: Program, corpus: Corpus, order: Int[np.ndarray, " T"] | None = None):
        run = program.run
        self._program, self._rows, self._order = program, corpus.held_out, order
        self._evaluate = jax.jit(program.evaluate)
        self._by_loss = run.curriculum.pace == "loss"
        self._evaluators = evaluators(program, corpus)

    def __call__(self, state: State) -> Validation:
        """The validation of a state's weights, or of their running mean where there is one."""
        params = self._program.weights(state)
        full = self._measured(params, self._program.masks.full)
        now = self._measured(params, self._program.masks.at(state)) if self._by_loss else None
        return Validation(
            loss=mean(full),
            bits_per_byte=bits_per_byte(np.sum(full.loss_sum), np.sum(full.text_bytes)),
            positions=by_position(self._program.masks.bucket_starts, full),
            pace_loss=None if now is None else mean(now),
            evaluators={name: evaluator(params) for name, evaluator in self._evaluators.items()},
        )

    def _measured(self, params, mask: Mask) -> Evaluated:
        mesh = self._program.placement.mesh

        def evaluate(rows: Batch) -> Evaluated:
            return self._evaluate(params, place_batch(mesh, pad_rows(mesh, rows), self._order), mask)

        return total(evaluate, self._rows)
