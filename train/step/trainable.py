"""Which weights train: named groups, and LoRA. The others are frozen: the optimizer does not know them."""

from dataclasses import dataclass
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from train.config.run import Run
from train.config.sections import Reach
from train.disk import size
from train.model.lora import is_lora
from train.step.state import State

TOP = {"embed": "embedding", "logits": "logits"}
"""The groups of weights that are not in layers, by the first name of their paths."""
PARTS = ("attention", "feed_forward")
KINDS = {"scale": "norms", "bias": "biases"}
"""The groups of vectors, by the last name of their paths."""


@dataclass(frozen=True)
class WeightCounts:
    """How much of a model trains, and what it costs.

    Attributes:
      weights: the number of all weights, those of LoRA included.
      trained: the number of those that train.
      optimizer_bytes: of the optimizer's state.
    """

    weights: int
    trained: int
    optimizer_bytes: int

    @classmethod
    def of(cls, state: State) -> "WeightCounts":
        """Those of a state, of arrays or of `jax.ShapeDtypeStruct`s."""
        trained, frozen = (
            sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (state.params, state.frozen)
        )
        optimizer = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.optimizer))
        return cls(trained + frozen, trained, optimizer)

    def __str__(self) -> str:
        share = f"{self.trained:,} of {self.weights:,} weights ({self.trained / self.weights:.2%}) train"
        every = f"All {self.weights:,} weights train"
        what = every if self.trained == self.weights else share
        return f"{what}; the optimizer's state takes {size(self.optimizer_bytes)}."


def split_weights(run: Run, params: Any) -> tuple[Any, Any]:
    """The weights that train, and the frozen ones, each in nested dictionaries as `params`.

    Args:
      run: whose `lora`, `optimizer.train` and `optimizer.frozen` decide.
      params: all weights, nested dictionaries of arrays or of their shapes.

    Raises:
      ValueError: an option names weights that the model has none of; or none would train.
    """
    options, flat = run.optimizer, flatten_dict(params)
    groups = {path: groups_of(".".join(map(str, path)), run.model.pattern) for path in flat}
    every = set().union(*groups.values())
    for name in ("train", "frozen"):
        if unknown := set(getattr(options, name) or ()) - every:
            raise ValueError(
                f"optimizer.{name}: the model has no weights of {', '.join(sorted(unknown))}; it has "
                f"{', '.join(sorted(every))}"
            )

    def trains(path) -> bool:
        if is_lora(".".join(map(str, path))):
            return True
        asked = not run.lora.rank if options.train is None else groups[path] & set(options.train)
        return bool(asked) and not groups[path] & set(options.frozen)

    trained = {path: leaf for path, leaf in flat.items() if trains(path)}
    if not trained:
        raise ValueError("no weights train: optimizer.train names none that optimizer.frozen does not")
    frozen = {path: leaf for path, leaf in flat.items() if path not in trained}
    return unflatten_dict(trained), unflatten_dict(frozen)


def join_weights(trained: Any, frozen: Any) -> Any:
    """All weights again: what `split_weights` split."""
    return unflatten_dict(flatten_dict(trained) | flatten_dict(frozen)) if frozen else trained


def groups_of(path: str, pattern: tuple[Reach, ...]) -> set[str]:
    """The groups that a weight is in, by the names of `optimizer.train`.

    Args:
      path: of the weight, joined by dots.
      pattern: `model.pattern`.

    >>> sorted(groups_of("groups.layers.1.attention.query.kernel", ("local", "global")))
    ['attention', 'global', 'layers', 'query']
    >>> sorted(groups_of("norm.scale", ("global",))), sorted(groups_of("embed.embedding", ("global",)))
    (['norms'], ['embedding'])
    """
    if is_lora(path):
        return set()
    first, *rest = path.split(".")
    found = {TOP[first]} if first in TOP else set()
    if first in ("groups", "rest"):
        _, at, part, *inner = rest
        found |= {"layers", pattern[int(at)]}
        if part in PARTS:
            found |= {part} if inner[0].endswith("norm") else {part, inner[0]}
    return found | ({KINDS[path.split(".")[-1]]} if path.split(".")[-1] in KINDS else set())
