"""What a model is trained for: a task is a row of `TASKS`, and its word in `train.config.run`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from train.config.run import Run, TaskName

CommandName = Literal["generate", "summarize"]
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


@dataclass(frozen=True)
class Task:
    """What a model is trained for.

    A segment of a task with a boundary holds a prefix, which a curriculum shows by and by, and a rest, of
    which the end is predicted: the prefix ends just before position `data.length`. Without a boundary each
    next token is predicted.

    Attributes:
      name: the config's word for it.
      columns: what a record holds, by the names that data.columns takes: one text, or a pair.
      usual_columns: names that these columns usually have, one tuple for each choice.
      record: a record in words, for a message.
      needs: what data.paths must hold, in words; None: any text will do, by default the standard library's.
      held_out_by: what the share data.held_out counts. By tokens, a document may be divided.
      has_boundary: whether rows hold a prefix.
      reads_ahead: whether a prefix's tokens see those after them, within the prefix.
      command: what uses a trained model: a command of `python -m train`.
      usage: its words, with a place for the folder.
      purpose: why a model of this task was trained, in words.
      model, documents, row, usage_title: words of the report and its picture: what the model is, what
        the text consists of, what a row holds (with a place for the prefix's last position), what `usage`
        prints.
    """

    name: TaskName
    columns: tuple[str, ...]
    usual_columns: tuple[tuple[str, ...], ...]
    record: str
    needs: str | None
    held_out_by: Literal["tokens", "documents"]
    has_boundary: bool
    reads_ahead: Callable[[Run], bool]
    command: CommandName
    usage: str
    purpose: str
    model: str
    documents: str
    row: str
    usage_title: str

    def boundary(self, run: Run) -> int | None:
        """The first position after a prefix, in every segment; None: there is no prefix."""
        return run.data.length if self.has_boundary else None

    def visible_ahead(self, run: Run) -> int:
        """Tokens at positions below this one see each other both ways; 0: every token sees none after it."""
        return run.data.length if self.reads_ahead(run) else 0


TASKS: dict[TaskName, Task] = {
    "lm": Task(
        name="lm",
        columns=("text",),
        usual_columns=tuple((name,) for name in TEXTS),
        record="text",
        needs=None,
        held_out_by="tokens",
        has_boundary=False,
        reads_ahead=lambda run: False,
        command="generate",
        usage='generate {folder} --prompt "Once upon a time"',
        purpose="to continue text",
        model="language model",
        documents="documents",
        row="What each token sees",
        usage_title="To continue a text:",
    ),
    "summarize": Task(
        name="summarize",
        columns=("document", "summary"),
        usual_columns=PAIRS,
        record="a document and its summary",
        needs="pairs of document and summary",
        held_out_by="documents",
        has_boundary=True,
        reads_ahead=lambda run: run.summarize.prefix == "bidirectional",
        command="summarize",
        usage="summarize FILE --run {folder}",
        purpose="to summarise",
        model="model that summarises",
        documents="pairs of a document and its summary",
        row="A document, up to position {last:,}, and its summary",
        usage_title="A summary of a text file:",
    ),
}
"""name -> the task."""


def task_of(run: Run) -> Task:
    """The task of a run."""
    return TASKS[run.task]
