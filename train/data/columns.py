"""Which columns of a record hold its text."""

from collections.abc import Collection, Mapping

from train.config.run import Task

TEXTS = ("text", "content", "body", "document", "article", "dialogue", "transcript")
"""Usual names of a text's column."""
PAIRS = (
    ("document", "summary"),
    ("article", "highlights"),
    ("input", "output"),
    ("text", "summary"),
    ("dialogue", "summary"),
    ("article", "summary"),
    ("article", "abstract"),
    ("transcript", "summary"),
    ("report", "summary"),
    ("source", "target"),
)
"""Usual names of the columns of a document and of its summary."""


def columns_of(there: Collection[str], task: Task | None, named: Mapping[str, str]) -> tuple[str, ...]:
    """The columns to read: one for `lm`; the document's and the summary's for `summarize`.

    Args:
      there: the columns that there are.
      task: what they are read for; None for either: a pair where there is one.
      named: data.columns, which goes before usual names.

    Raises:
      ValueError: none of the usual names is there, or several are.
    """
    if task is None:
        task = "summarize" if set(named) & {"document", "summary"} or _pairs(there, named) else "lm"
    if task == "lm":
        choices = [(named["text"],)] if "text" in named else [(name,) for name in TEXTS if name in there]
        option = "--data.columns text NAME"
    else:
        choices = _pairs(there, named)
        option = "--data.columns document NAME summary NAME"
    if len(choices) == 1:
        return choices[0]
    kind = "text" if task == "lm" else "a document and its summary"
    usual = "several of the usual names" if choices else "none of the usual names"
    raise ValueError(
        f"{usual} for {kind} among the columns {', '.join(sorted(there)) or 'of an empty record'}: "
        f"say which with {option}"
    )


def check_columns(task: Task, named: Mapping[str, str]):
    """Refuses a column of data.columns that the task does not read."""
    asked = {"text"} if task == "lm" else {"document", "summary"}
    if other := set(named) - asked:
        raise ValueError(
            f"data.columns: the task {task} reads {' and '.join(sorted(asked))}, got a column for "
            f"{', '.join(sorted(other))}"
        )


def _pairs(there: Collection[str], named: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Pairs of columns: those named, with those of the usual ones that are there."""
    pairs = [(named.get("document", document), named.get("summary", summary)) for document, summary in PAIRS]
    known = {*there, *named.values()}
    return [pair for pair in dict.fromkeys(pairs) if set(pair) <= known and len(set(pair)) == 2]
