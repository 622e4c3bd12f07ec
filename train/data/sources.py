"""Paths in, sources out: the text files, JSONL files and saved datasets to read."""

import glob
import json
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

LINES = (".jsonl", ".jsonl.gz", ".json.gz")


@dataclass(frozen=True)
class Source:
    """One place that records are read from.

    Attributes:
      path: the file, or the folder of a saved dataset.
      kind: "text": the file is one document; "lines": each line of JSONL is one; "dataset": each row is one.
      named: whether the path was given itself, not found in a folder. Files found in a folder that are not
        text are skipped.
    """

    path: Path
    kind: Literal["text", "lines", "dataset"]
    named: bool


def sources(paths: Iterable[str], option: str = "data.paths") -> list[Source]:
    """The sources at the paths: files, folders (searched recursively), globs and saved datasets.

    Files of a folder and of a glob are sorted. Hidden files and folders in a folder are skipped.

    Raises:
      FileNotFoundError: a path does not exist, or a glob matches no file.
      ValueError: a file is given twice, or the folder of a saved dataset holds several splits.
    """
    found = [source for path in paths for source in _at(path, option)]
    seen = set()
    for source in found:
        if (real := source.path.resolve()) in seen:
            raise ValueError(f"{option}: {source.path} is there twice: name each file once")
        seen.add(real)
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
        yield from (_file(match, named=True) for match in matching)


def _file(path: Path, named: bool) -> Source:
    return Source(path, "lines" if path.name.endswith(LINES) else "text", named)


def _below(folder: Path, option: str) -> Iterator[Source]:
    """What is in a folder and below it; symbolic links to folders are not followed."""
    if (splits := folder / "dataset_dict.json").exists():
        names = json.loads(splits.read_text())["splits"]
        if len(names) != 1:
            raise ValueError(
                f"{option}: {folder} holds the splits {', '.join(names)}: name one, {folder / names[0]} say"
            )
        yield Source(folder / names[0], "dataset", named=True)
        return
    if (folder / "state.json").exists() and (folder / "dataset_info.json").exists():
        yield Source(folder, "dataset", named=True)
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _below(path, option)
        elif path.is_file():
            yield _file(path, named=False)
