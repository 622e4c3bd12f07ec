"""The token cache: what was read is what is mapped, found again, and never half there."""

import errno
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.train_texts import write_lines
from train.data import records, token_cache, token_writer
from train.data.bpe import train_bpe
from train.data.sources import sources
from train.data.token_cache import TokenCache
from train.data.tokenizers import END, load_tokenizer
from train.data.words import word_count

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12).filter(
    str.strip
)


def made(*paths: Path, cache: Path | None = None, task="lm", columns=None, **options) -> TokenCache:
    found = sources([str(path) for path in paths])
    tokenizer = options.pop("tokenizer", load_tokenizer("bytes"))
    folder = cache or paths[0].parent / "cache"
    return token_cache.token_cache(found, task, columns or {}, tokenizer, folder, **options)


def texts(cache: TokenCache) -> list[bytes]:
    return [bytes(cache.tokens[a:b].tolist()) for a, b in zip(cache.starts, cache.stops, strict=True)]


@given(lines=st.lists(WORDS, min_size=1, max_size=20), batch=st.integers(1, 5))
def test_each_text_is_its_bytes_and_an_end(tmp_path_factory, lines, batch):
    folder = tmp_path_factory.mktemp("law")
    path = write_lines(folder / "x.jsonl", [{"text": line} for line in lines])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_writer, "BATCH_RECORDS", batch)
        cache = made(path)
    assert texts(cache) == [line.encode() + b"\0" for line in lines]
    assert cache.size == sum(len(line.encode()) for line in lines)
    assert not cache.pairs
    assert cache.origin(len(lines) - 1) == f"{path}, line {len(lines)}"


@given(lines=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=10))
def test_each_pair_is_document_end_summary_end_and_its_texts(tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("law")
    path = write_lines(folder / "x.jsonl", [{"document": d, "summary": s} for d, s in lines])
    cache = made(path, task="summarize")
    assert texts(cache) == [f"{d}\0{s}\0".encode() for d, s in lines]
    assert [cache.pair(i) for i in range(len(lines))] == lines
    assert cache.bodies.tolist() == [len(d.encode()) for d, _ in lines]
    assert cache.summary_words.tolist() == [word_count(s) for _, s in lines]
    summaries = sum(len(s.encode()) for _, s in lines)
    assert cache.size == summaries + sum(len(d.encode()) for d, _ in lines)


def test_files_and_the_parts_of_large_ones_are_documents_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "PART", 8)
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("one\ntwo\nthree\nfour is long")
    (folder / "b.bin").write_bytes(b"\xff")
    (folder / "c.txt").write_text("é")
    write_lines(folder / "d.jsonl", [{"text": "six"}])
    cache = made(folder)
    assert texts(cache) == [b"one\ntwo\nthree\nfour is long\0", "é\0".encode(), b"six\0"]
    assert cache.bodies.tolist() == [len(text) - 1 for text in texts(cache)]
    assert [cache.origin(i) for i in range(3)] == [
        str(folder / "a.txt"),
        str(folder / "c.txt"),
        f"{folder / 'd.jsonl'}, line 1",
    ]


def test_tokens_take_as_many_bytes_as_the_vocabulary_needs(tmp_path):
    (tmp_path / "x.txt").write_text("the mask shows the keys " * 20)
    bpe = train_bpe([str(tmp_path / "x.txt")], 280, {}, tmp_path / "bpe.json")
    assert made(tmp_path / "x.txt").tokens.dtype == np.uint8
    cache = made(tmp_path / "x.txt", tokenizer=bpe)
    assert cache.tokens.dtype == np.uint16
    assert bpe.decode(cache.tokens) == "the mask shows the keys " * 20
    assert cache.tokens[-1] == bpe.end


def test_the_tokens_are_mapped_not_read(tmp_path):
    (tmp_path / "x.txt").write_text("text")
    cache = made(tmp_path / "x.txt")
    assert isinstance(cache.tokens, np.memmap)
    assert not cache.tokens.flags.writeable


def test_a_cache_is_written_once_and_found_again(tmp_path, monkeypatch):
    (tmp_path / "x.txt").write_text("text")
    first = made(tmp_path / "x.txt")
    monkeypatch.setattr(token_cache, "write", None)  # whoever writes now fails
    assert made(tmp_path / "x.txt").fingerprint == first.fingerprint
    os.utime(tmp_path / "x.txt", ns=(1, 1))
    with pytest.raises(TypeError):
        made(tmp_path / "x.txt")


