"""The sections of a config that define what is learned: model, data, task, loss, optimizer, curriculum.

Each is a frozen record, checked when built. A field is an option of the command line, `--model.layers`,
and its docstring is the option's help. The model is in `train/config/model.py`, the sections for operating a
run are in `train/config/operation.py`.
"""

from dataclasses import dataclass, field
from typing import Literal

from dynmask_jax.curricula import Order
from dynmask_jax.schedules import ScheduleName
from train.config.checks import above_zero, at_least, known_names, one_of
from train.config.model import Dtype as Dtype
from train.config.model import Model as Model
from train.config.model import Reach as Reach
from train.config.model import RopeScaling as RopeScaling

RowKind = Literal["packed", "chunked"]
PrefixKind = Literal["bidirectional", "causal"]
DOCUMENT, SUMMARY, CHAT = "{document}", "{summary}", "chat"
"""What summarize.template has in the places of the texts; and the word for the folder's own template."""
BASE_TEMPLATE = f"{DOCUMENT}\n\nSummary: {SUMMARY}"
"""The template of a model that began as a Hugging Face folder."""
Kind = Literal["full", "static", "window", "chunks", "reveal"]
Pace = Literal["steps", "loss"]
Target = Literal["query", "key", "value", "out", "gate", "up", "down"]
WeightGroup = Literal[
    "embedding",
    "layers",
    "global",
    "local",
    "attention",
    "feed_forward",
    "norms",
    "biases",
    "logits",
    Target,
]


