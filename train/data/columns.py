"""Which columns of a record hold its text."""

from collections.abc import Collection, Mapping

from train.config.run import TaskName
from train.data.tasks import TASKS, Task


def columns_of(there: Collection[str], task: TaskName | None, named: Mapping[str, str]) -> tuple[str, ...]:
    """The columns to read, one for each of the task's: the text's; or the document's and the summary's.

    Args:
      there: the columns that the record has.
      task: what they are read for; None for any: one whose columns are named, else a pair where there is one.
      named: data.columns, which precedes usual names.

    Raises:
      ValueError: none of the usual names is there, or several are.
    """
    found = _any_task(there, named) if task is None else TASKS[task]
    choices = _choices(found, there, named)
    if len(choices) == 1:
        return choices[0]
    usual = "several of the usual names" if choices else "none of the usual names"
    option = " ".join(f"{name} NAME" for name in found.columns)
    raise ValueError(
        f"{usual} for {found.record} among the columns {', '.join(sorted(there)) or 'of an empty record'}: "
        f"say which with --data.columns {option}"
    )


def check_columns(task: TaskName, named: Mapping[str, str]):
    """Refuses a column of data.columns that the task does not read."""
    read = set(TASKS[task].columns)
    if other := set(named) - read:
        raise ValueError(
            f"data.columns: the task {task} reads {' and '.join(sorted(read))}, got a column for "
            f"{', '.join(sorted(other))}"
        )


def _any_task(there: Collection[str], named: Mapping[str, str]) -> Task:
    """The task whose columns are named; else the one that reads most of the columns there are."""
    of_names = [task for task in TASKS.values() if set(named) & set(task.columns)]
    by_size = sorted(TASKS.values(), key=lambda task: -len(task.columns))
    with_choices = [task for task in by_size if _choices(task, there, named)]
    return [*of_names, *with_choices, by_size[-1]][0]


def _choices(task: Task, there: Collection[str], named: Mapping[str, str]) -> list[tuple[str, ...]]:
    """The names that the task's columns may have here: those given, and usual ones for the others."""
    choices = [
        tuple(named.get(column, usual) for column, usual in zip(task.columns, names, strict=True))
        for names in task.usual_columns
    ]
    known = {*there, *named.values()}
    return [
        names for names in dict.fromkeys(choices) if set(names) <= known and len(set(names)) == len(names)
    ]