@pytest.mark.parametrize("change", ["columns", "task", "tokenizer", "skip", "size", "file"])
def test_another_question_has_another_cache(tmp_path, change):
    path = write_lines(tmp_path / "x.jsonl", [{"text": "a", "document": "b", "summary": "c"}])
    (tmp_path / "y.txt").write_text("the the the")
    bpe = train_bpe([str(tmp_path / "y.txt")], 258, {}, tmp_path / "bpe.json")
    asked = {"task": "lm", "columns": {"text": "text"}}
    made(path, **asked)
    if change == "size":
        write_lines(path, [{"text": "aa", "document": "b", "summary": "c"}])
    other = {
        "columns": {"columns": {"text": "summary"}},
        "task": {"task": "summarize", "columns": {"document": "document"}},
        "tokenizer": {"tokenizer": bpe},
        "skip": {"skip_malformed": True},
    }
    paths = [path, tmp_path / "y.txt"] if change == "file" else [path]
    made(*paths, **(asked | other.get(change, {})))
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_fingerprint_is_of_the_tokens_and_where_documents_end(tmp_path):
    def fingerprint(name, *lines, task="lm"):
        return made(write_lines(tmp_path / name, lines), task=task).fingerprint

    pair = {"document": "ab", "summary": "c"}
    one = fingerprint("a.jsonl", {"text": "ab"}, {"text": "c"})
    assert fingerprint("b.jsonl", b"", {"text": "ab", "id": 1}, {"text": "c"}) == one
    assert fingerprint("c.jsonl", {"text": "ab"}, {"text": "d"}) != one
    assert fingerprint("d.jsonl", pair, task="summarize") != one  # the same tokens, one document
    assert fingerprint("e.jsonl", {"text": "c"}, {"text": "ab"}) != one


def test_malformed_lines_stop_the_reading_or_are_counted(tmp_path):
    lines = [{"text": "one"}, b"{", {"text": "two"}, *[b"{}"] * 9]
    path = write_lines(tmp_path / "x.jsonl", lines)
    with pytest.raises(ValueError, match=r"^data\.paths: .*x\.jsonl, line 2: .*--data\.skip-malformed"):
        made(path)
    assert list((tmp_path / "cache").iterdir()) == []
    for _ in range(2):  # made, and found
        cache = made(path, skip_malformed=True)
        assert texts(cache) == [b"one\0", b"two\0"]
        assert cache.malformed == 10
        (report,) = cache.reports
        assert re.search(r"x\.jsonl, line 2: it is not JSON .*; and 9 more in this file$", report)


def test_of_files_with_something_left_out_each_is_a_line_whole_files_first(tmp_path, monkeypatch):
    monkeypatch.setattr(token_writer, "REPORTS", 2)
    (tmp_path / "texts").mkdir()
    write_lines(tmp_path / "texts" / "a.jsonl", [{"text": "one"}, *[{"text": ""}] * 20])
    (tmp_path / "texts" / "b.txt").write_text("")
    write_lines(tmp_path / "texts" / "c.jsonl", [])
    cache = made(tmp_path / "texts")
    assert cache.malformed == 22
    assert [report.split("/")[-1] for report in cache.reports] == [
        "b.txt: it is empty",
        "c.jsonl: it is empty",
        "and in 1 more files",
    ]


def test_what_is_left_out_may_change_or_lead_nowhere(tmp_path):
    """A link to nothing cannot be looked at, and a hidden file that changes changes no text."""
    folder = tmp_path / "texts"
    folder.mkdir()
    write_lines(folder / "a.jsonl", [{"text": "one"}])
    (folder / "gone.txt").symlink_to(folder / "nothing")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / ".git").write_text("1")
    first = made(folder)
    (folder / ".git").write_text("more")
    made(folder)
    assert first.malformed == 3
    assert len([each for each in (tmp_path / "cache").iterdir() if not each.name.startswith(".")]) == 1


