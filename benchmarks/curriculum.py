"""What a step costs over a whole curriculum, beside the full mask and a static chunk mask.

Steps are timed at a few points of the growth; the others' times are read off the straight lines between
them, and summed over the run.
"""

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.calls import BOTH, Size, compiled
from benchmarks.markdown import ratio, seconds, share, table
from benchmarks.timing import medians
from dynmask_jax import (
    Causal,
    Chunks,
    Curriculum,
    Tokens,
    attention,
    exponential,
    growing_chunks,
    growing_window,
    linear,
    plan,
    reveal,
)
from dynmask_jax.array_typing import Int
from train.config import sections
from train.config.run import Run
from train.data.batch import Batch
from train.step.program import begin

FULL_MASK = "full"
BYTES = 256


@dataclass(frozen=True)
class Settings(Size):
    """One sequence, and the curricula over it.

    Attributes:
      steps: of the run; the growth takes the first 60% of them.
      points: how many steps of the growth are timed, its ends included.
      start: tokens in the first window.
      chunk: tokens in a chunk, of the static mask and of `reveal`.
      layers: of the model whose train step is timed, of width heads · head_dim.
    """

    steps: int = 1_000
    points: int = 5
    start: int = 32
    chunk: int = 512
    layers: int = 2

    @property
    def growth(self) -> int:
        """Steps over which the mask grows: SkyLadder's advice."""
        return round(0.6 * self.steps)


QUICK, FULL = Settings(tokens=2_048, chunk=256), Settings(tokens=4_096, points=9)


def measure(settings: Settings, repeats: int) -> dict:
    """Of attention and of a train step: the seconds at each point of each curriculum, and their mean."""
    return {
        "settings": asdict(settings),
        "attention": _over_the_run(_attention_steps(settings), settings, repeats),
        "train step": _over_the_run(_train_steps(settings), settings, repeats),
    }


def curricula(settings: Settings) -> dict[str, Curriculum]:
    """What is compared: the two that do not change first."""
    amount = linear(0.0, 1.0, settings.growth)
    return {
        FULL_MASK: lambda step: Causal(),
        "static chunks": lambda step: Causal() & Chunks(settings.chunk),
        "growing window": growing_window(linear(settings.start, settings.tokens, settings.growth)),
        "growing chunks, exponential": growing_chunks(
            exponential(settings.start, settings.tokens, settings.growth)
        ),
        "reveal, nearest": reveal(settings.chunk, amount, "nearest"),
        "reveal, strided": reveal(settings.chunk, amount, "strided"),
    }


def mean_over_run(points: dict[int, float], steps: int) -> float:
    """The mean of steps 0 … steps − 1, on straight lines between the points and level beyond them."""
    return float(np.interp(np.arange(steps), list(points), list(points.values())).mean())


@dataclass(frozen=True)
class _Steps:
    """One curriculum's step: `call(step)`, and the jitted function behind it."""

    call: Callable[[Int], object]
    function: Any


def _attention_steps(settings: Settings) -> dict[str, _Steps]:
    """Forward and backward of one attention, under the plan that is made in the step."""
    arrays, tokens = settings.arrays(), Tokens.sequence(settings.tokens)

    def step_of(curriculum):
        function = compiled(lambda q, k, v, step: attention(q, k, v, plan(curriculum(step), tokens)))[BOTH]
        return _Steps(functools.partial(function, *arrays), function)

    return {name: step_of(curriculum) for name, curriculum in curricula(settings).items()}


def _train_steps(settings: Settings) -> dict[str, _Steps]:
    """The trainer's own step, forward, backward and update, on a row of random bytes."""
    row = jax.random.randint(jax.random.key(0), (1, settings.tokens + 1), 0, BYTES)
    place, ones = (
        jnp.arange(settings.tokens, dtype=jnp.int32)[None],
        jnp.ones((1, settings.tokens), jnp.int32),
    )
    batch = Batch(row[:, :-1], row[:, 1:], ones.astype(jnp.float32), place, ones, place, ones)
    width = settings.heads * settings.head_dim
    shape = sections.Model(settings.layers, width, settings.heads, settings.heads, hidden=3 * width)
    growing = sections.Curriculum(schedule="linear", start=settings.start, chunk=settings.chunk)
    kinds = {
        FULL_MASK: "full",
        "static chunks": "static",
        "growing window": "window",
        "reveal, nearest": "reveal",
    }

    def step_of(kind):
        run = Run(
            steps=settings.steps,
            model=shape,
            data=sections.Data(length=settings.tokens, rows="chunked"),
            curriculum=replace(growing, kind=kind),
        )
        program, state = begin(run, BYTES)
        function = jax.jit(program.train_step)
        return _Steps(lambda step: function(replace(state, step=step), batch), function)

    return {name: step_of(kind) for name, kind in kinds.items()}


def _over_the_run(steps: dict[str, _Steps], settings: Settings, repeats: int) -> dict:
    """All points of all curricula in the same rounds; those that never change have one point."""
    places = [round(x) for x in np.linspace(0, settings.growth, settings.points)]
    timed = {
        (name, place): functools.partial(each.call, jnp.int32(place))
        for name, each in steps.items()
        for place in (places[:1] if name in (FULL_MASK, "static chunks") else places)
    }
    times = medians(timed, repeats)
    results = {}
    for name, each in steps.items():
        points = {place: time for (which, place), time in times.items() if which == name}
        results[name] = {
            "points": points,
            "mean": mean_over_run(points, settings.steps),
            "compilations": each.function._cache_size(),
        }
    return results


def section(results: dict) -> str:
    """The results as Markdown."""
    settings = Settings(**results["settings"])
    rows = []
    for what in ("attention", "train step"):
        full, static = (results[what][name]["mean"] for name in (FULL_MASK, "static chunks"))
        for name, each in results[what].items():
            times = list(each["points"].values())
            cells = [seconds(times[0]), seconds(times[-1]), seconds(each["mean"])]
            cells += [share(each["mean"] / full), ratio(each["mean"], static), str(each["compilations"])]
            rows.append([f"{what}, {name}", *cells])
    columns = ["forward+backward", "first step", "last step", "mean over the run", "of the full mask's"]
    columns += ["over static chunks'", "compilations"]
    return (
        f"{settings}, float32; {settings.steps:,} steps, of which the mask grows over the first "
        f"{settings.growth:,}: linearly from a window of {settings.start}, or by chunks of {settings.chunk}, "
        f"to the full causal mask. Layers in the model of the train step: {settings.layers}, of width "
        f"{settings.heads * settings.head_dim}. Measured at {settings.points} steps, straight lines "
        f"between.\n\n{table(columns, rows)}"
    )
