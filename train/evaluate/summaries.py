"""Documents in, summaries out; and of held-out documents their ROUGE, beside that of the lead baseline."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dynmask_jax.array_typing import Array
from train.config.operation import Generation
from train.data.pair_layout import PairLayout
from train.data.tokenizers import Tokenizer
from train.data.words import first_words
from train.disk import write_atomically
from train.evaluate.generation import Generator
from train.evaluate.rouge import rouge
from train.step.program import Program

SHOWN = 60  # words of a document in `summaries.jsonl`


@dataclass(frozen=True)
class Summarizer:
    """A model of the task `summarize`, from text to text.

    Attributes:
      generator: of the model.
      tokenizer: of the model.
      layout: what lies around a document.
      length: data.length.
      truncate: whether documents that are too long are cut at their end; else they are refused.
    """

    generator: Generator
    tokenizer: Tokenizer
    layout: PairLayout
    length: int
    truncate: bool

    @classmethod
    def of(
        cls, program: Program, params: Any, tokenizer: Tokenizer, layout: PairLayout, truncate: bool
    ) -> "Summarizer":
        """For a run's model. Arguments are those of `Generator.of`, and the attributes."""
        length = program.run.data.length
        generator = Generator.of(program, params, layout.ends, layout.loss_from(length))
        return cls(generator, tokenizer, layout, length, truncate)

    def summaries(
        self,
        documents: Sequence[str],
        options: Generation = Generation(),
        key: Array | None = None,
        names: Sequence[str] | None = None,
    ) -> list[str]:
        """A summary of each document.

        Args:
          documents: texts.
          options, key: as for `Generator.generate`.
          names: what to call the documents where one is refused; by default document 1, document 2, ….

        Raises:
          ValueError: a document is empty, or too long and not to be cut.
        """
        names = [f"document {n + 1}" for n in range(len(documents))] if names is None else names
        tokens = self.layout.encode(self.tokenizer, documents, 0)
        prompts = [self._prompt(each, name, options) for each, name in zip(tokens, names, strict=True)]
        texts = self.generator.generate(prompts, options, key)
        return [self.tokenizer.decode(text).strip() for text in texts]

    def _prompt(self, document: np.ndarray, name: str, options: Generation) -> np.ndarray:
        """A document's tokens and what lies around them, which the summary follows."""
        before, between = self.layout.before, self.layout.between
        room = self.length - len(before) - len(between)
        if not len(document):
            raise ValueError(f"{name} is empty: there is nothing to summarise")
        if room < 1:
            raise ValueError(
                f"data.length: a row of {self.length:,} has no room for a document beside the "
                f"{len(before) + len(between):,} tokens of summarize.template"
            )
        if len(document) > room:
            if not self.truncate:
                raise ValueError(
                    f"{name} has {len(document):,} tokens, too many for a model of rows of {self.length:,} "
                    f"(data.length), which hold {room:,} and what lies around them; with truncate it is cut "
                    "at its end"
                )
            # As in training, where a row holds the summary too.
            document = document[: max(1, room - options.tokens)]
        return np.concatenate([before, document, between]).astype(np.int32)


def evaluate_summaries(
    summarizer: Summarizer,
    examples: Sequence[tuple[str, str]],
    lead_words: int,
    options: Generation,
    path: Path,
    key: Array | None = None,
) -> dict[str, dict[str, float]]:
    """ROUGE of generated summaries and of the documents' beginnings, in percent.

    Args:
      summarizer: what makes them.
      examples: documents with their summaries, one at least.
      lead_words: words of the lead baseline.
      options: of generation.
      path: the file to write, in place of one that may be there: a JSON record a line, with the
        document's first words, the reference, the generated summary and the lead.
      key: of what is drawn.

    Returns:
      {"model": {"rouge1": …, "rouge2": …, "rougeL": …}, "lead, 120 words": {…}}.
    """
    documents, references = [example[0] for example in examples], [example[1] for example in examples]
    generated = summarizer.summaries(documents, options, key)
    leads = [first_words(document, lead_words) for document in documents]
    records = [
        {
            "document": first_words(document, SHOWN),
            "reference": reference,
            "generated": summary,
            "lead": first,
        }
        for document, reference, summary, first in zip(documents, references, generated, leads, strict=True)
    ]
    write_atomically(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return {"model": rouge(generated, references), f"lead, {lead_words} words": rouge(leads, references)}
