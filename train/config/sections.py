"""The sections of a config that define what is learned: model, data, task, loss, optimizer, curriculum.

Each is a frozen record, checked when built. A field is an option of the command line, `--model.layers`,
and its docstring is the option's help. The other sections are in `train/config/operation.py`.
"""

from dataclasses import dataclass, field
from typing import Literal

from dynmask_jax.curricula import Order
from dynmask_jax.dispatch import BACKENDS
from dynmask_jax.schedules import ScheduleName
from train.config.checks import above_zero, at_least, one_of

Dtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "full", "dots", "dots_no_batch"]
Reach = Literal["global", "local"]
RowKind = Literal["packed", "chunked"]
PrefixKind = Literal["bidirectional", "causal"]
Kind = Literal["full", "static", "window", "chunks", "reveal"]
Pace = Literal["steps", "loss"]


@dataclass(frozen=True)
class Model:
    """The decoder-only Transformer."""

    layers: int = 4
    """Blocks of attention and feed-forward."""
    width: int = 256
    """D, the features of a token between layers."""
    heads: int = 4
    """N, query heads; the head dim is width / heads."""
    kv_heads: int = 2
    """K, key heads, each shared by heads / kv_heads query heads."""
    hidden: int = 704
    """Features inside the feed-forward layer (SwiGLU)."""
    rope_theta: float = 10_000.0
    """Base of the rotary positions; the longest wavelength is about 6 times as many tokens."""
    backend: str | None = None
    """What computes attention: "xla", "xla_wide", "tpu" or "dense". None: what the platform takes."""
    dtype: Dtype = "float32"
    """What activations are computed in. Weights, sums of attention and the loss stay float32."""
    remat: Remat = "none"
    """What a layer keeps for the backward pass: none: everything; full: its input alone, the rest is
    computed again; dots: the results of matrix products; dots_no_batch: those with weights."""
    pattern: tuple[Reach, ...] = ("global",)
    """The reach of layers, repeated: local local local local local global, say. A local layer sees
    local_window tokens of what the curriculum shows; a global one all of it."""
    local_window: int = 1024
    """The most recent tokens that a local layer sees, the query's own included."""

    def __post_init__(self):
        at_least("model.", self, layers=1, width=1, heads=1, kv_heads=1, hidden=1, local_window=1)
        above_zero("model.", self, "rope_theta")
        one_of("model.", self, dtype=Dtype, remat=Remat)
        if self.width % (2 * self.heads):
            raise ValueError(
                f"model.width must be a multiple of 2 * model.heads ({2 * self.heads}), for an even "
                f"head dim, got {self.width}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"model.kv_heads must divide model.heads ({self.heads}), got {self.kv_heads}")
        if self.backend is not None and self.backend not in BACKENDS:
            raise ValueError(f"model.backend must be one of {', '.join(BACKENDS)}, got {self.backend!r}")
        if not self.pattern or set(self.pattern) - {"global", "local"}:
            raise ValueError(f"model.pattern must be of 'global' and 'local', got {self.pattern}")
        if self.layers % len(self.pattern):
            raise ValueError(
                f"model.layers must be a multiple of the layers in model.pattern ({len(self.pattern)}), "
                f"got {self.layers}"
            )


@dataclass(frozen=True)
class Data:
    """What is read, and how it is cut into rows."""

    paths: tuple[str, ...] = ()
    """Text files, JSONL files (.jsonl, .jsonl.gz), folders of them, globs, or folders that Hugging
    Face `datasets` saved. None: the Python standard library's source."""
    held_out_paths: tuple[str, ...] = ()
    """The same, for validation. None: the share held_out of the paths."""
    held_out: float = 0.05
    """Share of the tokens (of the documents, for summarize) kept for validation."""
    columns: dict[str, str] = field(default_factory=dict)
    """The columns of records, where they have other names than usual: text body, or document article
    summary highlights."""
    skip_malformed: bool = False
    """Leave out lines that cannot be read, and count them, instead of stopping at the first."""
    tokenizer: str = "bytes"
    """bytes, or the path of a tokenizer.json or a sentencepiece model."""
    end_token: str | None = None
    """The token between documents; None: the tokenizer's own, by its usual names."""
    rows: RowKind = "packed"
    """packed: whole documents first-fit into rows, none sees another, longer ones cut into pieces;
    chunked: all documents end to end, cut into rows, which see across."""
    packing_bins: int = 64
    """Rows that are open at once while packing; more fill rows better."""
    length: int = 4096
    """T, tokens in a row."""
    batch: int = 1
    """B, rows in a step, over all processes."""
    cache: str | None = None
    """Folder that keeps texts as tokens between runs. None: cache, beside the run folders."""

    def __post_init__(self):
        at_least("data.", self, length=2, batch=1, packing_bins=1)
        one_of("data.", self, rows=RowKind)
        if not 0 < self.held_out < 1:
            raise ValueError(f"data.held_out must lie between 0 and 1, got {self.held_out}")
        if unknown := set(self.columns) - {"text", "document", "summary"}:
            raise ValueError(
                "data.columns names the columns of text, document and summary, got one for "
                f"{', '.join(map(repr, sorted(unknown)))}"
            )


@dataclass(frozen=True)
class Summarize:
    """The task `summarize`: documents and their summaries, one of each in a segment."""

    prefix: PrefixKind = "bidirectional"
    """bidirectional: the document's tokens see those after them too; causal: they do not."""
    truncate: bool = False
    """Cut documents that do not fit a row with their summary at their end, instead of stopping."""
    lead: int | None = None
    """Words in the lead baseline, the document's beginning; None: as in the median training summary."""

    def __post_init__(self):
        one_of("summarize.", self, prefix=PrefixKind)
        at_least("summarize.", self, lead=1)


@dataclass(frozen=True)
class Loss:
    """The cross-entropy, computed over a few tokens' logits at a time."""

    chunk: int | None = None
    """Tokens whose logits exist at once. None: 1,024, or as many as have 16 MiB of logits."""
    z: float = 0.0
    """Weight of the squared log-normaliser (z-loss), which keeps logits from drifting; often 1e-4."""

    def __post_init__(self):
        at_least("loss.", self, chunk=1, z=0)


@dataclass(frozen=True)
class Optimizer:
    """AdamW, with a linear warm-up, a cosine decay and clipping by the global norm."""

    learning_rate: float = 2e-3
    """At its peak, after the warm-up."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises from 0."""
    final: float = 0.1
    """Share of the peak that is left at the last step."""
    weight_decay: float = 0.1
    """Of matrices; vectors are not decayed."""
    beta2: float = 0.95
    """Decay of the mean of squared gradients."""
    clip: float = 1.0
    """The greatest norm a step's gradient may have."""
    accumulate: int = 1
    """Parts that a step's rows are computed in, one after the other: memory of one, gradient of all."""
    ema: float | None = None
    """Decay of a running mean of the weights, 0.999 say, which validation and export take; None: none.
    After n steps at most (1 + n) / (10 + n)."""
    give_up: int = 10
    """Steps in a row with a loss or gradient that is not finite, all skipped, before training stops."""

    def __post_init__(self):
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
class Curriculum:
    """What each query sees at each step. Evaluation sees all that the task shows, whatever is chosen here."""

    kind: Kind = "chunks"
    """window: the nearest tokens; chunks: the rest of one's own chunk; reveal: one's own chunk and part
    of the earlier ones; for comparison, full: everything from the start, and static: chunks that
    never grow."""
    schedule: ScheduleName = "exponential"
    """How the window grows from start to end (kinds window, chunks and reveal)."""
    start: int = 32
    """Tokens in the window, or the chunk, at step 0. For reveal start / data.length of the earlier
    chunks."""
    end: int | None = None
    """Tokens at the end of the growth; None for data.length, which shows everything."""
    share: float = 0.6
    """Share of the steps over which it grows."""
    multiple_of: int = 1
    """Round the window down to a multiple of this, which must divide start and end."""
    stairs: int = 8
    """Jumps of the staircase schedule."""
    chunk: int = 256
    """Tokens in a chunk, for static and reveal."""
    order: Order = "nearest"
    """In which reveal shows the earlier chunks. For summarize, whose documents end at
    data.length, nearest and oldest take shares of data.length: short documents are shown soon, or last."""
    pace: Pace = "steps"
    """What moves the schedule: steps, or loss: it goes through `stages`, and enters the next one once the
    validation loss, under the mask of the stage, has stopped falling."""
    stages: int = 8
    """Stages of the pace by loss, evenly spaced on the schedule."""
    tolerance: float = 0.01
    """A stage is over once a validation improves on the stage's best by less than this share of it."""
    patience: int = 4
    """Or after so many validations, so that the full mask is reached."""

    def __post_init__(self):
        one_of("curriculum.", self, kind=Kind, schedule=ScheduleName, order=Order, pace=Pace)
        at_least("curriculum.", self, start=1, multiple_of=1, stairs=1, chunk=1)
        at_least("curriculum.", self, stages=1, patience=1, tolerance=0)
        if not 0 < self.share <= 1:
            raise ValueError(f"curriculum.share must lie in 0…1 (0 excluded), got {self.share}")
        if self.end is not None and self.end < self.start:
            raise ValueError(f"curriculum.end must be at least start ({self.start}), got {self.end}")