@dataclass(frozen=True)
class Data:
    """The texts, and how they are cut into rows."""

    paths: tuple[str, ...] = ()
    """Text files, JSON lines, CSV, each also with gzip, folders of them, globs, or folders that Hugging Face
    `datasets` saved. Left out: the Python standard library's source."""
    held_out_paths: tuple[str, ...] = ()
    """The same for validation. Left out: the share held_out of data.paths."""
    held_out: float = 0.05
    """Share of the tokens (of the documents for the task summarize) held out for validation."""
    held_out_seed: int | None = None
    """Seed that decides what is held out, so that runs of different seeds share their validation rows. None:
    the run's seed."""
    columns: dict[str, str] = field(default_factory=dict)
    """The columns of records, where they do not have their usual names: text body, or document article
    summary highlights."""
    skip_malformed: bool = False
    """Skip and count what cannot be read, instead of stopping at the first. Empty rows, and files of a folder
    that are not text, are skipped and counted in any case."""
    tokenizer: str = "bytes"
    """bytes, or the path of a tokenizer.json or a sentencepiece model."""
    end_token: str | None = None
    """The token between documents. None: found in the tokenizer by its usual names."""
    begin_token: str | None = None
    """The token before each document, as Llama and Gemma have it. None: there is none."""
    unknown: float = 0.05
    """Share of the texts' bytes, white space aside, that the tokenizer may leave out or turn into its unknown
    token; above it the run is refused."""
    rows: RowKind = "packed"
    """packed: documents are packed first-fit into rows and do not see each other; documents longer than a row
    are cut. chunked: documents are concatenated and cut into rows; tokens see earlier documents of a row."""
    packing_bins: int = 64
    """Rows that are open at once while packing; more of them leave less padding."""
    length: int = 4096
    """T, tokens in a row."""
    batch: int = 1
    """B, rows in a step, of all processes together."""
    cache: str | None = None
    """Folder where tokenized texts are cached between runs. None: cache, beside the run folders."""

    def __post_init__(self):
        at_least("data.", self, length=2, batch=1, packing_bins=1, held_out_seed=0)
        one_of("data.", self, rows=RowKind)
        if not 0 <= self.unknown <= 1:
            raise ValueError(f"data.unknown must lie in 0…1, got {self.unknown}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"data.held_out must lie between 0 and 1, got {self.held_out}")
        if unknown := set(self.columns) - {"text", "document", "summary"}:
            raise ValueError(
                "data.columns names the columns of text, document and summary, got one for "
                f"{', '.join(map(repr, sorted(unknown)))}"
            )


@dataclass(frozen=True)
class Summarize:
    """The task `summarize`: each segment is a document and its summary."""

    prefix: PrefixKind = "bidirectional"
    """bidirectional: tokens of the document see later ones too; causal: they do not."""
    truncate: bool = False
    """Cut off the end of documents that do not fit a row with their summary, instead of stopping."""
    lead: int | None = None
    """Words of the lead baseline, the start of the document. None: as in the median training summary."""
    template: str | None = None
    """How document and summary follow each other: a text with {document} and {summary}; or chat, for the chat
    template of the Hugging Face folder that the model came from. None: an end token between them."""
    instruction: str = "Summarize the text above."
    """What the user asks for after the document, with the template chat."""

    def __post_init__(self):
        one_of("summarize.", self, prefix=PrefixKind)
        at_least("summarize.", self, lead=1)
        if self.template not in (None, CHAT):
            _check_template(self.template)


def _check_template(template: str):
    """Refuses a text that does not say where document and summary go."""
    _, _, rest = template.partition(DOCUMENT)
    between, found, _ = rest.partition(SUMMARY)
    if not found or template.count(DOCUMENT) > 1 or template.count(SUMMARY) > 1 or not between.strip(" "):
        raise ValueError(
            f"summarize.template must be {CHAT}, or a text that has {DOCUMENT} and after it, with more than "
            f"spaces between them, {SUMMARY}, each once, got {template!r}"
        )


@dataclass(frozen=True)
class Loss:
    """The cross-entropy, computed from the logits of a few tokens at a time."""

    chunk: int | None = None
    """Tokens whose logits are in memory at once. None: the larger of 1,024 and 16 MiB of logits."""
    z: float = 0.0
    """Weight of the squared log-normaliser (z-loss), which keeps logits from drifting; often 1e-4."""

    def __post_init__(self):
        at_least("loss.", self, chunk=1, z=0)


@dataclass(frozen=True)
class Optimizer:
    """AdamW, with a linear warm-up, a cosine decay and clipping by the global norm."""

    learning_rate: float = 2e-3
    """Peak learning rate, after the warm-up."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises to its peak: of W, step n has (n + 1) / W."""
    final: float = 0.1
    """Learning rate of the last step, as a share of the peak."""
    weight_decay: float = 0.1
    """Weight decay of matrices; vectors are not decayed."""
    beta2: float = 0.95
    """Decay of the moving average of squared gradients."""
    clip: float = 1.0
    """Largest global norm of a gradient; larger ones are scaled down."""
    accumulate: int = 1
    """Gradient accumulation: parts of a step's rows that are computed one after the other, to save memory."""
    ema: float | None = None
    """Decay of a moving average of the weights, such as 0.999, which validation and export use. None: no
    average. After n steps it is at most (1 + n) / (10 + n)."""
    give_up: int = 10
    """Training stops after so many consecutive skipped steps, whose loss or gradient is not finite."""
    train: tuple[WeightGroup, ...] | None = None
    """Weights that train, by name: embedding, layers, global or local (the layers of that reach), attention,
    feed_forward, norms, biases, logits, or a projection of the layers: query, key, value, out, gate, up,
    down. The others are frozen: no gradient, optimizer state or moving average of them exists. None: all;
    with lora.rank none but the factors of LoRA, which always train."""
    frozen: tuple[WeightGroup, ...] = ()
    """Weights that do not train, by the same names, of those that optimizer.train says."""

    def __post_init__(self):
        known_names("optimizer.", self, train=WeightGroup, frozen=WeightGroup)
        above_zero("optimizer.", self, "learning_rate", "clip")
        at_least("optimizer.", self, weight_decay=0, accumulate=1, give_up=1)
        if not 0 <= self.warmup < 1:
            raise ValueError(f"optimizer.warmup must lie in 0…1 (1 excluded), got {self.warmup}")
        if not 0 <= self.final <= 1:
            raise ValueError(f"optimizer.final must lie in 0…1, got {self.final}")
        if not 0 < self.beta2 < 1:
            raise ValueError(f"optimizer.beta2 must lie between 0 and 1, got {self.beta2}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"optimizer.ema must lie between 0 and 1, got {self.ema}")


@dataclass(frozen=True)
class Lora:
    """LoRA: a product of two small matrices is learnt beside each matrix, which is frozen."""

    rank: int = 0
    """Columns of the first matrix and rows of the second: y = x W + alpha / rank · x A B, A random and B zero
    at first (Hu et al. 2021, arXiv:2106.09685). 0: no LoRA."""
    alpha: float = 16.0
    """What the product is multiplied by, times rank."""
    targets: tuple[Target, ...] = ("query", "key", "value", "out", "gate", "up", "down")
    """The projections that have one: query, key, value and out of attention, gate, up and down of the
    feed-forward layers."""

    def __post_init__(self):
        at_least("lora.", self, rank=0)
        above_zero("lora.", self, "alpha")
        known_names("lora.", self, targets=Target)
        if self.rank and not self.targets:
            raise ValueError(f"lora.targets must name a projection where lora.rank is {self.rank}, got none")

    @property
    def scale(self) -> float:
        """What the product of a projection's two matrices is multiplied by."""
        return self.alpha / self.rank if self.rank else 0.0


@dataclass(frozen=True)
class Curriculum:
    """What each query sees at each step. Evaluation always uses the full mask of the task."""

    kind: Kind = "chunks"
    """window: the nearest tokens; chunks: the query's chunk; reveal: the query's chunk and a growing part of
    the earlier ones. For comparison, full: everything from the start; static: chunks that do not grow."""
    schedule: ScheduleName = "exponential"
    """How the window grows from start to end (kinds window, chunks and reveal)."""
    start: int = 32
    """Tokens in the window or chunk at step 0; for reveal, start / data.length is the share of the earlier
    chunks."""
    end: int | None = None
    """Tokens at the end of the growth. None: data.length, which shows everything."""
    share: float = 0.6
    """Share of the steps over which it grows."""
    multiple_of: int = 1
    """The window is rounded down to a multiple of this, which must divide start and end."""
    stairs: int = 8
    """Stairs of the staircase schedule."""
    chunk: int = 256
    """Tokens in a chunk, for static and reveal."""
    order: Order = "nearest"
    """Order in which reveal shows the earlier chunks. In the task summarize, whose documents end at
    data.length, nearest and oldest take shares of data.length: short documents are shown early or last."""
    pace: Pace = "steps"
    """What advances the schedule. steps: the training step; loss: it has `stages`, and enters the next one
    when the validation loss under the mask of the stage stops falling."""
    stages: int = 8
    """Stages of pace loss, evenly spaced on the schedule."""
    tolerance: float = 0.01
    """A stage ends when a validation improves on the best of the stage by less than this share of it."""
    patience: int = 4
    """A stage ends after at most so many validations, so that the full mask is reached."""

    def __post_init__(self):
        one_of("curriculum.", self, kind=Kind, schedule=ScheduleName, order=Order, pace=Pace)
        at_least("curriculum.", self, start=1, multiple_of=1, stairs=1, chunk=1)
        at_least("curriculum.", self, stages=1, patience=1, tolerance=0)
        if not 0 < self.share <= 1:
            raise ValueError(f"curriculum.share must lie in 0…1 (0 excluded), got {self.share}")
        if self.end is not None and self.end < self.start:
            raise ValueError(f"curriculum.end must be at least start ({self.start}), got {self.end}")
