"""What a run came to, as a short table."""

from dataclasses import dataclass
from statistics import median

from train.metrics import Record


@dataclass(frozen=True)
class Summary:
    """A finished run.

    Attributes:
      records: its metrics, as `train.metrics` describes them.
      compilations: of the train step, in this process.
    """

    records: list[Record]
    compilations: int

    def __str__(self) -> str:
        lines = [(name, *map(str, values)) for name, values in self._lines()]
        widths = [max(len(line[column]) for line in lines) for column in range(3)]
        return "\n".join(
            f"{name:<{widths[0]}}  {before:>{widths[1]}}  {after:>{widths[2]}}"
            for name, before, after in lines
        )

    def _lines(self):
        steps = [r for r in self.records if "loss" in r]
        bits = [r["validation_bits_per_byte"] for r in self.records if "validation_loss" in r]
        timed = steps[1:] or steps  # the first compiles
        windows = sorted({r["window"] for r in timed})
        yield "", ("start", "end")
        yield "validation, bits per byte, full mask", (f"{bits[0]:.3f}", f"{bits[-1]:.3f}")
        yield "exposure", (f"{steps[0]['exposure']:.1%}", f"{steps[-1]['exposure']:.1%}")
        yield "", ("smallest", "full")
        yield "window, tokens", (f"{windows[0]:,}", f"{windows[-1]:,}")
        yield (
            "seconds per step",
            (f"{seconds_at(timed, windows[0]):.3f}", f"{seconds_at(timed, windows[-1]):.3f}"),
        )
        yield "compilations of the train step", ("", self.compilations)


def seconds_at(steps: list[Record], window: int) -> float:
    """The median time of the steps at a window."""
    return median(r["seconds"] for r in steps if r["window"] == window)
