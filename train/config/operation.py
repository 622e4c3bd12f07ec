"""The sections of a config that define how a run is operated: validation, generation, checkpoints, devices,
and what is logged.

Frozen records like those of `train/config/sections.py`. No weight depends on them, except that validations
move a curriculum with pace "loss".
"""

from dataclasses import dataclass
from typing import Literal

from train.config.checks import above_zero, at_least, one_of

Strategy = Literal["ring", "all_gather", "ulysses"]
LayoutChoice = Literal["auto", "contiguous", "zigzag", "striped"]


@dataclass(frozen=True)
class Evaluation:
    """Validation on held-out rows, at the full mask."""

    every: int = 0
    """Steps between validations; 0 for one before training and one after."""
    rows: int = 16
    """Held-out rows that a validation reads; all, where there are fewer."""
    needles: int = 0
    """Needles hidden at each of 5 depths of a row, to see whether they are found; 0: no probe."""
    summaries: int = 0
    """Held-out documents summarised after training, for ROUGE beside the lead baseline (summarize)."""

    def __post_init__(self):
        at_least("evaluation.", self, every=0, rows=1, needles=0, summaries=0)


@dataclass(frozen=True)
class Generation:
    """How tokens are drawn from the model's predictions."""

    tokens: int = 256
    """At most so many are generated; the end token ends a text before."""
    temperature: float = 0.0
    """0: always the likeliest token; 1: as the model predicts; between: surer of the likely ones."""
    top_k: int | None = None
    """Draw from the k likeliest tokens only."""
    top_p: float | None = None
    """Draw from the likeliest tokens that together have this probability."""
    batch: int = 8
    """Texts that are generated at once."""

    def __post_init__(self):
        at_least("generation.", self, tokens=1, temperature=0, top_k=1, batch=1)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"generation.top_p must lie in 0…1 (0 excluded), got {self.top_p}")
        drawing = [name for name in ("top_k", "top_p") if getattr(self, name) is not None]
        if drawing and self.temperature == 0:
            raise ValueError(f"generation.{drawing[0]} needs a generation.temperature above 0, got 0")


@dataclass(frozen=True)
class Checkpoints:
    """Which states of training are kept."""

    every: int = 0
    """Steps between checkpoints; 0 for one at the end. One is written on SIGTERM too."""
    keep: int = 2
    """The latest so many are kept."""
    keep_every: int | None = None
    """Those at multiples of so many steps are kept as well."""
    folder: str | None = None
    """Where they lie: in folder / name of this one, which may be a bucket's, gs://bucket/runs, and which all
    processes must see. None: in the run's folder."""

    def __post_init__(self):
        at_least("checkpoints.", self, every=0, keep=1, keep_every=1)


@dataclass(frozen=True)
class Mesh:
    """The devices of a run, as a grid of four axes, and how a sequence lies on them."""

    data: int = 1
    """Devices that rows are spread over, each with all weights of its own."""
    fsdp: int = 1
    """Devices that rows are spread over, and the weights and the optimizer's state too."""
    context: int = 1
    """Devices that the tokens of a row are spread over, and the weights and the optimizer's state too."""
    tensor: int = 1
    """Devices that the heads of attention and the features of the feed-forward layer are spread over."""
    strategy: Strategy = "ring"
    """How attention goes over context devices. ring: keys travel as far as the mask shows them;
    all_gather: every device gets all keys; ulysses: heads are spread instead of tokens."""
    layout: LayoutChoice = "auto"
    """Which tokens of a row a context device holds; auto: what balances the mask of the step best."""

    def __post_init__(self):
        at_least("mesh.", self, data=1, fsdp=1, context=1, tensor=1)
        one_of("mesh.", self, strategy=Strategy, layout=LayoutChoice)

    @property
    def size(self) -> int:
        """Devices in all."""
        return self.data * self.fsdp * self.context * self.tensor


@dataclass(frozen=True)
class Watch:
    """What is shown of a run while it goes on, beside metrics.jsonl and TensorBoard."""

    log_every: int = 1
    """Steps between records of the metrics."""
    wandb: str | None = None
    """Project of Weights & Biases to log to."""
    peak_flops: float | None = None
    """Operations a second of one device at its best, for the model FLOP utilisation. None: the
    device's data sheet, or what a large matrix product reaches here."""
    profile: int | None = None
    """First step of a profiler trace, from 0."""
    profile_steps: int = 3
    """Steps in the trace."""

    def __post_init__(self):
        at_least("watch.", self, log_every=1, profile=0, profile_steps=1)
        above_zero("watch.", self, "peak_flops")
