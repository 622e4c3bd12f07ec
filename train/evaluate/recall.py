"""The recall evaluator: which answers of synthetic text are right, by the distance to what is asked for."""

from collections.abc import Mapping

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np

from train.data.batch import Batch
from train.data.corpus import Corpus
from train.data.recall import distances
from train.parallel.feed import pad_rows, place_batch
from train.parallel.mesh import replicate
from train.step.program import Program


def recall_score(program: Program, corpus: Corpus) -> "RecallScore | None":
    """The evaluator that a run's config asks for; None where `evaluation.recall` is off."""
    return RecallScore(program, corpus) if program.run.evaluation.recall else None


def by_distance(found: Mapping[str, float | None]) -> dict[int, float | None]:
    """Of what the evaluator found, the accuracy by the least distance of each bucket, in tokens.

    >>> by_distance({"accuracy/all": 0.5, "accuracy/2": 0.75, "accuracy/128": 0.25})
    {2: 0.75, 128: 0.25}
    """
    parts = [(key.split("/")[-1], value) for key, value in found.items()]
    return {int(start): value for start, value in parts if start.isdecimal()}


class RecallScore:
    """Scores the letters of values that a document has told before, in held-out rows, at the full mask.

    Raises:
      ValueError: no held-out row has such a letter.
    """

    def __init__(self, program: Program, corpus: Corpus):
        self._program, self._batches = program, corpus.held_out
        rows = [(np.asarray(batch.inputs), np.asarray(batch.segments)) for batch in corpus.held_out]
        self._distances = [distances(inputs, segments) for inputs, segments in rows]
        if not any(found.any() for found in self._distances):
            raise ValueError("evaluation.recall: the held-out rows are no text of train.data.recall")
        self._right = jax.jit(self._predicted)

    def __call__(self, params) -> dict[str, float]:
        """The shares of letters that are the likeliest: `accuracy/all`, and `accuracy/N` of those whose key
        last occurred N … 2N − 1 tokens before, for each power of two N that has any."""
        mesh = self._program.placement.mesh
        rights = jax.device_get(
            [self._right(params, place_batch(mesh, pad_rows(mesh, batch))) for batch in self._batches]
        )
        found = zip(self._distances, rights, strict=True)
        pairs = [(d[d > 0], right[: len(d)][d > 0]) for d, right in found]
        distance, right = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
        buckets = 2 ** np.floor(np.log2(distance)).astype(np.int64)
        shares = {f"accuracy/{start}": float(right[buckets == start].mean()) for start in np.unique(buckets)}
        return {"accuracy/all": float(right.mean()), **shares}

    def _predicted(self, params, batch: Batch):
        """Whether each target is the likeliest token, `[B, T]`."""
        program = self._program
        model = nnx.merge(program.graph, params)
        plans = program.masks.plans(program.masks.full, program.masks.tokens(batch))
        logits = model.unembed(model(jnp.asarray(batch.inputs), plans))
        return replicate(program.placement.mesh, logits.argmax(axis=-1) == batch.targets)
