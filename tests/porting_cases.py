"""The diffs of docs/porting.md, applied to the models of tests/porting; their batches, and how they train."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "porting.md").read_text(encoding="utf-8")
DIFFS = {
    re.match(r"--- (\w+)\.py", diff)[1]: diff  # pyright: ignore[reportOptionalSubscript]
    for diff in re.findall(r"^```diff\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE)
}
"""model -> its diff as printed."""
BATCH, LENGTH, FULL = 8, 32, 10
"""Rows and tokens of a batch; the step at which the diffs' curriculum ends."""


def apply_diff(text: str, diff: str) -> str:
    """The text changed by a unified diff, whose line numbers and context must fit exactly."""
    old, new, at = text.splitlines(), [], 0
    for line in diff.splitlines()[2:]:
        if hunk := re.match(r"@@ -(\d+),\d+ \+(\d+),\d+ @@", line):
            new += old[at : int(hunk[1]) - 1]
            at = int(hunk[1]) - 1
            assert len(new) == int(hunk[2]) - 1, f"the diff's {line} does not follow from those before it"
            continue
        kind, words = (line or " ")[0], line[1:]
        assert kind in "+- ", f"no line of a diff: {line!r}"
        if kind != "+":
            assert old[at] == words, f"the diff expects {words!r}, the file's line {at + 1} is {old[at]!r}"
            at += 1
        if kind != "-":
            new.append(words)
    return "\n".join([*new, *old[at:]]) + "\n"


def changed_lines(diff: str) -> tuple[int, int]:
    """How many lines a diff adds, and how many it removes."""
    kinds = [line[:1] for line in diff.splitlines()[2:]]
    return kinds.count("+"), kinds.count("-")


def load(path: Path, name: str) -> ModuleType:
    """The module of a file, under a name of its own."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def original(model: str) -> ModuleType:
    """The model as it is, without dynmask_jax."""
    return load(ROOT / "tests" / "porting" / f"{model}.py", f"original_{model}")


def ported(model: str, folder: Path) -> ModuleType:
    """The model after its diff."""
    text = (ROOT / "tests" / "porting" / f"{model}.py").read_text(encoding="utf-8")
    path = folder / f"{model}.py"
    path.write_text(apply_diff(text, DIFFS[model]), encoding="utf-8")
    return load(path, f"ported_{model}")


def tokens() -> np.ndarray:
    """Tokens [B, T], none of them 0."""
    return np.random.default_rng(0).integers(1, 64, (BATCH, LENGTH)).astype(np.int32)


def packed() -> dict:
    """Two documents in each row, cut elsewhere in each, and padding in the later rows."""
    row = np.arange(BATCH)[:, None]
    place, first, used = np.arange(LENGTH)[None, :], 5 + 3 * row, LENGTH - 2 * (row // 2)
    segments = np.where(place < first, 1, np.where(place < used, 2, 0))
    inputs = np.where(segments > 0, tokens(), 0)
    return {
        "inputs": inputs,
        "targets": np.roll(inputs, -1, axis=1),
        "inputs_position": np.where(segments == 2, place - first, np.where(segments == 1, place, 0)),
        "inputs_segmentation": segments,
    }


def padded(side: str) -> np.ndarray:
    """Rows of 32, 29, … tokens, and 0 elsewhere."""
    rows = np.where(np.arange(LENGTH)[None, :] < LENGTH - 3 * np.arange(BATCH)[:, None], tokens(), 0)
    return rows if side == "right" else np.flip(rows, axis=1)


def _batches() -> dict:
    right = padded("right")
    batches = {
        "gemma": packed(),
        "llama": {"input_tokens": right, "input_mask": right > 0},
        "qwen": padded("left"),
        "lm1b": packed(),
        "plain": right,
    }
    as_int32 = lambda x: jnp.asarray(x, bool if x.dtype == bool else jnp.int32)  # noqa: E731
    return jax.tree.map(as_int32, batches)


BATCHES = _batches()
SMALL = {"gemma": {"attention_types": ("local_sliding", "global")}}
"""Options with which a model has two layers, where they are not `num_layers=2`."""


def small(model: str, **options) -> dict:
    """The options of a model of two layers."""
    return {**SMALL.get(model, {"num_layers": 2}), **options}


def gradients(module: ModuleType, **options):
    """`(weights, run)` of a model, where `run(weights, batch, *step)` is the loss and its gradients."""
    made = module.make(0, **options)
    if isinstance(made, tuple):  # Linen: the model and its parameters
        model, weights = made
        return weights, jax.value_and_grad(lambda weights, *rest: module.loss(model, weights, *rest))
    graph, weights, rest = nnx.split(made, nnx.Param, ...)

    def loss(weights, *given):
        return module.loss(nnx.merge(graph, weights, rest, copy=True), *given)

    return nnx.to_pure_dict(weights), jax.value_and_grad(loss)


def difference(actual, expected) -> float:
    """The largest difference between two trees, beside the largest number in the same leaf.

    Beside a hundredth of the tree's largest where that is more: a key bias has a gradient of rounding alone.
    """
    actual, expected = (
        [np.asarray(jax.device_get(x), np.float32) for x in jax.tree.leaves(tree)]
        for tree in (actual, expected)
    )
    least = max(np.abs(b).max() for b in expected) / 100
    return max(
        float(np.abs(a - b).max() / max(np.abs(b).max(), least))
        for a, b in zip(actual, expected, strict=True)
    )
