"""Writes files atomically, and names the file and the reason where a disk is full or read-only."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten


class WriteError(OSError):
    """A file of a run could not be written; the message says which, why, and what the run can resume from."""


def check_writable(folder: Path, option: str = "folder"):
    """Refuses a folder in which no file can be created. Leaves no file, and does not create the folder.

    Args:
      folder: need not exist; its nearest existing parent is then tested.
      option: of the command line, named in the error.

    Raises:
      OSError: with the option, the folder and the reason.
    """
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    try:
        if not there.is_dir():
            raise NotADirectoryError(20, f"{there} is no folder")
        with tempfile.TemporaryFile(dir=there) as probe:
            probe.write(b"dynmask")
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise OSError(f"{option}: {folder} cannot be written to: {reason(error)}") from error


def check_space(folder: Path, needed: int, purpose: str, option: str = "folder"):
    """Refuses a folder, which exists, whose disk has less than `needed` bytes free.

    Raises:
      OSError: with both sizes, `purpose` (a plural) and the option.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{option}: {folder} has too little space: {size(free)} are free, and {purpose} take "
            f"{size(needed)}"
        )


@contextmanager
def writing(what: Path) -> Iterator[None]:
    """Turns an `OSError` inside into a `WriteError` that names `what`.

    Raises:
      WriteError: in place of any OSError.
    """
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(f"{what} could not be written: {reason(error)}") from error


def write_atomically(path: Path, text: str):
    """Replaces a file atomically: a reader finds the old text or the new one at any moment."""
    with writing(path):
        fresh = path.with_name(path.name + ".writing")
        with fresh.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)


def reason(error: BaseException) -> str:
    """The system's message for an error of the disk, also from inside a storage layer's own error."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if number := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(number[1]))
    return shorten(str(error) or type(error).__name__, 160)


def size(count: float) -> str:
    """A number of bytes with a unit, `1.5 GB`.

    >>> size(1_500), size(20), size(3e12)
    ('1.5 kB', '20.0 B', '3.0 TB')
    """
    units = iter(("B", "kB", "MB", "GB"))
    for unit in units:
        if count < 1000:
            return f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
