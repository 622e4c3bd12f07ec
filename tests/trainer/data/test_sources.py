"""Paths to sources: folders, globs, saved datasets; what is not there, or there twice, is refused."""

import json
from pathlib import Path

import pytest

from train.data.sources import files, sources, standard_library


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in (
        "b.txt",
        "a.md",
        "inner/c.jsonl",
        "inner/deep/d.jsonl.gz",
        "e.json.gz",
        ".hidden/f.txt",
        ".g",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "text"}' if "json" in name else "text")
    return tmp_path


def found(folder: Path, *paths: str) -> list[tuple[str, str, bool]]:
    asked = [str(folder / path) for path in paths]
    return [(str(s.path.relative_to(folder)), s.kind, s.named) for s in sources(asked)]


def test_a_folder_is_searched_through_in_order_and_what_is_hidden_left_out(folder):
    assert found(folder, "") == [
        (".g", "none", False),
        (".hidden", "none", False),
        ("a.md", "text", False),
        ("b.txt", "text", False),
        ("e.json.gz", "lines", False),
        ("inner/c.jsonl", "lines", False),
        ("inner/deep/d.jsonl.gz", "lines", False),
    ]


def test_a_file_is_named_and_paths_keep_their_order(folder):
    assert found(folder, "inner/c.jsonl", "a.md") == [
        ("inner/c.jsonl", "lines", True),
        ("a.md", "text", True),
    ]


def test_globs_give_files_and_two_stars_go_below(folder):
    assert found(folder, "*.md") == [("a.md", "text", False)]
    assert [name for name, _, _ in found(folder, "**/*.json*")] == [
        "e.json.gz",
        "inner/c.jsonl",
        "inner/deep/d.jsonl.gz",
    ]
    assert [name for name, _, _ in found(folder, "inner/*")] == ["inner/c.jsonl"]  # no folder


def test_a_name_with_the_letters_of_a_glob_is_that_file(folder):
    (folder / "x[1].txt").write_text("text")
    assert found(folder, "x[1].txt") == [("x[1].txt", "text", True)]


def test_links_to_folders_are_followed_but_not_in_circles(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "h.txt").write_text("text")
    (folder / "inner" / "loop").symlink_to(folder)
    (folder / "linked").symlink_to(elsewhere)
    (folder / "nothing").symlink_to(folder / "gone")
    before = found(folder, "inner/c.jsonl")
    reasons = {s.path.name: s.reason for s in sources([str(folder)]) if s.kind == "none"}
    assert reasons == {
        ".g": "it is hidden",
        ".hidden": "it is hidden",
        "loop": f"it is the folder {folder} again",
        "nothing": "it is a link to nothing",
    }
    assert ("linked/h.txt", "text", False) in found(folder, "")
    assert len([kind for _, kind, _ in found(folder, "") if kind != "none"]) == 6
    assert found(folder, "inner/c.jsonl") == before


def test_a_link_to_a_file_that_was_found_is_left_out(folder):
    (folder / "inner" / "again.jsonl").symlink_to(folder / "a.md")
    reasons = [s.reason for s in sources([str(folder)]) if s.path.name == "again.jsonl"]
    assert reasons == [f"it is a link to {folder / 'a.md'}"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nowhere.txt", r"data\.paths: .*nowhere\.txt does not exist"),
        ("*.tex", r"data\.paths: .*\*\.tex matches no file"),
        ("inn*", r"data\.paths: .*inn\* matches no file"),  # a folder alone
    ],
)
def test_what_is_not_there_is_refused(folder, path, words):
    with pytest.raises(FileNotFoundError, match=words):
        found(folder, path)


def test_the_option_that_named_it_is_named():
    with pytest.raises(FileNotFoundError, match=r"^data\.held_out_paths: nowhere does not exist"):
        sources(["nowhere"], "data.held_out_paths")


def test_a_file_that_is_there_twice_is_refused(folder):
    with pytest.raises(ValueError, match=r"data\.paths: .*c\.jsonl is there twice"):
        found(folder, "inner/c.jsonl", "")
    (folder / "again.jsonl").symlink_to(folder / "inner" / "c.jsonl")
    with pytest.raises(ValueError, match="is there twice"):
        found(folder, "again.jsonl", "inner/c.jsonl")


def saved(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("state.json", "dataset_info.json", "data.arrow"):
        (folder / name).write_text("{}")
    return folder


def test_the_folder_of_a_saved_dataset_is_one_source(folder):
    saved(folder / "inner" / "set")
    assert ("inner/set", "dataset", True) in found(folder, "")
    assert found(folder, "inner/set") == [("inner/set", "dataset", True)]
    (source,) = sources([str(folder / "inner" / "set")])
    assert [path.name for path in files(source)] == ["data.arrow", "dataset_info.json", "state.json"]


def test_a_folder_with_one_of_its_files_is_no_dataset(folder):
    (folder / "state.json").write_text("{}")
    assert ("state.json", "lines", False) in found(folder, "")


def test_of_several_splits_one_must_be_named(folder):
    for name in ("train", "test"):
        saved(folder / "sets" / name)
    (folder / "sets" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    with pytest.raises(ValueError, match=r"sets holds the splits train, test: name one, .*sets/train say"):
        found(folder, "sets")
    assert found(folder, "sets/test") == [("sets/test", "dataset", True)]
    (folder / "sets" / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    assert found(folder, "sets") == [("sets/train", "dataset", True)]


def test_the_standard_library_comes_without_its_tests():
    library = standard_library()
    assert {"dataclasses.py", "argparse.py"} <= {source.path.name for source in library}
    assert not [s for s in library if {"test", "site-packages"} & set(s.path.parts)]
