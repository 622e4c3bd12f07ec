"""Records: what files hold, and what is wrong with them by file and line."""

import gzip
import re
import sys
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.train_texts import write_lines
from train.data import records as module
from train.data.records import Malformed, TextRecord, records
from train.data.sources import sources


def read(path, task="lm", columns=None) -> list[TextRecord | Malformed]:
    return list(records(sources([str(path)]), task, columns or {}))


def words(path, **options) -> list[str]:
    """What is malformed, without the folder."""
    return [str(item).split("/")[-1] for item in read(path, **options) if isinstance(item, Malformed)]


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json.gz"])
def test_a_line_is_a_record_with_its_number(tmp_path, name):
    path = write_lines(tmp_path / name, [{"id": 1, "text": "één"}, b"", b"  ", {"text": "two", "body": "no"}])
    assert read(path) == [TextRecord(("één",), path, 1), TextRecord(("two",), path, 4)]


def test_pairs_come_as_document_and_summary(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [{"highlights": "short", "article": "long"}])
    assert read(path, task="summarize") == [TextRecord(("long", "short"), path, 1)]
    assert read(path, task=None) == [TextRecord(("long", "short"), path, 1)]
    assert read(path) == [TextRecord(("long",), path, 1)]
    assert read(path, columns={"text": "highlights"}) == [TextRecord(("short",), path, 1)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "it is not JSON (Unterminated string starting at, letter 10)"),
        (b"[1, 2]", "it is not a JSON object but list"),
        (b'{"other": "text"}', "it has no column 'text', only 'other'"),
        (b"{}", "it has no column 'text', only an empty object"),
        (b'{"text": 3}', "its column 'text' holds int, not text"),
        (b'{"text": null}', "its column 'text' is empty"),
        (b'{"text": " \\n"}', "its column 'text' is empty"),
        (b'{"text": "a\\u0000b"}', "its column 'text' has a null character"),
        (b'{"text": "a\\ud800b"}', "its column 'text' is not Unicode text: it has half a surrogate pair"),
        (b'{"text": "\xff"}', "it is not UTF-8 text (invalid start byte at byte 11)"),
        (b"[" * 200_000, "it is not JSON ("),
        (b'{"text": ' + b"1" * (sys.get_int_max_str_digits() + 1) + b"}", "it is not JSON ("),
    ],
)
def test_a_malformed_line_is_named_and_the_others_are_read(tmp_path, line, reason):
    path = write_lines(tmp_path / "x.jsonl", [{"text": "one"}, line, {"text": "three"}])
    first, malformed, third = read(path)
    assert (first, third) == (TextRecord(("one",), path, 1), TextRecord(("three",), path, 3))
    assert str(malformed).startswith(f"{path}, line 2: {reason}")
    with pytest.raises(ValueError, match=r"^data\.paths: .*x\.jsonl, line 2: .*--data\.skip-malformed"):
        raise malformed.error()


def test_either_column_of_a_pair_may_be_malformed(tmp_path):
    lines = [{"document": "d", "summary": "s"}, {"document": "d", "summary": ""}, {"summary": "s"}]
    path = write_lines(tmp_path / "x.jsonl", lines)
    assert words(path, task="summarize") == [
        "x.jsonl, line 2: its column 'summary' is empty",
        "x.jsonl, line 3: it has no column 'document', only 'summary'",
    ]


def test_columns_that_are_not_clear_are_refused_with_file_and_line(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [b"{", {"a": "x", "b": "y"}])
    second = read(path)[1]
    assert isinstance(second, Malformed)
    assert re.search(r"x\.jsonl, line 2: none of .* columns a, b: .*--data\.columns text NAME", str(second))
    assert second.asked_for, "it stops the run, and --data.skip-malformed leaves it out"


def test_named_columns_that_are_not_there_are_malformed_lines(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [{"text": "x"}])
    assert words(path, columns={"text": "story"}) == [
        "x.jsonl, line 1: it has no column 'story', only 'text'"
    ]


def test_a_gzip_file_that_is_cut_off_is_reported_after_what_it_still_gives(tmp_path):
    path = write_lines(tmp_path / "x.jsonl.gz", [{"text": f"{i} {hash(str(i))}"} for i in range(5_000)])
    path.write_bytes(path.read_bytes()[:-2_000])
    *good, malformed = read(path)
    assert len(good) > 100
    assert [record.line for record in good] == list(range(1, len(good) + 1))
    assert f"x.jsonl.gz, line {len(good) + 1}: the gzip file is damaged or cut off" in str(malformed)


