"""Context extension shown small: a model of rows of 1,024 bytes goes on at 8,192 by the preset `extend`.

python -m benchmarks.extension peps.jsonl.gz --columns text document --json docs/extension.json

It trains the small model, times the step of its extension along the growth, and extends it twice: under
chunks that grow, and under the full mask from the first step on. Both have as many steps as fit into the same
seconds by those times, so that what else the machine does meanwhile is no advantage of either. A run that is
there already is not trained again, and results are written after each part.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.extension_page import draw, section
from benchmarks.timing import machine, medians
from train.checkpoint.load import load_model
from train.cli import parse
from train.config.model import RopeScalingKind
from train.config.run import Run
from train.data.corpus import read_corpus
from train.evaluate.validation import Validator
from train.loop.prepare import prepare
from train.loop.training import train
from train.metrics.record import StepRecord
from train.report.outcome import Outcome
from train.step.program import begin

ARMS = {"growing": (), "full": ("--curriculum.kind", "full")}
"""What is compared: options beside the preset's own."""
POINTS = 5
"""Places of the growth whose step is timed, both ends included."""
REPEATS = 2


@dataclass(frozen=True)
class Experiment:
    """Sizes and texts.

    Attributes:
      folder: of the runs.
      text: options that name texts.
      model: options of the small model.
      old, new: tokens of its context, before and after.
      base_steps: of the small model, each of `base_batch` rows.
      budget: seconds that the steps of an extension take by the measured times.
      rows, needles: of a validation.
      scalings: kinds of rotary scaling that are compared before training.
    """

    folder: str
    text: tuple[str, ...]
    model: tuple[str, ...] = ()
    old: int = 1_024
    new: int = 8_192
    base_steps: int = 600
    base_batch: int = 4
    budget: float = 300.0
    rows: int = 8
    needles: int = 1
    scalings: tuple[RopeScalingKind, ...] = ("none", "linear", "ntk", "yarn")

    def base(self) -> list[str]:
        """The command that trains the small model: that of the preset `demo`."""
        return [
            *("demo", "--name", "base", "--folder", self.folder, *self.text, *self.model),
            *("--data.rows", "packed", "--data.length", str(self.old), "--data.batch", str(self.base_batch)),
            *("--steps", str(self.base_steps), "--curriculum.kind", "full", "--evaluation.every", "0"),
            *("--evaluation.rows", str(self.rows * self.new // self.old), "--checkpoints.every", "0"),
        ]

    def extension(self, arm: str, steps: int) -> list[str]:
        """The command that extends it. Its learning rate is the preset's: that which the base ended with."""
        return [
            *("extend", "--init-from", f"{self.folder}/base", "--name", arm, "--folder", self.folder),
            *(*self.text, "--data.length", str(self.new), "--data.batch", "1", "--optimizer.accumulate", "1"),
            *("--steps", str(steps), "--model.dtype", "float32", "--model.remat", "none"),
            *("--evaluation.every", "0", "--evaluation.rows", str(self.rows)),
            *("--evaluation.needles", str(self.needles), "--checkpoints.every", "0", *ARMS[arm]),
        ]


def measure(experiment: Experiment, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Trains, times and extends; `keep` is called with the results so far after each part."""
    base = _trained(experiment.base())
    results: dict[str, Any] = {
        "machine": machine(),
        "settings": {k: v for k, v in asdict(experiment).items() if k not in ("folder", "text")},
        "base": base.validations[-1].to_json(),
    }
    keep(results)
    times = step_times(parse(experiment.extension("growing", 1_000)).run)
    results |= {"step_seconds": times, "arms": {}}
    keep(results)
    for arm in ARMS:
        steps = max(1, round(experiment.budget / mean_seconds(arm, times)))
        results["arms"][arm] = _arm(_trained(experiment.extension(arm, steps)))
        keep(results)
    results["scalings"] = scalings(parse(experiment.extension("full", 1)).run, experiment.scalings)
    keep(results)
    return results


def step_times(run: Run) -> dict[str, Any]:
    """Seconds of a train step, and the window, at places of the growth, 0 … 1; and the growth's share."""
    corpus = read_corpus(run)
    program, state = begin(run, corpus.tokenizer.vocabulary)
    batches = corpus.batches()
    batch = jax.device_put(next(batches))
    batches.close()
    step, grown = jax.jit(program.train_step), program.masks.growth
    places = np.linspace(0, 1, POINTS)
    clocks = [round(place * grown.steps) for place in places]

    def call(clock: int):
        return lambda: step(replace(state, step=jnp.int32(clock)), batch)

    found = medians({clock: call(clock) for clock in clocks}, REPEATS)
    return {
        "places": places.tolist(),
        "windows": [int(grown.window(jnp.int32(clock))) for clock in clocks],
        "seconds": [found[clock] for clock in clocks],
        "share": run.curriculum.share,
    }


def mean_seconds(arm: str, times: Mapping[str, Any]) -> float:
    """The mean of a step over a whole run: times along straight lines between the places of the growth."""
    last = times["seconds"][-1]
    if arm == "full":
        return last
    growing = float(np.interp(np.linspace(0, 1, 1_000), times["places"], times["seconds"]).mean())
    return times["share"] * growing + (1 - times["share"]) * last


def scalings(run: Run, kinds: Sequence[RopeScalingKind]) -> dict[str, dict[str, Any]]:
    """What the untrained extension reaches at both contexts, by the kind of rotary scaling."""
    weights, tokenizer = load_model(Path(str(run.init_from)))
    corpus = read_corpus(run)
    found = {}
    for kind in kinds:
        asked = replace(
            run,
            model=replace(run.model, rope_scaling=replace(run.model.rope_scaling, kind=kind)),
            evaluation=replace(run.evaluation, needles=0),
        )
        program, state = begin(asked, tokenizer.vocabulary)
        validation = Validator(program, corpus)(replace(state, params=weights.params, ema=None))
        found[kind] = {
            "loss": validation.loss,
            "positions": validation.positions,
            "old_context": validation.evaluators["old_context"],
        }
    return found


def _trained(words: Sequence[str]) -> Outcome:
    found = train(prepare(parse(words).run))
    if not isinstance(found, Outcome):
        raise SystemExit(str(found))
    return found


def _arm(outcome: Outcome) -> dict[str, Any]:
    steps = [record for record in outcome.records if isinstance(record, StepRecord)]
    first, last = outcome.validations[0], outcome.validations[-1]
    return {
        "steps": len(steps),
        "seconds_as_run": sum(record.seconds for record in steps[1:]),  # the first compiles
        "learning_rate": max(record.learning_rate for record in steps),
        "before": first.to_json(),
        "after": last.to_json(),
    }


def main(arguments: Sequence[str] | None = None):
    """Runs the experiment of a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("text", nargs="*", help="files or folders of text")
    parser.add_argument("--columns", nargs="+", default=[], help="as --data.columns")
    parser.add_argument("--folder", default="runs/extension", help="of the runs")
    parser.add_argument("--seconds", type=float, default=Experiment.budget, help="of each extension's steps")
    parser.add_argument("--base-steps", type=int, default=Experiment.base_steps)
    parser.add_argument("--json", type=Path, help="where results are written")
    parser.add_argument("--picture", type=Path, help="where the loss by position is drawn")
    parser.add_argument("--table", action="store_true", help="measure nothing: the results in --json")
    asked = parser.parse_args(arguments)
    if not (asked.json if asked.table else asked.text):
        parser.error("--table needs --json" if asked.table else "texts are needed")
    if asked.table:
        results = json.loads(asked.json.read_text(encoding="utf-8"))
    else:
        results = measure(_experiment(asked), partial(_keep, asked.json))
    print(section(results))
    if asked.picture:
        draw(results, asked.picture)


def _experiment(asked: argparse.Namespace) -> Experiment:
    columns = ("--data.columns", *asked.columns) if asked.columns else ()
    return Experiment(
        asked.folder,
        ("--data.paths", *asked.text, *columns),
        base_steps=asked.base_steps,
        budget=asked.seconds,
    )


def _keep(path: Path | None, results: Mapping[str, Any]):
    if path:
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
