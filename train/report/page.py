"""The report of a run: `report.md` in its folder, with its pictures, one page to hand to a colleague."""

import json
import platform
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import jax

import dynmask_jax
from train.config.command_line import command
from train.config.run import Run, option_values
from train.data.tasks import task_of
from train.disk import write_atomically
from train.evaluate.rouge import SEGMENTATION
from train.metrics.mfu import Peak
from train.metrics.record import ValidationRecord
from train.report.evaluators import needles, old_context, old_positions, others
from train.report.markdown import code, or_dash, section, table
from train.report.outcome import Outcome, bits_in_words, failure
from train.report.pictures import draw, draw_positions, losses_by_position
from train.step.curriculum import Growth
from train.step.trainable import WeightCounts

if TYPE_CHECKING:
    from train.data.corpus import Corpus

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@dataclass(frozen=True)
class Facts:
    """What the report tells of a run beside its records.

    Attributes:
      run: its config.
      corpus: its texts.
      growth: its curriculum.
      counts: of its weights, and how many of them trained.
      peak: what its devices can do.
    """

    run: Run
    corpus: "Corpus"
    growth: Growth
    counts: WeightCounts
    peak: Peak


def write(folder: Path, facts: Facts, outcome: Outcome) -> list[str]:
    """Draws the pictures of a finished run into its folder, and writes `report.md` that shows them.

    Returns:
      a line for each picture that could not be drawn.

    Raises:
      OSError: the folder cannot be written to.
    """
    records = outcome.records
    drawings = {
        "curriculum.png": lambda path: draw(records, facts.growth, facts.run, path),
        "positions.png": lambda path: draw_positions(records, path),
    }
    pictures, failures = [], []
    for name, drawing in drawings.items():
        try:
            if drawing(folder / name):
                pictures.append(name)
        except Exception as error:  # whatever Matplotlib raises
            failures.append(
                failure(f"the picture {name}", error, "without report.md the same command draws it")
            )
    write_atomically(folder / "report.md", report(folder, facts, outcome, pictures))
    return failures


