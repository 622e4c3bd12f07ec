"""Disks that are full, or may not be written to: found at the start, and named when it happens later."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten


class WriteError(OSError):
    """Something of a run could not be written; says what, why, and what is left to go on from."""


def check_writable(folder: Path, option: str = "folder"):
    """Refuses a folder in which no file can be made. Makes none that stays, nor the folder itself.

    Args:
      folder: where.
      option: that says so.

    Raises:
      OSError: with the folder and the reason.
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
    """Refuses a folder whose disk has less than `needed` bytes left; the folder exists.

    Raises:
      OSError: with both numbers.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{option}: {folder} has too little space: {size(free)} are free, and {purpose} take "
            f"{size(needed)}"
        )


@contextmanager
def writing(what: Path) -> Iterator[None]:
    """Names what could not be written where that fails.

    Raises:
      WriteError: in place of any OSError within.
    """
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(f"{what} could not be written: {reason(error)}") from error


def write_atomically(path: Path, text: str):
    """Replaces a file as a whole: whoever reads it, whenever, finds the old text or the new one."""
    with writing(path):
        fresh = path.with_name(path.name + ".writing")
        with fresh.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)


def reason(error: BaseException) -> str:
    """The system's words for an error of the disk, out of whatever the storage layers made of it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if number := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(number[1]))
    return shorten(str(error) or type(error).__name__, 160)


def size(count: float) -> str:
    """Bytes in the unit that suits: `1.5 GB`.

    >>> size(1_500), size(20), size(3e12)
    ('1.5 kB', '20.0 B', '3.0 TB')
    """
    units = iter(("B", "kB", "MB", "GB"))
    for unit in units:
        if count < 1000:
            return f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
