"""What files hold is found in them: text is not all that decodes."""

import gzip
import json
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from train_cases import small_run

from train.config.sections import Data
from train.data.corpus import read_corpus
from train.data.file_kinds import kind_of
from train.data.records import Malformed, TextRecord, records
from train.data.sources import sources

BOM = b"\xef\xbb\xbf"
ROW = b'{"text": "one"}\n'


def gzipped(content: bytes) -> bytes:
    """`content` compressed, the same at every call: its time would be in the test's name."""
    return gzip.compress(content, mtime=0)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize(
    ("name", "content", "kind", "reason"),
    [
        ("c4.json", ROW * 2, "lines", ""),
        ("c4.json", ROW, "lines", ""),
        ("c4.ndjson", ROW * 2, "lines", ""),
        ("c4.JSONL", b"", "lines", ""),
        ("c4.jsonl", BOM + ROW, "lines", ""),
        ("log.txt", b"\n" + ROW * 2, "lines", ""),
        ("long", b'{"text": "' + b"x" * 100_000 + b'"}\n', "lines", ""),
        ("second", ROW + b'{"text": "' + b"x" * 100_000 + b'"}\n', "lines", ""),
        ("c4.JSON.GZ", gzipped(ROW), "lines", ""),
        ("unnamed", gzipped(ROW * 2), "lines", ""),
        ("x.txt.gz", gzipped(b"text"), "text", ""),
        ("x.csv", b"text\none\n", "table", ""),
        ("x.TSV.gz", gzipped(b"text\none\n"), "table", ""),
        ("x.py", b"{'a': 1}\n", "text", ""),
        ("x.c", b"{\n  return;\n}\n", "text", ""),
        ("x.txt", ROW + b"and more\n", "text", ""),
        ("x.txt", BOM + b"text", "text", ""),
        ("x.txt", b"", "text", ""),
        ("array.json", json.dumps([{"text": "one"}]).encode(), None, "no object a line: jq -c"),
        ("pretty.json", json.dumps({"text": "one"}, indent=1).encode(), None, "no object a line"),
        ("data.txt", POINTER, None, "a Git LFS pointer, not the data: git lfs pull"),
        ("train.jsonl", POINTER, None, "a Git LFS pointer"),
        ("x.parquet", b"PAR1....PAR1", None, "it is Parquet: save it as JSON lines"),
        ("x.txt.zst", b"\x28\xb5\x2f\xfd..", None, "compressed with zstd"),
        ("x.pdf", b"%PDF-1.7", None, "it is PDF: save its text"),
        ("x.txt", "text".encode("utf-16"), None, "it is UTF-16: iconv"),
        ("x.txt", "text".encode("utf-32"), None, "it is UTF-32: iconv"),
        ("x.txt", b"PAR1 is a receptor, and %PDF a format; BZhello", "text", ""),
        ("x.txt", b"BZhello", "text", ""),
        ("x.txt", b"%PDF is a format", "text", ""),
        ("app.log.txt", b'{"level": 1}\n{"level": 2}\nand text\n', "text", ""),
        ("app.log.txt", b'{"level": 1}\n', "text", ""),
        ("x.json.gz", gzipped(b'[{"text": "one"}]'), None, "no object a line"),
        ("x.jsonl.gz", ROW, "lines", ""),
    ],
)
def test_a_file_is_what_it_holds(tmp_path, name, content, kind, reason):
    (tmp_path / name).write_bytes(content)
    found, said = kind_of(tmp_path / name, named=True)
    assert found == kind
    assert reason in (said or "")


@pytest.mark.parametrize(
    "name", ["README.md", "readme", "dataset_infos.json", "LICENSE", "dataset_info.json"]
)
def test_what_describes_data_is_read_where_it_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(ROW * 2)
    assert kind_of(tmp_path / name, named=False) == (None, "it describes data: give its name to read it")
    assert kind_of(tmp_path / name, named=True) == ("lines", None)


def read(path, task="lm") -> list[TextRecord | Malformed]:
    return list(records(sources([str(path)]), task, {}))


def texts(path, task="lm") -> list:
    return [item.texts if isinstance(item, TextRecord) else item.reason for item in read(path, task)]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "x.txt").write_bytes(BOM + b"one")
    (tmp_path / "x.jsonl").write_bytes(BOM + ROW + ROW)
    (tmp_path / "x.csv").write_bytes(BOM + b"text,id\none,1\n")
    assert texts(tmp_path) == [("one",)] * 4


