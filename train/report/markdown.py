"""Pieces of Markdown."""

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table whose first column is of words and the others of numbers.

    >>> print(table(("", "loss"), [("start", 8), ("end", 2.5)]))
    |  | loss |
    | --- | ---: |
    | start | 8 |
    | end | 2.5 |
    """
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(_cell(value) for value in line)} |" for line in lines)


def section(title: str, *parts: str) -> str:
    """A section with its parts as paragraphs; empty where all of them are."""
    there = [part for part in parts if part]
    return "\n\n".join([f"## {title}", *there]) if there else ""


def code(*lines: str) -> str:
    """Lines to be typed in."""
    return "\n".join(["```sh", *lines, "```"])


def or_dash(value: float | None, form: str) -> str:
    """The number in a format; a dash for None."""
    return "–" if value is None else format(value, form)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
