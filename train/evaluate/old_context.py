"""Validation at the context that a model had before it was extended, beside the one at the full mask."""

from functools import partial

import jax
import numpy as np

from dynmask_jax import Chunks
from train.data.batch import Batch
from train.data.corpus import Corpus
from train.evaluate.totals import by_position, mean, total
from train.parallel.feed import pad_rows, place_batch
from train.step.program import Program
from train.step.state import Evaluated, bits_per_byte


def old_context_loss(program: Program, corpus: Corpus) -> "OldContextLoss | None":
    """The evaluator that a run's config asks for; None where `evaluation.old_context` is None."""
    return None if program.run.evaluation.old_context is None else OldContextLoss(program, corpus)


class OldContextLoss:
    """The loss of the held-out rows in chunks of `evaluation.old_context` tokens, none of which sees another.

    Each document is so cut as rows of the old length cut it. Targets, their buckets and the program's shapes
    are those of the validation at the full mask, so that what differs is what more distant context is worth.
    A window of as many tokens would be another context: the first token, on which trained models attend a
    great deal, leaves it (Xiao et al. 2024, arXiv:2309.17453), and over L layers it reaches L times as far.
    """

    def __init__(self, program: Program, corpus: Corpus):
        tokens = program.run.evaluation.old_context
        assert tokens is not None  # old_context_loss checks it
        self._program, self._rows, self._tokens = program, corpus.held_out, tokens
        self._evaluate = jax.jit(partial(program.evaluate, mask=program.masks.full & Chunks(tokens)))

    def __call__(self, params) -> dict[str, float]:
        """What the weights reach.

        Returns:
          `tokens` of the old context; `loss`, mean nats a token; `bits_per_byte`; and `positions/START`, the
          loss of tokens with so many of their document before them, of which they see those in their chunk.
        """
        mesh = self._program.placement.mesh

        def evaluate(rows: Batch) -> Evaluated:
            return self._evaluate(params, place_batch(mesh, pad_rows(mesh, rows)))

        sums = total(evaluate, self._rows)
        positions = by_position(self._program.masks.bucket_starts, sums)
        return {
            "tokens": float(self._tokens),
            "loss": mean(sums),
            "bits_per_byte": bits_per_byte(np.sum(sums.loss_sum), np.sum(sums.text_bytes)),
            **{f"positions/{start}": loss for start, loss in positions.items()},
        }