def test_records_have_columns_of_their_own(tmp_path):
    rows = [{"id": 1}, {"text": "one"}, {"content": "two"}, {"content": "no", "text": "three"}, {"id": 2}]
    (tmp_path / "x.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, *others = texts(tmp_path)
    assert "none of the usual names for text among the columns id" in first
    assert others[:3] == [("one",), ("two",), ("no",)]
    assert "none of the usual names" in others[3]


def test_tables_are_rows_by_the_names_of_their_first_line(tmp_path):
    (tmp_path / "x.csv").write_text('id,article,summary\n1,"a, ""long""\ntext",short\n2,one\n3,two,2\n')
    assert texts(tmp_path / "x.csv", "summarize") == [
        ('a, "long"\ntext', "short"),
        "it has not the 3 columns of the first line",
        ("two", "2"),
    ]
    long = "long " * 100_000
    (tmp_path / "long.csv").write_text(f"text\n{long}\n")
    assert texts(tmp_path / "long.csv") == [(long,)]
    (tmp_path / "x.tsv").write_text('text\tid\n"Hello" she said\t1\n')
    assert texts(tmp_path / "x.tsv") == [('"Hello" she said',)]
    (tmp_path / "open.csv").write_text('text,id\none,1\n"two,2\n' + "three,3\n" * 9)
    lost = str(read(tmp_path / "open.csv")[-1])
    assert "open.csv, line 3: it is no row of a table (unexpected end of data)" in lost
    assert lost.endswith("; a quote is open, and the rest is lost")
    assert texts(tmp_path / "open.csv")[0] == ("one",)


def test_files_without_a_row_are_empty(tmp_path):
    for name, content in (("a.jsonl", ""), ("b.ndjson", "\n\n"), ("c.csv", "text,id\n"), ("d.txt", "")):
        (tmp_path / name).write_text(content)
    assert texts(tmp_path) == ["it is empty"] * 4


def test_globs_leave_out_what_folders_do(tmp_path):
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").symlink_to(tmp_path / "a.txt")
    assert texts(f"{tmp_path}/*") == [
        "it describes data: give its name to read it",
        ("text",),
        f"it is a link to {tmp_path}/a.txt",
    ]


def test_an_empty_row_among_others_stops_nothing_and_is_counted(tmp_path):
    lines = ROW * 20 + b'{"text": ""}\n' + ROW * 20
    (tmp_path / "x.jsonl").write_bytes(lines)
    run = small_run(tmp_path, data=Data(paths=(str(tmp_path / "x.jsonl"),), length=8, batch=1))
    corpus = read_corpus(run)
    assert (corpus.documents, corpus.malformed) == (40, 1)
    assert corpus.reports[0].endswith("x.jsonl, line 21: its column 'text' is empty")


def test_a_run_opens_with_what_was_found_and_what_was_left_out(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "bom.txt").write_bytes(BOM + b"Once upon a time\nthere was a text.\n" * 3)
    for name in ("a.json", "b.ndjson", "c.JSONL"):
        (folder / name).write_bytes(ROW * 4)
    (folder / "d.json.gz").write_bytes(gzipped(ROW * 4))
    (folder / "e.txt").write_bytes(POINTER)
    (folder / "README.md").write_text("# Data\n")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "f.txt").write_text("linked text\n")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "empty.txt").write_text("")
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0")
    corpus = read_corpus(small_run(tmp_path, data=Data(paths=(str(folder),), length=8, batch=1)))
    assert corpus.description.replace(str(folder), "data").splitlines() == [
        "Texts: 4 files of JSON lines, 2 text files; 18 documents, 165 bytes, 183 tokens.",
        "The first begins: one",
        "Left out: 4",
        "  data/README.md: it describes data: give its name to read it",
        "  data/e.txt: it is a Git LFS pointer, not the data: git lfs pull gets that",
        "  data/empty.txt: it is empty",
        "  data/picture.png, line 1: it is not UTF-8 text (invalid start byte)",
    ]


def test_a_tokenizer_that_cannot_spell_the_text_is_refused_or_its_share_said(tmp_path):
    from tokenizers import Tokenizer, models

    library = Tokenizer(models.BPE(unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.train_from_iterator(["abc"], BpeTrainer(special_tokens=["<unk>", "<eos>"], show_progress=False))
    library.save(str(tmp_path / "letters.json"))
    (tmp_path / "x.txt").write_text("abc 狐狸\n" * 20, encoding="utf-8")
    data = Data(paths=(str(tmp_path / "x.txt"),), tokenizer=str(tmp_path / "letters.json"), length=8, batch=1)
    with pytest.raises(
        ValueError, match=r"cannot spell 66\.7% of the text of data\.paths, and data\.unknown allows 5\.0%"
    ):
        read_corpus(small_run(tmp_path, data=data))
    corpus = read_corpus(small_run(tmp_path, data=replace(data, unknown=0.7)))
    assert corpus.unknown == pytest.approx(2 / 3)
    assert "66.67% of the text unknown to the tokenizer" in corpus.description
    rows = [next(corpus.batches()), *corpus.held_out]
    spelled = np.concatenate([batch.target_bytes[batch.weights > 0] for batch in rows])
    assert set(spelled) == {0, 3}, "unknown letters are no bytes that were predicted"


def test_without_an_unknown_token_letters_are_dropped_and_counted_too(tmp_path):
    library = Tokenizer(models.BPE())
    library.train_from_iterator(["abc"], BpeTrainer(special_tokens=["<eos>"], show_progress=False))
    library.save(str(tmp_path / "letters.json"))
    (tmp_path / "x.txt").write_text("abcж" * 20, encoding="utf-8")
    data = Data(paths=(str(tmp_path / "x.txt"),), tokenizer=str(tmp_path / "letters.json"), length=8, batch=1)
    with pytest.raises(ValueError, match=r"cannot spell 40\.0% of the text"):
        read_corpus(small_run(tmp_path, data=data))
