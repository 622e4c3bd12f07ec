"""The report's sections of what evaluators found beside the loss."""

from collections.abc import Mapping

from train.evaluate.needle import by_depth
from train.metrics.record import Number
from train.report.markdown import or_dash, table
from train.report.outcome import Outcome, bits_in_words

SHOWN = ("needle", "old_context")
"""Evaluators that have a section, or columns, of their own."""


def needles(outcome: Outcome) -> str:
    """What the needle probe found at the first and the last validation, by depth; empty without a probe."""
    probed = [record.evaluators["needle"] for record in outcome.validations if "needle" in record.evaluators]
    if not probed:
        return ""
    first, last, gains = (
        by_depth(probed[0], "found"),
        by_depth(probed[-1], "found"),
        by_depth(probed[-1], "gain"),
    )
    rows = [
        (f"{depth:.0%}", f"{first[depth]:.0%}", f"{last[depth]:.0%}", or_dash(gains[depth], "+.3f"))
        for depth in last
    ]
    head = ("depth in the text", "found, first", "found, last", "bits a token gained, last")
    words = "Numbers hidden in held-out text and asked for at its end; gained is what the right one tells."
    return f"{words}\n\n{table(head, rows)}"


def old_context(outcome: Outcome) -> str:
    """The validations in chunks of the old context and at the full mask; empty without an old context."""
    found = [record for record in outcome.validations if "old_context" in record.evaluators]
    if not found:
        return ""
    first, last = (record.evaluators["old_context"] for record in (found[0], found[-1]))
    rows = [
        (
            chunks_of(last),
            *(bits_in_words(each["bits_per_byte"]) for each in (first, last)),
            *(or_dash(each["loss"], ".4f") for each in (first, last)),
        ),
        (
            "the full mask",
            *(bits_in_words(record.bits_per_byte) for record in (found[0], found[-1])),
            *(or_dash(record.loss, ".4f") for record in (found[0], found[-1])),
        ),
    ]
    head = ("validation at", "bits per byte, before", "after", "nats a token, before", "after")
    words = (
        "The same held-out tokens at both contexts: in chunks as long as the rows of the model's training "
        "before, and at the full mask. Before and after are the first validation and the last."
    )
    return f"{words}\n\n{table(head, rows)}"


def old_positions(outcome: Outcome) -> dict[str, dict[int, Number]]:
    """Nats a token by the least tokens before, in chunks of the old context, by what heads their column."""
    found = [r.evaluators["old_context"] for r in outcome.validations if "old_context" in r.evaluators]
    if not found:
        return {}
    chunks = chunks_of(found[-1])
    return {f"{chunks}: first": by_start(found[0]), f"{chunks}: last": by_start(found[-1])}


def by_start(old: Mapping[str, Number]) -> dict[int, Number]:
    """Of what the evaluator `old_context` found, the losses by the least tokens before."""
    parts = [(name.partition("/"), value) for name, value in old.items()]
    return {int(start): value for (group, _, start), value in parts if group == "positions"}


def chunks_of(old: Mapping[str, Number]) -> str:
    """The mask of the old context, in words."""
    return f"chunks of {old['tokens']:,.0f}"


def others(outcome: Outcome) -> str:
    """The evaluators that have no section of their own, each number at the first and the last validation."""
    found = [record.evaluators for record in outcome.validations if record.evaluators]
    if not found:
        return ""
    rows = [
        (f"{name} {key}", or_dash(found[0].get(name, {}).get(key), ".4g"), or_dash(value, ".4g"))
        for name, numbers in found[-1].items()
        if name not in SHOWN
        for key, value in numbers.items()
    ]
    return table(("", "first validation", "last"), rows) if rows else ""
