"""Arms: what is compared. Each is the experiment's run with another curriculum, or a few other options."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, get_args

from dynmask_jax.curricula import Order
from dynmask_jax.schedules import ScheduleName
from train.config.run import Run, with_values
from train.config.sections import Curriculum, Kind

ArmCurriculum = Callable[[Curriculum], Curriculum]
SHARED = (
    *("name", "folder", "task", "steps", "seed", "init_from", "data", "summarize", "loss", "evaluation"),
    *("checkpoints", "generation", "mesh", "watch", "lora", "block"),
)
"""What all arms have in common: options that an arm may not change."""
FREE = {
    "model": ("rope_theta", "rope_local_theta", "rope_scaling"),
    "optimizer": ("warmup", "final", "weight_decay", "beta2", "clip", "give_up"),
}
"""What an arm may change of these sections: not what decides how long a step takes, which is measured once
for all arms whose masks are of one kind."""


def _full(base: Curriculum) -> Curriculum:
    return replace(base, kind="full", pace="steps")


def _static(base: Curriculum) -> Curriculum:
    return replace(base, kind="static", pace="steps")


def _static_then_full(base: Curriculum) -> Curriculum:
    """A staircase of one stair: chunks of `curriculum.chunk`, then, after the share of the steps, all."""
    return replace(
        base, kind="chunks", schedule="staircase", stairs=1, start=base.chunk, end=None, pace="steps"
    )


def _growing(base: Curriculum, kind: Kind, schedule: ScheduleName) -> Curriculum:
    return replace(base, kind=kind, schedule=schedule, pace="steps")


def _reveal(base: Curriculum, order: Order) -> Curriculum:
    return replace(base, kind="reveal", order=order, pace="steps")


_KINDS: tuple[Kind, ...] = ("window", "chunks")
ARMS: Mapping[str, ArmCurriculum] = {
    "full": _full,
    "static": _static,
    "static-then-full": _static_then_full,
    **{
        f"{kind}-{schedule}": partial(_growing, kind=kind, schedule=schedule)
        for kind in _KINDS
        for schedule in get_args(ScheduleName)
    },
    **{f"reveal-{order}": partial(_reveal, order=order) for order in get_args(Order)},
}
"""name -> the curriculum of an arm, from the experiment's own, whose start, end, chunk and share it keeps."""


@dataclass(frozen=True)
class Arm:
    """One arm of an experiment.

    Attributes:
      name: in tables and files.
      like: its row of `ARMS`.
      options: what it changes beside, as nested sections: {"curriculum": {"start": 8}}.
    """

    name: str
    like: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.like not in ARMS:
            raise ValueError(f"arms: there is no arm {self.like!r}; the arms are {', '.join(ARMS)}")
        if not self.name or set(self.name) - _LETTERS:
            raise ValueError(
                f"arms: a name must be of small letters, digits and hyphens, for files, got {self.name!r}"
            )
        if shared := [name for name in self.options if name in SHARED]:
            raise ValueError(f"arms: {self.name} may not change {shared[0]}, which all arms share")
        if "learning_rate" in self.options.get("optimizer", {}):
            raise ValueError(
                f"arms: {self.name} may not change optimizer.learning_rate, which is chosen from the grid "
                "learning_rates for every arm"
            )
        for section, free in FREE.items():
            if fixed := [name for name in self.options.get(section, {}) if name not in free]:
                raise ValueError(
                    f"arms: {self.name} may not change {section}.{fixed[0]}, but of {section} only "
                    f"{', '.join(free)}: the time of a step is measured for all arms alike"
                )

    def apply(self, run: Run) -> Run:
        """The run with the arm's curriculum and options.

        Raises:
          ValueError: an option that does not exist or a value that is refused, with the arm's name.
        """
        try:
            # The options first: a start, say, or a chunk is what the arm's curriculum is made from.
            changed = with_values(run, dict(self.options))
            return replace(changed, curriculum=ARMS[self.like](changed.curriculum))
        except ValueError as error:
            raise ValueError(f"arms: {self.name}: {error}") from error


def arm_of(given: Any) -> Arm:
    """An arm as an experiment's file names it: by a word, or as a table with name, like and sections.

    >>> arm_of("chunks-linear").name
    'chunks-linear'
    >>> arm_of({"name": "start-8", "like": "chunks-linear", "curriculum": {"start": 8}}).options
    {'curriculum': {'start': 8}}
    """
    if isinstance(given, str):
        return Arm(given, given)
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        raise ValueError(f"arms: an arm is a name or a table with a name, got {given!r}")
    options = {name: value for name, value in given.items() if name not in ("name", "like")}
    return Arm(given["name"], given.get("like", given["name"]), options)


_LETTERS = set("abcdefghijklmnopqrstuvwxyz0123456789-")
