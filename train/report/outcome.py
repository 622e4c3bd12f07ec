"""What a run came to, as a short table."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median

from train.metrics.record import Record, StepRecord, SummariesRecord, ValidationRecord


@dataclass(frozen=True)
class Speed:
    """The medians over some train steps. What no step was timed for is None.

    Attributes:
      window: tokens of the window or chunk.
      seconds: a step.
      tokens_per_second: padding left out.
      mfu: see `train.metrics.mfu`.
    """

    window: int
    seconds: float
    tokens_per_second: float | None
    mfu: float | None


def failure(part: str, error: Exception, remedy: str) -> str:
    """The line for a part that could not be made: the weights are saved, and the other parts are made."""
    return f"{part} could not be made ({type(error).__name__}: {error}): {remedy}"


@dataclass(frozen=True)
class Outcome:
    """What a finished run came to.

    Attributes:
      records: its metrics, as `train.metrics.record` describes them.
      compilations: of the train step, in this process.
      failures: what could not be made after training, and why, each in a line.
    """

    records: list[Record]
    compilations: int
    failures: tuple[str, ...] = ()

    @property
    def steps(self) -> list[StepRecord]:
        """The records of train steps."""
        return [record for record in self.records if isinstance(record, StepRecord)]

    @property
    def timed(self) -> list[StepRecord]:
        """Those of them whose step did not compile, or all where there are no others."""
        return [record for record in self.steps if record.tokens_per_second is not None] or self.steps

    @property
    def validations(self) -> list[ValidationRecord]:
        """The records of validations."""
        return [record for record in self.records if isinstance(record, ValidationRecord)]

    @property
    def rouge(self) -> Mapping[str, Mapping[str, float]] | None:
        """The scores of the summaries written last, by who wrote them and measure."""
        scores = [record.rouge for record in self.records if isinstance(record, SummariesRecord)]
        return scores[-1] if scores else None

    def speeds(self) -> tuple[Speed, Speed]:
        """At the start of the curriculum, over a tenth of the steps, and at the largest window."""
        ordered = sorted(self.timed, key=lambda record: record.window)
        first = ordered[: max(1, len(ordered) // 10)]
        return _speed(first), _speed([r for r in ordered if r.window == ordered[-1].window])

    def input_share(self) -> float:
        """Of the time of steps, what they waited for their batches, 0…1."""
        return sum(r.input_seconds for r in self.timed) / sum(r.seconds for r in self.timed)

    def __str__(self) -> str:
        lines = [(name, *map(str, values)) for name, values in self._lines()]
        widths = [max(len(line[column]) for line in lines) for column in range(3)]
        return "\n".join(
            f"{name:<{widths[0]}}  {before:>{widths[1]}}  {after:>{widths[2]}}"
            for name, before, after in lines
        )

    def _lines(self) -> Iterator[tuple[str, tuple[object, object]]]:
        steps, validations = self.steps, self.validations
        yield "", ("start", "end")
        if validations:
            bits = [bits_in_words(r.bits_per_byte) for r in (validations[0], validations[-1])]
            yield "validation, bits per byte, full mask", (bits[0], bits[1])
        if not steps:
            return
        yield "exposure", (f"{steps[0].exposure:.1%}", f"{steps[-1].exposure:.1%}")
        first, full = self.speeds()
        yield "", ("smallest", "full")
        yield "window, tokens", (f"{first.window:,}", f"{full.window:,}")
        yield "seconds per step", (f"{first.seconds:.3f}", f"{full.seconds:.3f}")
        yield "compilations of the train step", ("", self.compilations)
        if first.mfu is not None and full.mfu is not None:
            yield (
                "tokens per second",
                (f"{first.tokens_per_second:,.0f}", f"{full.tokens_per_second:,.0f}"),
            )
            yield "model FLOP utilisation", (f"{first.mfu:.1%}", f"{full.mfu:.1%}")
        yield "waiting for input, of a step", ("", f"{self.input_share():.1%}")
        yield "steps skipped", ("", f"{steps[-1].skipped:,}")


def bits_in_words(bits: float | None) -> str:
    """Bits per byte to three places."""
    return "not finite" if bits is None else f"{bits:.3f}"


def _speed(steps: list[StepRecord]) -> Speed:
    def middle(name: str) -> float | None:
        values = [getattr(record, name) for record in steps]
        return None if None in values else median(values)

    return Speed(
        window=min(record.window for record in steps),
        seconds=median(record.seconds for record in steps),
        tokens_per_second=middle("tokens_per_second"),
        mfu=middle("mfu"),
    )
