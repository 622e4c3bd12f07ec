"""The needle probe: a number is stated somewhere in a long text and asked for at its end.

Kamradt 2023, "Needle in a Haystack"; here in the held-out text's own tokens, scored by the model's
predictions of the answer. Each text is read twice, once with another number in the needle's place:
what the answer's loss gains by the right one is what the model has retrieved, long before it
retrieves the whole number.
"""

import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np

from dynmask_jax import Tokens
from train.config.run import Run
from train.data.batch import Batch
from train.data.corpus import Corpus
from train.data.rows import ByteCount
from train.data.tokenizers import Tokenizer
from train.parallel.feed import place_batch
from train.parallel.mesh import replicate
from train.step.program import Program

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where needles lie: 0 at the beginning of the text, 1 at its end."""
NAMES = ("Ada", "Boris", "Clara", "Dora", "Emil", "Flora", "Gustav", "Hedda")


def needle_probe(program: Program, corpus: Corpus) -> "Probe | None":
    """The probe that a run's config asks for; None where `evaluation.needles` is 0."""
    return Probe(program, corpus) if program.run.evaluation.needles else None


def by_depth(found: Mapping[str, float | None], name: str) -> dict[float, float | None]:
    """Of what a probe found, the numbers of one name by their depths.

    >>> by_depth({"found/0.0": 1.0, "found/0.5": 0.25, "gain/0.0": 2.0}, "found")
    {0.0: 1.0, 0.5: 0.25}
    """
    parts = [(key.split("/"), value) for key, value in found.items()]
    return {float(depth): value for (each, depth), value in parts if each == name}


class Probe:
    """Hides `evaluation.needles` numbers at each depth of rows of `data.length` held-out tokens.

    Raises:
      ValueError: a row is too short for a needle and its question.
    """

    def __init__(self, program: Program, corpus: Corpus):
        run = program.run
        self._shape = (len(DEPTHS), run.evaluation.needles, 2)  # depths, needles, right and wrong number
        rows = list(_rows(corpus, run))
        self._answer = int(max(row.weights.sum() for row in rows))
        parts = program.placement.row_parts
        size = -(-min(run.data.batch, len(rows)) // parts) * parts
        # All batches have one shape; what is read twice is cut off.
        rows = list(itertools.islice(itertools.cycle(rows), -(-len(rows) // size) * size))
        self._batches = [jax.tree.map(_stack, *rows[i : i + size]) for i in range(0, len(rows), size)]
        self._score = jax.jit(self._scores)
        self._program = program

    def __call__(self, params) -> dict[str, float]:
        """What the weights find, for each depth in 0 … 1.

        Returns:
          `found/DEPTH`: the share of the needles of which every token was the likeliest; `gain/DEPTH`: bits a
          token of the answer that the right number saves beside a wrong one, positive where it was retrieved.
        """
        mesh = self._program.placement.mesh
        scores = jax.device_get([self._score(params, place_batch(mesh, batch)) for batch in self._batches])
        count = np.prod(self._shape)
        found, losses = (np.concatenate(p)[:count].reshape(self._shape) for p in zip(*scores, strict=True))
        gain = (losses[:, :, 1] - losses[:, :, 0]).mean(axis=1) / np.log(2)
        numbers = {"found": found[:, :, 0].mean(axis=1), "gain": gain}
        return {
            f"{name}/{depth}": float(value)
            for name, values in numbers.items()
            for depth, value in zip(DEPTHS, values, strict=True)
        }

    def _scores(self, params, batch: Batch):
        """For each row whether its answer is found, and the answer's mean loss in nats."""
        program, last = self._program, slice(-self._answer, None)
        model = nnx.merge(program.graph, params)
        plans = program.masks.plans(program.masks.full, Tokens(batch.positions, batch.segments))
        logits = model.unembed(model(jnp.asarray(batch.inputs), plans)[:, last]).astype(jnp.float32)
        targets, weights = batch.targets[:, last], batch.weights[:, last]
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, :, None], axis=-1)[:, :, 0]
        right = (logits.argmax(axis=-1) == targets) | (weights == 0)
        scores = right.all(axis=1), (losses * weights).sum(axis=1) / weights.sum(axis=1)
        return replicate(program.placement.mesh, scores)


@dataclass(frozen=True)
class Riddle:
    """One needle, its question and the answer, and the needle of another number, as tokens."""

    needle: np.ndarray
    other: np.ndarray
    question: np.ndarray
    answer: np.ndarray


def riddle(tokenizer: Tokenizer, draw: random.Random) -> Riddle:
    """A riddle about a number of five digits; the other number differs in each digit."""
    name = draw.choice(NAMES)
    pairs = [draw.sample("0123456789", 2) for _ in range(5)]
    number, other = ("".join(digits) for digits in zip(*pairs, strict=True))
    statement = f"\nThe code of {name} is"
    return Riddle(
        *tokenizer.encode([f"{statement} {number}.\n", f"{statement} {other}.\n", statement, f" {number}"])
    )


def _rows(corpus: Corpus, run: Run) -> Iterator[Batch]:
    """Rows `[T]`: depth by depth, needle by needle, the right number and then the wrong one."""
    hay = np.concatenate([batch.inputs[batch.segments > 0] for batch in corpus.held_out])
    between = [] if corpus.layout is None else corpus.layout.between
    draw = random.Random(run.seed)
    for depth, _ in itertools.product(DEPTHS, range(run.evaluation.needles)):
        asked = riddle(corpus.tokenizer, draw)
        tail = np.concatenate([between, asked.question, asked.answer]).astype(np.int32)
        start = draw.randrange(len(hay))
        for needle in (asked.needle, asked.other):
            room = run.data.length + 1 - len(needle) - len(tail)
            if room < 0:
                raise ValueError(
                    f"evaluation.needles needs data.length of at least {len(needle) + len(tail) - 1} for a "
                    f"needle and its question, got {run.data.length}"
                )
            around, cut = np.take(hay, range(start, start + room), mode="wrap"), round(depth * room)
            tokens = np.concatenate([around[:cut], needle, around[cut:], tail]).astype(np.int32)
            byte_count = corpus.tokenizer.target_bytes
            yield _row(
                tokens, byte_count, answer=len(asked.answer), after=len(tail) if len(between) else None
            )


def _row(tokens: np.ndarray, byte_count: ByteCount, *, answer: int, after: int | None) -> Batch:
    """The row that reads all but the last token; the loss is on the answer's, the last ones.

    `after` is the tokens from a document's end on: its first stands at the row's length, as in the
    task `summarize`.
    """
    length = len(tokens) - 1
    context = np.arange(length, dtype=np.int32)
    return Batch(
        inputs=tokens[:-1],
        targets=tokens[1:],
        weights=(context >= length - answer).astype(np.float32),
        positions=context if after is None else context + after - 1,
        segments=np.ones(length, np.int32),
        context=context,
        target_bytes=byte_count(tokens[:-1], tokens[1:]),
    )


def _stack(*leaves: np.ndarray) -> np.ndarray:
    return np.stack(leaves)
