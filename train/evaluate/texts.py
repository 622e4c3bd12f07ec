"""The loss of a language model on any texts, under the full mask or a narrower one, by context."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np
import optax

from dynmask_jax import Chunks, Mask, Window
from train.config.operation import Evaluation, Mesh
from train.config.run import Run
from train.config.sections import Curriculum
from train.data.batch import Batch
from train.data.batches import padded_batches
from train.data.rows import DocumentPieces, Spans, alone
from train.data.tokenizers import Ids, Tokenizer
from train.evaluate.totals import by_position, total
from train.step.program import program_of
from train.step.state import bits_per_byte


@dataclass(frozen=True)
class TextLoss:
    """What a model makes of texts.

    Attributes:
      tokens: that were predicted: all but the first of each text.
      bytes: of text that these spell.
      nats_per_token: their mean loss.
      bits_per_byte: their loss in bits, over those bytes; NaN where they spell none.
      by_position: the mean loss of tokens with so many of their text before them in the row, by the least of
        them: "64" for 64 … 127. Where there are none, the key is missing.
    """

    tokens: int
    bytes: int
    nats_per_token: float
    bits_per_byte: float
    by_position: dict[str, float]


@dataclass(frozen=True)
class Shown:
    """What a token sees of those before it in its row.

    Attributes:
      window: so many tokens at most, itself among them; None for all.
      chunk: those of its own chunk of so many tokens alone; None for all.
    """

    window: int | None = None
    chunk: int | None = None

    def narrow(self, mask: Mask) -> Mask:
        """The part of a mask that is left."""
        if self.window is not None:
            mask = mask & Window(self.window)
        return mask if self.chunk is None else mask & Chunks(self.chunk)


def text_loss(
    run: Run,
    params: optax.Params,
    tokenizer: Tokenizer,
    texts: Sequence[Ids],
    length: int,
    *,
    batch: int,
    shown: Shown,
) -> TextLoss:
    """The loss of the texts' tokens, each text cut into rows.

    Args:
      run, params: of a model, its config and its weights. Whatever its task, a token sees those before it.
      tokenizer: that of the model.
      texts: the tokens of each.
      length: T, tokens of context in a row. Consecutive rows of a text share no context.
      batch: rows at once.
      shown: what is left of the full mask.

    Raises:
      ValueError: no text has two tokens.
    """
    texts = [text for text in texts if len(text) > 1]
    if not texts:
        raise ValueError("there is nothing to predict: no text has two tokens")
    length = max(2, min(length, max(map(len, texts)) - 1))  # the fewest that a row may have
    program = program_of(_evaluated(run, length, batch), tokenizer.vocabulary)
    evaluate = jax.jit(program.evaluate)
    mask = shown.narrow(program.masks.full)
    sums = total(lambda rows: evaluate(params, rows, mask), _rows(texts, tokenizer, length, batch))
    nats, tokens, spelt = (float(np.sum(x)) for x in (sums.loss_sum, sums.weight, sums.text_bytes))
    return TextLoss(
        tokens=round(tokens),
        bytes=round(spelt),
        nats_per_token=nats / tokens,
        bits_per_byte=bits_per_byte(nats, spelt),
        by_position=by_position(program.masks.bucket_starts, sums),
    )


def _evaluated(run: Run, length: int, batch: int) -> Run:
    """The run, for rows of this length on one device: a language model, whatever it was trained for."""
    return replace(
        run,
        task="lm",
        data=replace(run.data, length=length, batch=batch, rows="packed"),
        optimizer=replace(run.optimizer, accumulate=1),
        evaluation=Evaluation(),
        curriculum=Curriculum(kind="full", start=1),
        mesh=Mesh(),
    )


def _rows(texts: Sequence[Ids], tokenizer: Tokenizer, length: int, batch: int) -> Iterator[Batch]:
    """Batches of one piece of a text a row."""
    stops = np.cumsum([len(text) for text in texts])
    spans = Spans(stops - [len(text) for text in texts], stops)
    pieces = DocumentPieces(np.concatenate(texts), spans, length)
    rows = (alone(pieces[number], length) for number in range(len(pieces)))
    return padded_batches(rows, batch, 0, tokenizer.target_bytes)
