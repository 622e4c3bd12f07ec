"""What a file holds: text, records, or what is left out and why. Its content says, not only its name."""

import gzip
import json
import zlib
from pathlib import Path
from typing import Literal

Kind = Literal["text", "lines", "table"]

LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json.gz")
"""The ends of names that promise JSON lines, in any case."""
TABLES = {".csv": ",", ".tsv": "\t"}
"""The ends of names of tables -> what parts their columns."""
DESCRIPTIONS = ("readme", "license", "licence", "dataset_info", "dataset_infos", "dataset_card", "citation")
"""Names, without their end, of files that come with data and describe it."""
MAGIC = {
    b"PAR1": "it is Parquet: save it as JSON lines, or as a dataset (Hugging Face datasets, save_to_disk)",
    b"ARROW1": "it is Arrow: save it as a dataset (Hugging Face datasets, save_to_disk)",
    b"PK\x03\x04": "it is a zip archive: unpack it",
    b"%PDF": "it is PDF: save its text",
    b"\x28\xb5\x2f\xfd": "it is compressed with zstd: decompress it, or compress it with gzip",
    b"\xfd7zXZ": "it is compressed with xz: decompress it, or compress it with gzip",
    b"BZh": "it is compressed with bzip2: decompress it, or compress it with gzip",
    b"\xff\xfe": "it is UTF-16: iconv -f utf-16 -t utf-8 makes UTF-8 of it",
    b"\xfe\xff": "it is UTF-16: iconv -f utf-16 -t utf-8 makes UTF-8 of it",
}
"""How files begin that are not read -> why, and what to do."""
POINTER = b"version https://git-lfs.github.com/spec/"
BOM = b"\xef\xbb\xbf"
HEAD = 1 << 16  # bytes that are looked at


def kind_of(path: Path, named: bool) -> tuple[Kind | None, str | None]:
    """What a file holds; or None, and why it is left out.

    Args:
      path: of the file.
      named: whether it was given by its name; files that describe data are then read.

    Returns:
      "lines" where the name promises JSON lines, or where the first two lines that are not blank, or the only
      one, are JSON objects; "table" for CSV and TSV; else "text", which may still not be UTF-8.
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
    for magic, reason in MAGIC.items():
        if head.startswith(magic):
            return None, reason
    if name.endswith(LINES):
        return "lines", None
    if name.removesuffix(".gz").endswith(tuple(TABLES)):
        return "table", None
    if opens_gzip(path):
        head = _unzipped(path)
    if _json_lines(head):
        return "lines", None
    if name.removesuffix(".gz").endswith(".json"):
        return None, (
            "it is JSON, but no object a line: jq -c '.[]' makes JSON lines of an array; under another name, "
            "as x.txt, it is read as text"
        )
    return "text", None


def separator(path: Path) -> str:
    """What parts the columns of a table."""
    return TABLES[Path(path.name.lower().removesuffix(".gz")).suffix]


def opens_gzip(path: Path) -> bool:
    """Whether the file is compressed with gzip, or its name says so."""
    if path.suffix.lower() == ".gz":
        return True
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _unzipped(path: Path) -> bytes:
    try:
        with gzip.open(path, "rb") as file:
            return file.read(HEAD)
    except (EOFError, OSError, zlib.error):  # the reader of records says so, with the place
        return b""


def _json_lines(head: bytes) -> bool:
    whole = head.removeprefix(BOM).splitlines(keepends=True)
    lines = [line for line in whole if line.strip()][:2]
    if not lines or not lines[0].lstrip().startswith(b"{"):
        return False
    if len(lines) == 1 and len(head) >= HEAD and not lines[0].endswith(b"\n"):
        # A record longer than the head: it begins as an object with a first key.
        return lines[0].lstrip()[1:].lstrip().startswith(b'"')
    if not lines[-1].endswith(b"\n") and len(head) >= HEAD:
        lines.pop()
    return all(map(_is_object, lines))


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
