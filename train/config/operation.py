"""The sections of a config for operating a run: validation, generation, checkpoints, devices, logging.

Frozen records like those of `train/config/sections.py`. Weights do not depend on them, except that
validations advance a curriculum of pace "loss".
"""

from dataclasses import dataclass
from typing import Literal

from dynmask_jax.partitioning import Strategy
from train.config.checks import above_zero, at_least, one_of

LayoutChoice = Literal["auto", "contiguous", "zigzag", "striped"]


@dataclass(frozen=True)
class Evaluation:
    """Validation on held-out rows, at the full mask."""

    every: int = 0
    """Steps between validations. 0: one before training and one after."""
    rows: int = 16
    """Held-out rows of a validation; all if there are fewer."""
    needles: int = 0
    """Needle probe: needles hidden at each of 5 depths of a row. 0: no probe."""
    old_context: int | None = None
    """Validation also where a token sees its own chunk of so many tokens of its document alone, as in rows of
    that length: the context of a model before its extension. None: at the full mask alone."""
    recall: bool = False
    """Score the answers of held-out rows of `train.data.recall`, by the distance to what is asked for."""
    summaries: int = 0
    """Held-out documents summarised after training, for ROUGE beside the lead baseline (task summarize)."""

    def __post_init__(self):
        at_least("evaluation.", self, every=0, rows=1, needles=0, summaries=0, old_context=1)


@dataclass(frozen=True)
class Generation:
    """How tokens are sampled from the model's predictions."""

    tokens: int = 256
    """Most tokens to generate; a text ends before at the end token."""
    temperature: float = 0.0
    """0: always the most likely token; 1: as the model predicts; between: likely tokens more often."""
    top_k: int | None = None
    """Sample from the k most likely tokens only."""
    top_p: float | None = None
    """Sample from the fewest most likely tokens that together have this probability."""
    batch: int = 8
    """Texts generated at once."""

    def __post_init__(self):
        at_least("generation.", self, tokens=1, temperature=0, top_k=1, batch=1)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"generation.top_p must lie in 0…1 (0 excluded), got {self.top_p}")
        sampling = [name for name in ("top_k", "top_p") if getattr(self, name) is not None]
        if sampling and self.temperature == 0:
            raise ValueError(f"generation.{sampling[0]} needs a generation.temperature above 0, got 0")


@dataclass(frozen=True)
class Checkpoints:
    """When checkpoints are saved, which are kept, and where."""

    every: int = 0
    """Steps between checkpoints. 0: one at the end. SIGTERM saves one too."""
    keep: int = 2
    """Number of latest checkpoints that are kept."""
    keep_every: int | None = None
    """Checkpoints at multiples of so many steps are kept as well."""
    folder: str | None = None
    """Checkpoints are in folder / name of this folder, which all processes must see and which may be in a
    bucket: gs://bucket/runs. None: in the run's folder."""

    def __post_init__(self):
        at_least("checkpoints.", self, every=0, keep=1, keep_every=1)


@dataclass(frozen=True)
class Mesh:
    """The devices of a run, a mesh of four axes, and how a sequence is sharded over them."""

    data: int = 1
    """Devices that rows are sharded over, with weights replicated."""
    fsdp: int = 1
    """Devices that rows are sharded over, together with weights and optimizer state."""
    context: int = 1
    """Devices that the tokens of a row are sharded over, together with weights and optimizer state."""
    tensor: int = 1
    """Devices that attention heads and the hidden features of the feed-forward layer are sharded over."""
    strategy: Strategy = "ring"
    """Context parallelism. ring: keys are passed on as far as the mask shows them; all_gather: every device
    gets all keys; ulysses: during attention heads are sharded instead of tokens."""
    layout: LayoutChoice = "auto"
    """Which tokens of a row a context device has. auto: the best balance for the mask of the step."""

    def __post_init__(self):
        at_least("mesh.", self, data=1, fsdp=1, context=1, tensor=1)
        one_of("mesh.", self, strategy=Strategy, layout=LayoutChoice)

    @property
    def size(self) -> int:
        """Number of devices."""
        return self.data * self.fsdp * self.context * self.tensor


@dataclass(frozen=True)
class Watch:
    """What is logged of a run in training, beside metrics.jsonl and TensorBoard."""

    log_every: int = 1
    """Steps between records of the metrics."""
    wandb: str | None = None
    """Weights & Biases project to log to."""
    peak_flops: float | None = None
    """Peak FLOP/s of one device, for the model FLOP utilisation. None: from the device's data sheet, or
    measured with a large matrix product."""
    profile: int | None = None
    """First step of a profiler trace, from 0."""
    profile_steps: int = 3
    """Steps in the trace."""

    def __post_init__(self):
        at_least("watch.", self, log_every=1, profile=0, profile_steps=1)
        above_zero("watch.", self, "peak_flops")