def test_a_file_that_only_says_it_is_gzip_is_read_as_it_is(tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(b'{"text": "plain"}\n')
    assert read(tmp_path / "x.jsonl.gz") == [TextRecord(("plain",), tmp_path / "x.jsonl.gz", 1)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"one\ntwo\nth\xffree", "x, line 3: it is not UTF-8 text (invalid start byte)"),
        (b"one\ntwo \xe2\x82", "x, line 2: it is not UTF-8 text (unexpected end of data)"),
        (b"one\ntw\0o", "x, line 2: it is not text: it has a null byte"),
        (b"", "x: it is empty"),
        (b" \n ", "x: it is empty"),
    ],
)
def test_a_file_that_is_not_text_is_malformed_and_in_a_folder_too_but_not_asked_for(
    tmp_path, monkeypatch, content, reason
):
    monkeypatch.setattr(module, "PART", 4)  # the fault lies beyond the first part
    (tmp_path / "x").write_bytes(content)
    assert words(tmp_path / "x") == [reason]
    (named,) = read(tmp_path / "x")
    assert isinstance(named, Malformed)
    assert named.asked_for
    assert read(tmp_path) == [replace(named, asked_for=False)]


@given(
    text=st.text(
        st.characters(codec="utf-8", exclude_characters="\0\ufeff{"), min_size=1, max_size=60
    ).filter(str.strip),
    size=st.integers(4, 40),
)
@example(text="a\nbc", size=4)  # a whole part that ends within a line, and nothing after it
def test_parts_of_a_large_file_are_the_file_and_end_with_lines(tmp_path_factory, text, size):
    path = tmp_path_factory.getbasetemp() / "large.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PART", size)
        parts = read(path)
    assert "".join(part.texts[0] for part in parts) == text
    assert [part.part for part in parts] == list(range(len(parts)))
    assert all(part.texts[0] for part in parts)
    if len(parts) > 1 and all(len(line.encode()) < size for line in text.split("\n")):
        assert all(part.texts[0].endswith("\n") for part in parts[:-1])


def test_a_small_file_is_one_record(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"one\r\ntwo")
    assert read(tmp_path / "x.txt") == [TextRecord(("one\r\ntwo",), tmp_path / "x.txt")]


def test_summaries_of_a_text_file_are_refused_with_what_is_needed(tmp_path):
    (tmp_path / "x.txt").write_text("text")
    assert "it is text, and summarize needs pairs" in words(tmp_path, task="summarize")[0]
    with pytest.raises(
        ValueError, match=r"x\.txt is no JSONL: summarize needs pairs .* from JSON lines, CSV"
    ):
        read(tmp_path / "x.txt", task="summarize")


def test_text_may_be_compressed(tmp_path):
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress("één\n".encode()))
    assert read(tmp_path / "x.txt.gz") == [TextRecord(("één\n",), tmp_path / "x.txt.gz")]
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(b"text" * 99)[:-9])
    assert "x.txt.gz: the gzip file is damaged or cut off here" in words(tmp_path / "x.txt.gz")[0]


def test_rows_of_a_saved_dataset_are_records(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the extra hub")
    rows = {"id": [1, 2, 3], "article": ["a", "b", ""], "highlights": ["x", "y", "z"]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "set")
    path = tmp_path / "set"
    first, second, empty = read(path, task="summarize")
    assert (first, second) == (TextRecord(("a", "x"), path, 1), TextRecord(("b", "y"), path, 2))
    assert str(empty) == f"{path}, line 3: its column 'article' is empty"
    with pytest.raises(ValueError, match=r"data\.columns: .*set has no column story, only id, article, high"):
        read(path, columns={"text": "story"})
    datasets.Dataset.from_dict({"text": ["a"], "body": ["b"]}).save_to_disk(tmp_path / "other")
    with pytest.raises(ValueError, match=r"data\.columns: .*other: several .* for text among the columns"):
        read(tmp_path / "other")


def test_a_saved_dataset_without_the_library_names_the_extra(tmp_path, monkeypatch):
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"saved by Hugging Face datasets, .* -e \"\.\[hub\]\""):
        read(tmp_path)
