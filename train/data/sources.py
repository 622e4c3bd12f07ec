"""Paths in, sources out: text files, files of records and saved datasets to read, and what is left out."""

import glob
import json
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from train.data.file_kinds import Kind, kind_of

SourceKind = Kind | Literal["dataset", "none"]


@dataclass(frozen=True)
class Source:
    """One place that records are read from.

    Attributes:
      path: the file, or the folder of a saved dataset.
      kind: "text": the file is one document; "lines": each line of JSONL is one; "table": each row of CSV or
        TSV is one; "dataset": each row is one; "none": it is left out.
      named: whether the path was given itself, not found in a folder or by a glob. Files that were found and
        are not text are skipped.
      reason: why it is left out.
    """

    path: Path
    kind: SourceKind
    named: bool
    reason: str | None = None


def sources(paths: Iterable[str], option: str = "data.paths") -> list[Source]:
    """The sources at the paths: files, folders (searched recursively), globs and saved datasets.

    What a file is, its content says, not only its name: see `kind_of`. Files of a folder and of a glob are
    sorted. Links in a folder are followed. What is left out of a folder is a source too, of kind "none":
    hidden files and folders, files that describe the data, links to nothing or to what was found before.

    Raises:
      FileNotFoundError: a path does not exist, or a glob matches no file.
      ValueError: a file is given twice, or the folder of a saved dataset holds several splits.
    """
    found: list[Source] = []
    seen: dict[Path, Source] = {}
    for path in paths:
        for source in _at(path, option):
            first = None if source.kind == "none" else seen.setdefault(source.path.resolve(), source)
            if first is None or first is source:
                found.append(source)
            elif source.path.is_symlink() and not source.named:
                found.append(Source(source.path, "none", False, f"it is a link to {first.path}"))
            else:
                raise ValueError(f"{option}: {source.path} is there twice: name each file once")
    return found


def standard_library() -> list[Source]:
    """The source files of Python's standard library, without its tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests"}
    files = sorted(p for p in root.rglob("*.py") if not left_out & set(p.relative_to(root).parts))
    return [Source(path, "text", named=False) for path in files]


def files(source: Source) -> list[Path]:
    """The files that a source's records are in."""
    return sorted(p for p in source.path.iterdir() if p.is_file()) if source.path.is_dir() else [source.path]


def _at(path: str, option: str) -> Iterator[Source]:
    if Path(path).is_dir():
        yield from _below(Path(path), option)
    elif Path(path).exists():
        yield _file(Path(path), named=True)
    elif not glob.has_magic(path):
        raise FileNotFoundError(f"{option}: {path} does not exist")
    else:
        matches = sorted({Path(match) for match in glob.glob(path, recursive=True)})
        matching = [match for match in matches if match.is_file()]
        if not matching:
            raise FileNotFoundError(f"{option}: {path} matches no file")
        yield from (_file(match, named=False) for match in matching)


def _file(path: Path, named: bool) -> Source:
    kind, reason = kind_of(path, named)
    return Source(path, kind or "none", named, reason)


def _below(folder: Path, option: str, seen: dict[Path, Path] | None = None) -> Iterator[Source]:
    """What is in a folder and below it; a folder that links lead to again is left out there."""
    if (splits := folder / "dataset_dict.json").exists():
        names = json.loads(splits.read_text(encoding="utf-8"))["splits"]
        if len(names) != 1:
            raise ValueError(
                f"{option}: {folder} holds the splits {', '.join(names)}: name one, {folder / names[0]} say"
            )
        yield Source(folder / names[0], "dataset", named=True)
        return
    if (folder / "state.json").exists() and (folder / "dataset_info.json").exists():
        yield Source(folder, "dataset", named=True)
        return
    seen = {} if seen is None else seen
    seen[folder.resolve()] = folder
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            yield Source(path, "none", False, "it is hidden")
        elif not path.is_dir():
            yield _file(path, named=False)
        elif (before := seen.get(path.resolve())) is not None:
            yield Source(path, "none", False, f"it is the folder {before} again")
        else:
            yield from _below(path, option, seen)