def report(folder: Path, facts: Facts, outcome: Outcome, pictures: Sequence[str]) -> str:
    """The report as Markdown.

    Args:
      folder: of the run, as commands name it.
      facts, outcome: what it tells.
      pictures: their names in the folder, of those that there are.
    """
    shown = {name: f"![{name}]({name})" for name in pictures}
    parts = [
        f"# {facts.run.name}",
        _opening(facts, outcome),
        section("Result", _result(outcome), shown.get("curriculum.png", "")),
        section("Use of context", _positions(outcome), shown.get("positions.png", "")),
        section("Old and new context", old_context(outcome)),
        section("Needles", needles(outcome)),
        section("Other evaluators", others(outcome)),
        section("Summaries", _rouge(outcome)),
        section("Time", _time(facts, outcome)),
        section("Data", _data(facts, outcome)),
        section("Config", _config(facts.run)),
        section("Versions and machine", _machine()),
        section("Next", *_commands(folder, facts.run)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _opening(facts: Facts, outcome: Outcome) -> str:
    run, steps = facts.run, outcome.steps
    what = task_of(run).model
    plural = "s" if run.model.layers > 1 else ""
    words = (
        f"A {what}, of {facts.counts.weights:,} weights in {run.model.layers} layer{plural} of width "
        f"{run.model.width:,}, trained for {run.steps:,} steps on rows of {run.data.length:,} tokens, about "
        f"{_tokens(facts, outcome):,.0f} tokens in all. {_curriculum(run)} "
        f"{facts.counts}"
    )
    if not steps or not steps[-1].skipped:
        return words
    return (
        f"{words}\n\n**{steps[-1].skipped:,} steps were skipped**, for their loss or gradient was not "
        "finite; `skipped` in `metrics.jsonl` says when."
    )


def _curriculum(run: Run) -> str:
    curriculum = run.curriculum
    match curriculum.kind:
        case "full":
            return "Every step saw the full mask."
        case "static":
            return f"Every step saw chunks of {curriculum.chunk:,} tokens, which did not grow."
    end = run.data.length if curriculum.end is None else curriculum.end
    what = {
        "window": f"The window grew from {curriculum.start:,} to {end:,} tokens",
        "chunks": f"Chunks grew from {curriculum.start:,} to {end:,} tokens",
        "reveal": f"What was shown of earlier chunks grew from {curriculum.start / run.data.length:.1%} to "
        f"{end / run.data.length:.0%}",
    }[curriculum.kind]
    if curriculum.pace == "loss":
        return f"{what} ({curriculum.schedule}), in {curriculum.stages} stages, as the validation loss fell."
    return f"{what} ({curriculum.schedule}), over the first {curriculum.share:.0%} of the steps."


def _result(outcome: Outcome) -> str:
    validations = outcome.validations
    if not validations:
        return ""
    best = min(validations, key=lambda r: (r.loss is None, r.loss))
    named = {"first": validations[0], "best": best, "last": validations[-1]}
    if best.step in (validations[0].step, validations[-1].step):
        del named["best"]
    rows = [(name, f"{r.step:,}", bits_in_words(r.bits_per_byte), _nats(r)) for name, r in named.items()]
    return table(("validation, at the full mask", "steps done", "bits per byte", "nats a token"), rows)


def _nats(record: ValidationRecord) -> str:
    loss = record.loss
    return "not finite" if loss is None else f"{loss:.4f}"


def _positions(outcome: Outcome) -> str:
    found = [losses for losses in map(losses_by_position, outcome.validations) if losses]
    if not found:
        return ""
    first, last = found[0], found[-1]
    old = old_positions(outcome)
    rows = [
        (
            f"{start:,}",
            or_dash(first.get(start), ".3f"),
            f"{last[start]:.3f}",
            *(or_dash(losses.get(start), ".3f") for losses in old.values()),
        )
        for start in sorted(last)
    ]
    words = (
        "Nats a token at the full mask, by how many tokens of its document a token has before it. Where "
        "they go on falling, long contexts are used."
    )
    return f"{words}\n\n{table(('tokens before, at least', 'first validation', 'last', *old), rows)}"


def _rouge(outcome: Outcome) -> str:
    if not (scores := outcome.rouge):
        return ""
    measures = list(next(iter(scores.values())))
    rows = [(name, *(f"{found[measure]:.2f}" for measure in measures)) for name, found in scores.items()]
    words = (
        "ROUGE of held-out documents' summaries, in percent; lead is the document's beginning. "
        f"{SEGMENTATION}"
    )
    return f"{words}\n\n{table(('', *measures), rows)}"


def _time(facts: Facts, outcome: Outcome) -> str:
    if not outcome.steps:
        return ""
    first, full = outcome.speeds()
    # A run that always shows the same has one speed.
    speeds = {"": full} if first.window == full.window else {"at the start": first, "at the end": full}
    rows = [
        ("window, tokens", *(f"{speed.window:,}" for speed in speeds.values())),
        ("seconds a step", *(f"{speed.seconds:.4f}" for speed in speeds.values())),
        ("tokens a second", *(or_dash(speed.tokens_per_second, ",.0f") for speed in speeds.values())),
        ("model FLOP utilisation", *(or_dash(speed.mfu, ".1%") for speed in speeds.values())),
    ]
    share = f"A step at the start took {first.seconds / full.seconds:.0%} of the time of one at the end. "
    words = (
        f"{share if len(speeds) > 1 else ''}The steps took {_duration(outcome)} in all, without validations "
        f"and checkpoints; {outcome.input_share():.2%} of it went by waiting for input. The train step "
        f"compiled {_times(outcome.compilations)} in the last process. Utilisation counts the pairs that the "
        f"mask shows, and no recomputation, against {facts.peak.flops:.3g} operations a second "
        f"({facts.peak.source})."
    )
    return f"{table(('medians', *speeds), rows)}\n\n{words}"


def _duration(outcome: Outcome) -> str:
    before = [-1, *(record.step for record in outcome.steps)]
    # A record's seconds are a mean over the steps since the one before.
    seconds = sum(r.seconds * (r.step - b) for r, b in zip(outcome.steps, before, strict=False))
    return str(timedelta(seconds=round(seconds)))


def _times(count: int) -> str:
    return {0: "not at all", 1: "once"}.get(count, f"{count} times")


def _data(facts: Facts, outcome: Outcome) -> str:
    run, corpus = facts.run, facts.corpus
    paths = ", ".join(f"`{path}`" for path in run.data.paths) or "The Python standard library's source"
    kind = task_of(run).documents
    rows = [
        (kind, f"{corpus.documents:,}"),
        ("bytes", f"{corpus.size:,}"),
        ("tokens", f"{corpus.tokens:,}"),
        ("bytes a token, of what is predicted", f"{corpus.bytes_per_token:.3f}"),
        ("rows held out for validation", f"{_held_out(corpus):,}"),
        ("files and records left out", f"{corpus.malformed:,}"),
        ("unknown to the tokenizer, of the bytes", f"{corpus.unknown:.2%}"),
    ]
    if run.summarize.truncate:
        rows.append(("documents cut to fit their row", f"{corpus.truncated:,}"))
    if outcome.steps:
        padding = sum(record.padding for record in outcome.steps) / len(outcome.steps)
        rows += [
            ("padding in batches", f"{padding:.2%}"),
            ("trained on, in tokens", f"{_tokens(facts, outcome):,.0f}"),
        ]
    return f"{paths}; tokens by `{run.data.tokenizer}`, rows {run.data.rows}.\n\n{table(('', ''), rows)}"


def _held_out(corpus: "Corpus") -> int:
    return sum(int((batch.segments > 0).any(axis=1).sum()) for batch in corpus.held_out)


def _tokens(facts: Facts, outcome: Outcome) -> float:
    """Tokens that the run trained on, padding left out; of steps that have no record, by the others'."""
    if not (steps := outcome.steps):
        return 0
    padding = sum(record.padding for record in steps) / len(steps)
    return facts.run.steps * facts.run.data.batch * facts.run.data.length * (1 - padding)


def _config(run: Run) -> str:
    theirs, defaults = option_values(run), option_values(Run())
    rows = [
        (f"`{name}`", f"`{json.dumps(value)}`", f"`{json.dumps(defaults.get(name))}`")
        for name, value in theirs.items()
        if value != defaults.get(name)
    ]
    if not rows:
        return "All options have their defaults."
    words = "What differs from the defaults; `config.json` has all."
    return f"{words}\n\n{table(('option', 'here', 'default'), rows)}"


def _machine() -> str:
    device, count = jax.devices()[0], len(jax.devices())
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return (
        f"{count} × {device.device_kind} ({device.platform}) in {jax.process_count()} process(es), "
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}; dynmask_jax "
        f"{dynmask_jax.__version__}, {versions}."
    )


def _commands(folder: Path, run: Run) -> Iterator[str]:
    name = shlex.quote(str(folder))
    yield "The same run, from its beginning or from where it was stopped:"
    yield code(command(run))
    task = task_of(run)
    yield task.usage_title
    yield code(f"python -m train {task.usage.format(folder=name)}")
    yield "The weights, as safetensors:"
    yield code(f"python -m train export {name} --to weights.safetensors")
