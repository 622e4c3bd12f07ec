"""The config of a run, one frozen record that is checked when built.

Its fields are the options of the command line, and `config.json` of a run folder. Its sections are in
`train/config/sections.py` and `train/config/operation.py`, presets in `train/config/presets.py`.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from train.config.checks import at_least, one_of
from train.config.operation import Checkpoints, Evaluation, Generation, Mesh, Watch
from train.config.sections import Curriculum, Data, Lora, Loss, Model, Optimizer, Summarize

TaskName = Literal["lm", "summarize"]
MAY_CHANGE = (
    *("name", "folder", "data.cache", "data.unknown", "optimizer.give_up"),
    *("generation.", "checkpoints.", "mesh.", "watch."),
)
"""Options and sections that may change when a run is resumed: weights depend on them only by rounding."""


@dataclass(frozen=True)
class Run:
    """One training run. The same Run gives the same weights bit for bit on one machine, if not extended."""

    name: str = "run"
    """Name of the run; its folder is folder / name."""
    folder: str = "runs"
    """Folder of the run folders."""
    task: TaskName = "lm"
    """lm: each next token of the texts; summarize: the summary that follows a document."""
    steps: int = 1_000
    """Training steps, each of data.batch rows. With more of them the same command extends a run, finished or
    not, with the learning rate and the curriculum of the new number."""
    init_from: str | None = None
    """A Hugging Face folder, a run's folder or a file of `export`, whose weights are the first. It
    decides the options of model and tokenizer, too. Optimizer, learning rate, curriculum and data begin anew.
    None: random weights."""
    seed: int = 0
    """Seed of the initial weights and of the order of documents and rows."""
    block: int | None = None
    """Tokens in a block of attention; a block of keys that no query of a block sees is skipped. None: the
    platform's blocks, and small ones where little is shown: chosen while it runs. On a mesh whose devices
    hold no multiple of the platform's block, the largest that divides what they hold."""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    summarize: Summarize = field(default_factory=Summarize)
    loss: Loss = field(default_factory=Loss)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lora: Lora = field(default_factory=Lora)
    curriculum: Curriculum = field(default_factory=Curriculum)
    evaluation: Evaluation = field(default_factory=Evaluation)
    generation: Generation = field(default_factory=Generation)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    mesh: Mesh = field(default_factory=Mesh)
    watch: Watch = field(default_factory=Watch)

    def __post_init__(self):
        at_least("", self, steps=1, seed=0, block=1)
        one_of("", self, task=TaskName)
        if Path(self.name).name != self.name or self.name in ("", ".."):
            raise ValueError(f"name must be one folder's name, without separators, got {self.name!r}")
        if max(self.curriculum.start, self.curriculum.end or 0) > self.data.length:
            raise ValueError(
                f"curriculum.start and end must not exceed data.length ({self.data.length}), got "
                f"{self.curriculum.start} and {self.curriculum.end}"
            )
        if self.data.batch % self.optimizer.accumulate:
            raise ValueError(
                f"data.batch must be a multiple of optimizer.accumulate ({self.optimizer.accumulate}), "
                f"got {self.data.batch}"
            )
        if self.task == "summarize" and self.data.rows != "packed":
            raise ValueError(f"data.rows must be packed for the task summarize, got {self.data.rows!r}")
        if (self.watch.profile or 0) >= self.steps:
            raise ValueError(f"watch.profile must be below steps ({self.steps}), got {self.watch.profile}")
        if self.task != "summarize" and self.evaluation.summaries:
            raise ValueError(f"evaluation.summaries needs the task summarize, got {self.task!r}")
        _check_old_context(self)
        if self.evaluation.recall and (self.task != "lm" or self.data.tokenizer != "bytes"):
            raise ValueError(
                "evaluation.recall needs the task lm and data.tokenizer bytes, got "
                f"{self.task!r} and {self.data.tokenizer!r}"
            )
        if self.curriculum.pace == "loss":
            _check_pace(self)
        _check_mesh(self)

    @property
    def held_out_seed(self) -> int:
        """The seed that decides what is held out."""
        return self.seed if self.data.held_out_seed is None else self.data.held_out_seed


def _check_old_context(run: Run):
    """Refuses an old context that is not shorter than the rows, or of a task whose documents it would cut."""
    if (tokens := run.evaluation.old_context) is None:
        return
    if tokens >= run.data.length:
        raise ValueError(
            f"evaluation.old_context must be below data.length ({run.data.length}), got {tokens}"
        )
    if run.task != "lm":
        raise ValueError(f"evaluation.old_context needs the task lm, got {run.task!r}")


