"""The report's sections of what evaluators found beside the loss."""

from train.evaluate.needle import by_depth
from train.report.markdown import or_dash, table
from train.report.outcome import Outcome


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


def others(outcome: Outcome) -> str:
    """The evaluators that have no section of their own, each number at the first and the last validation."""
    found = [record.evaluators for record in outcome.validations if record.evaluators]
    if not found:
        return ""
    rows = [
        (f"{name} {key}", or_dash(found[0].get(name, {}).get(key), ".4g"), or_dash(value, ".4g"))
        for name, numbers in found[-1].items()
        if name != "needle"
        for key, value in numbers.items()
    ]
    return table(("", "first validation", "last"), rows) if rows else ""
