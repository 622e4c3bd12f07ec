"""What a file holds: text, records, or what is left out and why. Its content says, not only its name."""

import gzip
import json
import re
import zlib
from pathlib import Path
from typing import Any, Literal

from train.data.tasks import PAIRS, TEXTS

TEXT_COLUMNS = {*TEXTS, *(name for pair in PAIRS for name in pair)}
Kind = Literal["text", "lines", "table"]

LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
"""The ends of names that promise JSON lines, in any case."""
TABLES = {".csv": ",", ".tsv": "\t"}
"""The ends of names of tables -> what parts their columns."""
DESCRIPTIONS = ("readme", "license", "licence", "dataset_info", "dataset_infos", "dataset_card", "citation")
"""Names, without their end, of files that come with data and describe it."""
COMPRESS = "decompress it, or compress it with gzip"
MAGIC = [
    (rb"ARROW1\0\0", "it is Arrow: save it as a dataset (Hugging Face datasets, save_to_disk)"),
    (rb"PK\x03\x04", "it is a zip archive: unpack it"),
    (rb"%PDF-\d\.", "it is PDF: save its text"),
    (rb"\x28\xb5\x2f\xfd", f"it is compressed with zstd: {COMPRESS}"),
    (rb"\xfd7zXZ\0", f"it is compressed with xz: {COMPRESS}"),
    (rb"BZh[1-9]1AY&SY", f"it is compressed with bzip2: {COMPRESS}"),
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "it is UTF-32: iconv -f utf-32 -t utf-8 makes UTF-8 of it"),
    (rb"\xff\xfe|\xfe\xff", "it is UTF-16: iconv -f utf-16 -t utf-8 makes UTF-8 of it"),
]
"""How files begin that are not read -> why, and what to do."""
PARQUET = "it is Parquet: save it as JSON lines, or as a dataset (Hugging Face datasets, save_to_disk)"
POINTER = b"version https://git-lfs.github.com/spec/"
GZIP = b"\x1f\x8b"
BOM = b"\xef\xbb\xbf"
HEAD = 1 << 16  # bytes that are looked at


def kind_of(path: Path, named: bool) -> tuple[Kind | None, str | None]:
    """What a file holds; or None, and why it is left out.

    Args:
      path: of the file.
      named: whether it was given by its name; files that describe data are then read.

    Returns:
      "lines" where the name promises JSON lines, or where all lines of the beginning are JSON objects, with a
      usual column of text if the name does not even say JSON; "table" for CSV and TSV; else "text", which may
      still not be UTF-8.
    """
    if not path.exists():
        return None, "it is a link to nothing"
    if not path.is_file():
        return None, "it is no file"
    name = path.name.lower()
    if not named and name.split(".")[0] in DESCRIPTIONS:
        return None, "it describes data: give its name to read it"
    with path.open("rb") as file:
        head = file.read(HEAD)
    if head.startswith(POINTER):
        return None, "it is a Git LFS pointer, not the data: git lfs pull gets that"
    for magic, reason in MAGIC:
        if re.match(magic, head):
            return None, reason
    if head.startswith(b"PAR1") and _ends_with(path, b"PAR1"):
        return None, PARQUET
    if name.endswith(LINES):
        return "lines", None
    name = name.removesuffix(".gz")
    if name.endswith(tuple(TABLES)):
        return "table", None
    if head.startswith(GZIP):
        try:
            head = _unzipped(path)
        except (EOFError, OSError, zlib.error):  # the reader of records says so, with the place
            return "text", None
    objects = _objects(head)
    if objects and (name.endswith(".json") or TEXT_COLUMNS & set(objects[0])):
        return "lines", None
    if name.endswith(".json"):
        return None, (
            "it is JSON, but no object a line: jq -c '.[]' makes JSON lines of an array; under another name, "
            "as x.txt, it is read as text"
        )
    return "text", None


def separator(path: Path) -> str:
    """What parts the columns of a table."""
    return TABLES[Path(path.name.lower().removesuffix(".gz")).suffix]


def opens_gzip(path: Path) -> bool:
    """Whether the file is compressed with gzip, whatever its name says."""
    with path.open("rb") as file:
        return file.read(len(GZIP)) == GZIP


def _unzipped(path: Path) -> bytes:
    with gzip.open(path, "rb") as file:
        return file.read(HEAD)


def _ends_with(path: Path, last: bytes) -> bool:
    with path.open("rb") as file:
        file.seek(-len(last), 2)
        return file.read() == last


def _objects(head: bytes) -> list[dict[str, Any]]:
    """The objects on the lines of a file's beginning; none where a line is anything else.

    Of a first line that is longer than what was read, the first key stands for it.
    """
    lines = [line for line in head.removeprefix(BOM).splitlines(keepends=True) if line.strip()]
    if len(head) >= HEAD and lines and not lines[-1].endswith(b"\n"):
        cut = lines.pop()
        if not lines:
            key = re.match(rb'\s*\{\s*"((?:[^"\\]|\\.)*)"\s*:', cut)
            return [{key[1].decode("utf-8", "replace"): None}] if key else []
    try:
        found = [json.loads(line) for line in lines]
    except (ValueError, RecursionError):
        return []
    return found if all(isinstance(each, dict) for each in found) else []