def _check_pace(run: Run):
    """Refuses a run that could end before a curriculum with pace "loss" shows the full mask."""
    pace, every = run.curriculum, run.evaluation.every
    if not every:
        raise ValueError("curriculum.pace loss needs evaluation.every above 0: validations move it")
    if (needed := pace.stages * pace.patience * every) > run.steps:
        raise ValueError(
            f"curriculum.pace loss may take stages * patience * evaluation.every = {needed} steps to show "
            f"everything, more than the run's steps ({run.steps})"
        )


def _check_mesh(run: Run):
    """Refuses a mesh whose axes do not divide the dimensions sharded over them."""
    mesh, model, data = run.mesh, run.model, run.data
    rows = data.batch // run.optimizer.accumulate
    halves = 2 if mesh.layout == "zigzag" and mesh.context > 1 else 1
    needs = [
        ("mesh.data * mesh.fsdp", mesh.data * mesh.fsdp, "data.batch / optimizer.accumulate", rows),
        ("mesh.fsdp * mesh.context", mesh.fsdp * mesh.context, "model.width", model.width),
        ("mesh.context", mesh.context, "data.length", data.length),
        ("mesh.layout zigzag: 2 * mesh.context", halves * mesh.context, "data.length", data.length),
        ("mesh.tensor", mesh.tensor, "model.heads", model.heads),
        ("mesh.tensor", mesh.tensor, "model.kv_heads", model.kv_heads),
        ("mesh.tensor", mesh.tensor, "model.hidden", model.hidden),
    ]
    if mesh.strategy == "ulysses" and mesh.context > 1:
        both, name = mesh.context * mesh.tensor, "mesh.strategy ulysses: mesh.context * mesh.tensor"
        needs += [(name, both, f"model.{heads}", getattr(model, heads)) for heads in ("heads", "kv_heads")]
    for name, size, whole, of in needs:
        if of % size:
            raise ValueError(f"{name} ({size}) must divide {whole}, got {of}")


def to_json(run: Run) -> str:
    """The run as JSON, as in `config.json`."""
    return json.dumps(dataclasses.asdict(run), indent=2) + "\n"


def differences(saved: dict[str, Any], run: Run) -> list[str]:
    """Where a saved config differs from `run`: `"data.length: 512 saved, 4096 asked for"`, sorted.

    Options in `MAY_CHANGE` are left out, and `steps` where it has grown: a run may be extended. An option
    that the saved config has not, for it is older, had its default.
    """
    theirs = _flat(json.loads(to_json(Run()))) | _flat(saved)
    ours, missing = _flat(json.loads(to_json(run))), "nothing"
    may_change = (*MAY_CHANGE, "steps") if is_extended(saved, run) else MAY_CHANGE
    return [
        f"{name}: {theirs.get(name, missing)!r} saved, {ours.get(name, missing)!r} asked for"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name, missing) != ours.get(name, missing) and not name.startswith(may_change)
    ]


def is_extended(saved: dict[str, Any], run: Run) -> bool:
    """Whether a run is to take more steps than its saved config says."""
    steps = saved.get("steps")
    return isinstance(steps, int) and run.steps > steps


def from_json(text: str) -> Run:
    """The run of a text of `to_json`.

    Raises:
      ValueError: the text is not such JSON, or has options that do not exist or values that are refused.
    """
    saved = json.loads(text)
    if not isinstance(saved, dict):
        raise ValueError(f"it holds {type(saved).__name__}, not an object")
    return with_values(Run(), saved)


def with_values(default: Any, saved: dict[str, Any]) -> Any:
    """A config, or a section of one, with values in place, also those of nested sections, as in JSON.

    Raises:
      ValueError: it has no such option, or a value is refused.
    """
    values = {}
    for name, value in saved.items():
        if not hasattr(default, name):
            raise ValueError(f"{type(default).__name__} has no option {name!r}")
        section = getattr(default, name)
        if dataclasses.is_dataclass(section):
            if not isinstance(value, dict):
                raise ValueError(f"{name} must be an object, got {value!r}")
            value = with_values(section, value)
        values[name] = tuple(value) if isinstance(value, list) else value
    return dataclasses.replace(default, **values)


def option_values(record: Any, prefix: str = "") -> dict[str, Any]:
    """The value of every option by its dotted name, `model.layers`, in the order of declaration."""
    values = {}
    for each in dataclasses.fields(record):
        value = getattr(record, each.name)
        nested = dataclasses.is_dataclass(value)
        values |= option_values(value, f"{prefix}{each.name}.") if nested else {prefix + each.name: value}
    return values


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
