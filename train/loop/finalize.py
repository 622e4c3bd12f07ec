"""What comes after a run's last step: summaries of held-out documents, the pictures and the report.

Each part is made if it is not there yet, so a run that was killed here is finished by the same command.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import optax

from dynmask_jax.array_typing import Array
from train.checkpoint.folder import RunFolder
from train.config.run import Run
from train.data.corpus import Corpus
from train.disk import writing
from train.evaluate.summaries import Summarizer, evaluate_summaries
from train.metrics import log
from train.metrics.log import open_log
from train.metrics.mfu import Peak, work
from train.metrics.record import SummariesRecord
from train.parallel.mesh import to_one_device
from train.parallel.processes import Processes
from train.report import page
from train.report.outcome import Outcome, failure
from train.report.page import Facts
from train.step.program import Program, program_of
from train.step.state import State
from train.step.trainable import WeightCounts

RECORDS = 20_000
"""Of train steps, that the outcome, the report and the pictures are made of: a long run has millions."""


@dataclass(frozen=True)
class Finalize:
    """The end of a run.

    Attributes:
      folder: where its records lie, and the rest goes to.
      corpus: its texts.
      program: its model and curriculum.
      peak: what its devices can do.
      processes: of which the first writes, and the others wait for it.
    """

    folder: RunFolder
    corpus: Corpus
    program: Program
    peak: Peak
    processes: Processes

    @property
    def run(self) -> Run:
        """The config."""
        return self.program.run

    def __call__(self, state: State, compilations: int) -> Outcome:
        """The outcome of the whole run; in other processes than the first it has no records.

        Args:
          state: after the last step.
          compilations: of the train step, in this process; 0 where none was trained.

        What cannot be made costs itself alone, and is a line of the outcome: the run is trained and saved.
        """
        failures: list[str] = []
        if self.processes.call_on_first(self._lacks_summaries):
            weights = to_one_device(self.program.placement.mesh, (self.program.weights(state), state.key))
            failures += self.processes.call_on_first(
                lambda: _attempt("summaries and their ROUGE", lambda: self._summarise(*weights))
            )
        counts = WeightCounts.of(state)
        failures += self.processes.call_on_first(
            lambda: _attempt("the report", lambda: self._report(counts, compilations))
        )
        records = log.read(self.folder.metrics, RECORDS) if self.processes.first else []
        return Outcome(records, compilations, tuple(failures))

    def _report(self, counts: WeightCounts, compilations: int) -> list[str]:
        if not compilations and self.folder.report.exists():
            return []
        facts = Facts(self.run, self.corpus, self.program.masks.growth, counts, self.peak)
        outcome = Outcome(log.read(self.folder.metrics, RECORDS), compilations)
        with writing(self.folder.report):
            return page.write(self.folder.path, facts, outcome)

    def _lacks_summaries(self) -> bool:
        """Whether summaries are asked for that are not there yet, after the run's last step."""
        if not self.run.evaluation.summaries:
            return False
        records = log.read(self.folder.metrics, RECORDS)
        return not any(
            isinstance(record, SummariesRecord) and record.steps_done == self.run.steps for record in records
        )

    def _summarise(self, weights: optax.Params, key: Array) -> list[str]:
        """Summarises held-out documents, and writes them and their scores."""
        run, tokenizer = self.run, self.corpus.tokenizer
        words, layout = run.summarize.lead or self.corpus.lead_words, self.corpus.layout
        assert words is not None  # summarize has training summaries
        assert layout is not None
        program = program_of(run, tokenizer.vocabulary)
        scores = evaluate_summaries(
            Summarizer.of(program, weights, tokenizer, layout, run.summarize.truncate),
            self.corpus.examples[: run.evaluation.summaries],
            words,
            run.generation,
            self.folder.summaries,
            jax.random.wrap_key_data(key),
        )
        model = work(run.model, tokenizer.vocabulary)
        with open_log(self.folder.path, run, run.steps, work=model, peak=self.peak) as log:
            log.rouge(run.steps, scores)
        return []


def _attempt(part: str, make: Callable[[], list[str]]) -> list[str]:
    """The lines of what `make` could not make, or of why it made nothing."""
    try:
        return make()
    except Exception as error:
        return [failure(part, error, "the same command tries again")]
