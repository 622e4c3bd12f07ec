"""What comes after a run's last step: summaries of held-out documents, the pictures and the report.

Each part is made if it is not there yet, so a run that was killed here is finished by the same command.
"""

from dataclasses import dataclass

import jax

from train import metrics, report
from train.config import Run
from train.data import Corpus
from train.disk import writing
from train.flops import Peak, work
from train.folder import RunFolder
from train.generation import Generator
from train.metrics import open_log
from train.report import Facts
from train.step import Program, State
from train.summaries import Summarizer, evaluate_summaries
from train.summary import Summary

RECORDS = 20_000
"""Of train steps, that the summary, the report and the pictures are made of: a long run has millions."""


@dataclass(frozen=True)
class Finish:
    """The end of a run.

    Attributes:
      run: its config.
      folder: where its records lie, and the rest goes to.
      corpus: its texts.
      program: its model and curriculum.
      peak: what its devices can do.
    """

    run: Run
    folder: RunFolder
    corpus: Corpus
    program: Program
    peak: Peak

    def __call__(self, state: State, compilations: int) -> Summary:
        """The summary of the whole run.

        Args:
          state: after the last step.
          compilations: of the train step, in this process; 0 where none was trained.

        Raises:
          WriteError: the folder cannot be written to.
        """
        records = metrics.read(self.folder.metrics, RECORDS)
        if self.run.evaluation.summaries and not any("rouge" in record for record in records):
            self._summarise(state)
            records = metrics.read(self.folder.metrics, RECORDS)
        summary = Summary(records, compilations)
        if jax.process_index() == 0 and (compilations or not self.folder.report.exists()):
            parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
            facts = Facts(self.run, self.corpus, self.program.growth, parameters, self.peak)
            with writing(self.folder.report):
                report.write(self.folder.path, facts, summary)
        return summary

    def _summarise(self, state: State):
        """Summarises held-out documents, and writes them and their scores."""
        run, tokenizer = self.run, self.corpus.tokenizer
        words = run.summarize.lead or self.corpus.lead_words
        assert words is not None  # summarize has training summaries
        scores = evaluate_summaries(
            Summarizer(
                Generator.of(self.program, self.program.weights(state), tokenizer.end),
                tokenizer,
                run.summarize.truncate,
            ),
            self.corpus.examples[: run.evaluation.summaries],
            words,
            run.generation,
            self.folder.summaries,
            jax.random.wrap_key_data(state.key),
        )
        texts = self.corpus.bytes_per_token
        model = work(run.model, tokenizer.vocabulary)
        with open_log(
            self.folder.path, run, run.steps, bytes_per_token=texts, work=model, peak=self.peak
        ) as log:
            log.rouge(run.steps, scores)
