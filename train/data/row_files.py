"""Files of rows in, their rows out: JSON lines and tables, also with gzip; and what cannot be read."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from train.data.file_kinds import BOM, opens_gzip, separator


def opened(path: Path) -> IO[bytes]:
    """The file's content, decompressed where it is compressed with gzip."""
    return cast(IO[bytes], gzip.open(path, "rb") if opens_gzip(path) else path.open("rb"))


DAMAGED = EOFError, gzip.BadGzipFile, zlib.error
"""What reading a gzip file raises that is damaged."""


def damaged(error: Exception) -> str:
    """The reason for an error of `DAMAGED`."""
    return f"the gzip file is damaged or cut off here, the rest is lost ({error})"


Fields = dict[str, Any]


def lines(path: Path) -> Iterator[tuple[int, Fields | str]]:
    """The object on each line of a file, or why it is none; blank lines are left out."""
    for number, line in _numbered(path):
        if isinstance(line, str):
            yield number, line
        elif line.strip():
            yield number, _object(line)


def table_rows(path: Path) -> Iterator[tuple[int, Fields | str]]:
    """The fields of each row of a table, by the names in its first line; numbered by their last lines."""
    csv.field_size_limit(2**31 - 1)  # documents are long; the library's own limit is 128 KiB
    with opened(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        parted = separator(path)
        # Tabs part columns that quotes do not: "Hello" is then a word of the text.
        quoting = csv.QUOTE_NONE if parted == "\t" else csv.QUOTE_MINIMAL
        reader = csv.DictReader(text, delimiter=parted, strict=True, quoting=quoting)
        while True:
            line = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                lost = "; a quote is open, and the rest is lost" if "end of data" in str(error) else ""
                yield line, f"it is no row of a table ({error}){lost}"
                continue
            except (UnicodeDecodeError, *DAMAGED) as error:
                yield reader.line_num + 1, f"the rest of the file cannot be read ({error})"
                return
            extra = fields.pop(None, None)  # pyright: ignore[reportCallIssue, reportArgumentType]
            missing = [name for name, value in fields.items() if value is None]
            if extra or missing:
                yield (
                    reader.line_num,
                    f"it has not the {len(reader.fieldnames or ())} columns of the first line",
                )
            else:
                yield reader.line_num, dict(fields)


def _numbered(path: Path) -> Iterator[tuple[int, bytes | str]]:
    number = 0
    with opened(path) as file:
        try:
            for line in file:
                number += 1
                yield number, line.removeprefix(BOM) if number == 1 else line
        except DAMAGED as error:
            yield number + 1, damaged(error)


def _object(line: bytes) -> dict[str, Any] | str:
    """A line's fields, or why it has none."""
    try:
        value = json.loads(line.decode("utf-8").strip())
    except UnicodeDecodeError as error:
        return f"it is not UTF-8 text ({error.reason} at byte {error.start + 1})"
    except json.JSONDecodeError as error:
        return f"it is not JSON ({error.msg}, letter {error.colno})"
    except (ValueError, RecursionError) as error:
        return f"it is not JSON ({error})"
    return value if isinstance(value, dict) else f"it is not a JSON object but {type(value).__name__}"
