"""The report of a run: `report.md` in its folder, with its pictures, one page to hand to a colleague."""

import json
import platform
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from train.command_line import command, options
from train.config import Run
from train.curriculum import Growth
from train.flops import Peak
from train.markdown import code, section, table
from train.picture import draw, draw_positions
from train.sinks import Record
from train.summary import Speed, Summary, bits_in_words

if TYPE_CHECKING:
    from train.data import Corpus

PACKAGES = ("dynmask_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@dataclass(frozen=True)
class Facts:
    """What the report tells of a run beside its records.

    Attributes:
      run: its config.
      corpus: its texts.
      growth: its curriculum.
      parameters: how many weights it trained.
      peak: what its devices can do.
    """

    run: Run
    corpus: "Corpus"
    growth: Growth
    parameters: int
    peak: Peak


def write(folder: Path, facts: Facts, summary: Summary):
    """Draws the pictures of a finished run into its folder, and writes `report.md` that shows them.

    Raises:
      OSError: the folder cannot be written to.
    """
    draw(summary.records, facts.growth, facts.run, folder / "curriculum.png")
    positions = draw_positions(summary.records, folder / "positions.png")
    text = report(folder, facts, summary, pictures=("curriculum.png", *["positions.png"] * positions))
    (folder / "report.md").write_text(text)


def report(folder: Path, facts: Facts, summary: Summary, *, pictures: tuple[str, ...]) -> str:
    """The report as Markdown.

    Args:
      folder: of the run, as commands name it.
      facts, summary: what it tells.
      pictures: their names in the folder, of those that there are.
    """
    positions = "positions.png" in pictures
    parts = [
        f"# {facts.run.name}",
        _opening(facts, summary),
        section("Result", _result(summary), _picture("The masks, and the loss", "curriculum.png")),
        section(
            "Use of context", _positions(summary), *[_picture("Loss by context", "positions.png")] * positions
        ),
        section("Needles", _needles(summary)),
        section("Summaries", _rouge(summary)),
        section("Time", _time(facts, summary)),
        section("Data", _data(facts, summary)),
        section("Config", _config(facts.run)),
        section("Versions and machine", _machine()),
        section("Going on", *_commands(folder, facts.run)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _opening(facts: Facts, summary: Summary) -> str:
    run, steps = facts.run, summary.steps
    task = "summaries" if run.task == "summarize" else "language"
    trained = _tokens(facts, summary)
    skipped = steps[-1]["skipped"] if steps else 0
    words = [
        f"A model of {task} with {facts.parameters:,} weights ({run.model.layers} layers, width "
        f"{run.model.width:,}), trained for {run.steps:,} steps on rows of {run.data.length:,} tokens, about "
        f"{trained:,.0f} tokens in all. {_curriculum(run)}"
    ]
    if skipped:
        words.append(
            f"**{skipped:,} steps were skipped**, for their loss or gradient was not finite; "
            "`skipped` in `metrics.jsonl` shows when."
        )
    return "\n\n".join(words)


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


def _result(summary: Summary) -> str:
    validations = summary.validations
    if not validations:
        return ""
    first, last = validations[0], validations[-1]
    best = min(validations, key=lambda r: (r["validation_loss"] is None, r["validation_loss"]))
    rows = [
        (name, f"{record['step']:,}", bits_in_words(record["validation_bits_per_byte"]), _nats(record))
        for name, record in (("first", first), ("best", best), ("last", last))
    ]
    return table(("validation, at the full mask", "steps done", "bits per byte", "nats a token"), rows)


def _nats(record: Record) -> str:
    loss = record["validation_loss"]
    return "not finite" if loss is None else f"{loss:.4f}"


def _positions(summary: Summary) -> str:
    validations = summary.validations
    if not validations or not validations[-1]["positions"]:
        return ""
    first, last = validations[0]["positions"], validations[-1]["positions"]

    def nats(loss: float | None) -> str:
        return "–" if loss is None else f"{loss:.4f}"

    rows = [(f"{int(s):,}", nats(first.get(s)), nats(last[s])) for s in sorted(last, key=int)]
    head = ("tokens of the document before, at least", "first validation", "last")
    words = "Nats a token, at the full mask. Where the loss goes on falling, long contexts are used."
    return f"{words}\n\n{table(head, rows)}"


def _needles(summary: Summary) -> str:
    probed = [record["needle"] for record in summary.validations if "needle" in record]
    if not probed:
        return ""
    first, last = probed[0], probed[-1]
    rows = [
        (f"{depth:.0%}", f"{a:.0%}", f"{b:.0%}", f"{gain:+.3f}")
        for depth, a, b, gain in zip(last["depths"], first["found"], last["found"], last["gain"], strict=True)
    ]
    head = ("depth in the text", "found, first", "found, last", "bits a token gained, last")
    words = "Numbers hidden in held-out text and asked for at its end; gained is what the right one tells."
    return f"{words}\n\n{table(head, rows)}"


def _rouge(summary: Summary) -> str:
    if not (scores := summary.rouge):
        return ""
    measures = list(next(iter(scores.values())))
    rows = [(name, *(f"{found[measure]:.2f}" for measure in measures)) for name, found in scores.items()]
    words = "ROUGE of held-out documents' summaries, in percent; lead is the document's beginning."
    return f"{words}\n\n{table(('', *measures), rows)}"


def _time(facts: Facts, summary: Summary) -> str:
    if not summary.steps:
        return ""
    first, full = summary.speeds()
    rows = [
        ("seconds a step", f"{first.seconds:.4f}", f"{full.seconds:.4f}"),
        (
            "tokens a second",
            _or_none(first.tokens_per_second, ",.0f"),
            _or_none(full.tokens_per_second, ",.0f"),
        ),
        ("model FLOP utilisation", _or_none(first.mfu, ".1%"), _or_none(full.mfu, ".1%")),
    ]
    head = ("medians", f"at the start, {_window(facts.run, first)}", f"at most, {_window(facts.run, full)}")
    words = (
        f"Utilisation counts the pairs that the mask shows, and no recomputation, against {facts.peak.flops:.3g} "
        f"operations a second ({facts.peak.source}). {summary.input_share():.2%} of a step's time went by "
        f"waiting for input. The train step compiled {_times(summary.compilations)} in the last process."
    )
    return f"{table(head, rows)}\n\n{words}"


def _window(run: Run, speed: Speed) -> str:
    return "full mask" if run.curriculum.kind == "full" else f"window of {speed.window:,}"


def _or_none(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _times(count: int) -> str:
    return {0: "not at all", 1: "once"}.get(count, f"{count} times")


def _data(facts: Facts, summary: Summary) -> str:
    run, corpus = facts.run, facts.corpus
    paths = ", ".join(f"`{path}`" for path in run.data.paths) or "the Python standard library's source"
    kind = "pairs of a document and its summary" if run.task == "summarize" else "documents"
    rows = [
        (kind, f"{corpus.documents:,}"),
        ("bytes", f"{corpus.size:,}"),
        ("tokens", f"{corpus.tokens:,}"),
        ("bytes a token, of what is predicted", f"{corpus.bytes_per_token:.3f}"),
        ("rows held out for validation", f"{_held_out(corpus):,}"),
        ("left out, for they could not be read", f"{corpus.malformed:,}"),
    ]
    if summary.steps:
        padding = sum(record["padding"] for record in summary.steps) / len(summary.steps)
        rows += [
            ("padding in batches", f"{padding:.2%}"),
            ("trained on, in tokens", f"{_tokens(facts, summary):,.0f}"),
        ]
    return f"{paths}; tokens by `{run.data.tokenizer}`, rows {run.data.rows}.\n\n{table(('', ''), rows)}"


def _held_out(corpus: "Corpus") -> int:
    return sum(int((batch.segments > 0).any(axis=1).sum()) for batch in corpus.held_out)


def _tokens(facts: Facts, summary: Summary) -> float:
    """Tokens that the run trained on, padding left out; of steps that have no record, by the others'."""
    if not (steps := summary.steps):
        return 0
    padding = sum(record["padding"] for record in steps) / len(steps)
    return facts.run.steps * facts.run.data.batch * facts.run.data.length * (1 - padding)


def _config(run: Run) -> str:
    theirs, defaults = options(run), options(Run())
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
    devices = jax.devices()
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    return (
        f"{len(devices)} × {devices[0].device_kind} ({devices[0].platform}), {jax.process_count()} process(es), "
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}; {versions}."
    )


def _commands(folder: Path, run: Run) -> Iterator[str]:
    name = shlex.quote(str(folder))
    yield "The same run, from its beginning or from where it was stopped:"
    yield code(command(run))
    if run.task == "summarize":
        yield "A summary of a text file:"
        yield code(f"python -m train summarize FILE --run {name}")
    else:
        yield "Text that goes on from a beginning:"
        yield code(f"python -m train generate 'Once upon a time' --run {name}")
    yield "The weights, as safetensors:"
    yield code(f"python -m train export {name} weights.safetensors")