def test_files_of_a_folder_that_are_no_text_are_counted_and_stop_nothing(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    (tmp_path / "texts" / "b.txt").write_bytes("é".encode("latin-1"))
    cache = made(tmp_path / "texts")
    assert (len(cache.documents), cache.malformed) == (1, 1)
    assert "b.txt, line 1: it is not UTF-8 text" in cache.reports[0]


def test_no_text_is_refused(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [b"{"])
    with pytest.raises(
        ValueError, match=r"data\.paths has no text: .*x\.jsonl; 1 files or lines are left out: .*line 1"
    ):
        made(path, skip_malformed=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"data\.paths has no text: the folders are empty"):
        made(tmp_path / "empty")
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_end_token_that_text_can_hold_is_refused(tmp_path):
    (tmp_path / "x.txt").write_text("the end")
    train_bpe([str(tmp_path / "x.txt")], 257, {}, tmp_path / "bpe.json")
    letter = load_tokenizer(str(tmp_path / "bpe.json"), "d")
    with pytest.raises(ValueError, match=r"data\.end_token: the text of .*x\.txt holds the end token"):
        made(tmp_path / "x.txt", tokenizer=letter)
    assert letter.end != load_tokenizer(str(tmp_path / "bpe.json"), END).end


def test_files_that_change_while_they_are_read_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "x.txt"
    path.write_text("text")
    encoded = token_cache.encode_records

    def slow(*arguments):
        yield from encoded(*arguments)
        path.write_text("other text")

    monkeypatch.setattr(token_cache, "encode_records", slow)
    with pytest.raises(OSError, match=r"data\.paths: files changed while they were read"):
        made(path)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    class Full:
        def __init__(self, file):
            self._file = file

        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def __getattr__(self, name):
            return getattr(self._file, name)

    enter = token_writer._Writer.__enter__

    def entered(writer):
        enter(writer)
        writer._files = {name: Full(file) for name, file in writer._files.items()}
        return writer

    monkeypatch.setattr(token_writer._Writer, "__enter__", entered)
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(OSError, match=r"data\.cache: tokens cannot be written to .*No space left on device"):
        made(tmp_path / "x.txt")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_is_no_folder_is_named(tmp_path):
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(OSError, match=r"data\.cache: tokens cannot be written to .*x\.txt"):
        made(tmp_path / "x.txt", cache=tmp_path / "x.txt")


@pytest.mark.parametrize(
    ("file", "content", "fault"),
    [
        ("tokens.bin", b"te", r"tokens\.bin has 2 bytes, not 5"),
        ("tokens.bin", None, r"it has no whole facts\.json, or a file is missing"),
        ("facts.json", b'{"tokens"', r"it has no whole facts\.json"),
        ("facts.json", None, r"it has no whole facts\.json"),
    ],
)
def test_a_damaged_cache_is_refused(tmp_path, file, content, fault):
    (tmp_path / "x.txt").write_text("text")
    made(tmp_path / "x.txt")
    (path,) = (tmp_path / "cache").glob(f"*/{file}")
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"data\.cache: .* is damaged, {fault}.*: delete it, and it is made"
    ):
        made(tmp_path / "x.txt")


KILLED = """
import os, sys
from pathlib import Path
from train.data import token_cache
from train.data.sources import sources
from train.data.tokenizers import load_tokenizer
encoded = token_cache.encode_records
def cut(*arguments):
    yield next(encoded(*arguments))
    os.kill(os.getpid(), 9)
token_cache.encode_records = cut
token_cache.token_cache(sources([sys.argv[1]]), "lm", {}, load_tokenizer("bytes"), Path(sys.argv[2]))
"""


def test_what_a_killed_process_leaves_is_not_read_and_later_taken_away(tmp_path):
    path, folder = write_lines(tmp_path / "x.jsonl", [{"text": "one"}, {"text": "two"}]), tmp_path / "cache"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path), str(folder)], check=False)
    assert killed.returncode == -9
    (left,) = folder.glob(".unfinished-*")
    assert texts(made(path)) == [b"one\0", b"two\0"]
    assert left.exists()  # another process might be at it
    for written in [left, *left.iterdir()]:
        os.utime(written, (time.time() - token_cache.ABANDONED - 60,) * 2)
    os.utime(path)
    made(path)
    assert not left.exists()


def test_two_processes_may_make_the_same_cache_where_there_are_no_locks(tmp_path, monkeypatch):
    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(token_cache.fcntl, "flock", no_locks)
    path = write_lines(tmp_path / "x.jsonl", [{"text": "one"}, {"text": "two"}])
    encoded = token_cache.encode_records

    def beaten(*arguments):
        """The other process begins and finishes while this one reads."""
        monkeypatch.setattr(token_cache, "encode_records", encoded)
        made(path)
        return encoded(*arguments)

    monkeypatch.setattr(token_cache, "encode_records", beaten)
    assert texts(made(path)) == [b"one\0", b"two\0"]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_of_those_that_want_the_same_cache_at_once_one_makes_it(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("some text")
    write, begun, writes = token_cache.write, threading.Event(), []

    def slow(*arguments):
        writes.append(threading.current_thread())
        begun.set()
        time.sleep(0.2)  # the others come meanwhile
        write(*arguments)

    monkeypatch.setattr(token_cache, "write", slow)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(made, tmp_path / "a.txt")
        begun.wait()
        others = [pool.submit(made, tmp_path / "a.txt") for _ in range(2)]
        assert {each.result().fingerprint for each in (first, *others)} == {first.result().fingerprint}
    assert len(writes) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1
