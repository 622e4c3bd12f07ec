"""What a run is, as frozen records: everything that training depends on, checked when built.

A record's fields are the options of the command line, and `config.json` of a run folder. Presets are
in `train/presets.py`.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from dynmask_jax.attention import BACKENDS
from dynmask_jax.curricula import Order

Kind = Literal["full", "static", "window", "chunks", "reveal"]
Shape = Literal["linear", "exponential", "sine", "root", "cubic", "staircase"]


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

    def __post_init__(self):
        _at_least("model", self, layers=1, width=1, heads=1, kv_heads=1, hidden=1)
        _above_zero("model", self, "rope_theta")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"model.width must be a multiple of 2 * model.heads ({2 * self.heads}), for an even "
                f"head dim, got {self.width}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"model.kv_heads must divide model.heads ({self.heads}), got {self.kv_heads}")
        if self.backend is not None and self.backend not in BACKENDS:
            raise ValueError(f"model.backend must be one of {', '.join(BACKENDS)}, got {self.backend!r}")


@dataclass(frozen=True)
class Data:
    """What is read, and how it is cut into rows."""

    paths: tuple[str, ...] = ()
    """Text files, or folders of them, searched through. None: the Python standard library's source."""
    length: int = 4096
    """T, tokens (bytes) in a row."""
    batch: int = 1
    """B, rows in a step."""
    held_out: float = 0.05
    """Share of the bytes kept for validation."""

    def __post_init__(self):
        _at_least("data", self, length=2, batch=1)
        if not 0 < self.held_out < 1:
            raise ValueError(f"data.held_out must lie between 0 and 1, got {self.held_out}")


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

    def __post_init__(self):
        _above_zero("optimizer", self, "learning_rate", "clip")
        _at_least("optimizer", self, weight_decay=0)
        if not 0 <= self.warmup < 1:
            raise ValueError(f"optimizer.warmup must lie in 0…1 (1 excluded), got {self.warmup}")
        if not 0 <= self.final <= 1:
            raise ValueError(f"optimizer.final must lie in 0…1, got {self.final}")
        if not 0 < self.beta2 < 1:
            raise ValueError(f"optimizer.beta2 must lie between 0 and 1, got {self.beta2}")


@dataclass(frozen=True)
class Curriculum:
    """What each query sees at each step. Evaluation sees all earlier tokens whatever is chosen here."""

    kind: Kind = "chunks"
    """window: the nearest tokens; chunks: the rest of one's own chunk; reveal: one's own chunk and part
    of the earlier ones; for comparison, full: everything from the start, and static: chunks that
    never grow."""
    schedule: Shape = "exponential"
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
    """In which reveal shows the earlier chunks."""

    def __post_init__(self):
        for name, choices in (("kind", Kind), ("schedule", Shape), ("order", Order)):
            if (value := getattr(self, name)) not in get_args(choices):
                listed = ", ".join(map(repr, get_args(choices)))
                raise ValueError(f"curriculum.{name} must be one of {listed}, got {value!r}")
        _at_least("curriculum", self, start=1, multiple_of=1, stairs=1, chunk=1)
        if not 0 < self.share <= 1:
            raise ValueError(f"curriculum.share must lie in 0…1 (0 excluded), got {self.share}")
        if self.end is not None and self.end < self.start:
            raise ValueError(f"curriculum.end must be at least start ({self.start}), got {self.end}")


@dataclass(frozen=True)
class Run:
    """One training run. The same Run gives the same weights, on the same machine bit for bit."""

    name: str = "run"
    """The run's folder is folder / name."""
    folder: str = "runs"
    """Where run folders lie."""
    steps: int = 1_000
    """Training steps, of data.batch rows each."""
    seed: int = 0
    """Of the initial weights, and of the order of documents and rows."""
    block: int = 256
    """Tokens in a block of attention: what no query of a block sees of another is not computed."""
    evaluate_every: int = 0
    """Steps between validations; 0 for one before training and one after."""
    evaluate_rows: int = 16
    """Held-out rows that a validation reads, evenly spaced; all, where there are fewer."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 for one at the end."""
    keep: int = 2
    """Checkpoints that are kept, the latest."""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    curriculum: Curriculum = field(default_factory=Curriculum)

    def __post_init__(self):
        _at_least("run", self, steps=1, seed=0, block=1, evaluate_rows=1, keep=1)
        _at_least("run", self, evaluate_every=0, checkpoint_every=0)
        if not self.name or Path(self.name).name != self.name:
            raise ValueError(f"name must be one folder's name, without separators, got {self.name!r}")
        if max(self.curriculum.start, self.curriculum.end or 0) > self.data.length:
            raise ValueError(
                f"curriculum.start and end must not exceed data.length ({self.data.length}), got "
                f"{self.curriculum.start} and {self.curriculum.end}"
            )


def to_json(run: Run) -> str:
    """The run as `config.json` holds it."""
    return json.dumps(dataclasses.asdict(run), indent=2) + "\n"


def differences(saved: dict[str, Any], run: Run) -> list[str]:
    """Where a saved config differs from `run`: `"data.length: 512 saved, 4096 asked for"`, sorted."""
    theirs, ours = _flat(saved), _flat(json.loads(to_json(run)))
    missing = "nothing"
    return [
        f"{name}: {theirs.get(name, missing)!r} saved, {ours.get(name, missing)!r} asked for"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name, missing) != ours.get(name, missing)
    ]


def option_names(record: Any, prefix: str = "") -> list[str]:
    """The dotted name of every field, `model.layers`, in the order they are declared."""
    return list(_flat(dataclasses.asdict(record), prefix))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _at_least(section: str, record: Any, **least: int):
    for name, minimum in least.items():
        if (value := getattr(record, name)) < minimum:
            raise ValueError(f"{section}.{name} must be at least {minimum}, got {value}")


def _above_zero(section: str, record: Any, *names: str):
    for name in names:
        if not (value := getattr(record, name)) > 0:
            raise ValueError(f"{section}.{name} must be positive, got {value}")
