"""Text in, rows out: the same ones for the same seed, and none where there is too little text."""

import numpy as np
import pytest

from train.config import Data
from train.data import corpus, files_below, held_out_rows, standard_library


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "a.txt").write_text("a" * 300)
    (tmp_path / "inner" / "b.md").write_text("b" * 300)
    (tmp_path / ".hidden" / "c.txt").write_text("c" * 300)
    (tmp_path / "binary").write_bytes(b"\xff\xfe" * 300)
    (tmp_path / "empty.txt").write_text("")
    return tmp_path


def small(*paths, **options) -> Data:
    return Data(paths=tuple(map(str, paths)), **({"length": 16, "held_out": 0.2} | options))


def test_a_row_overlaps_the_next_by_one_token(tmp_path):
    (tmp_path / "digits.txt").write_bytes(bytes(range(1, 101)))
    text = corpus(small(tmp_path / "digits.txt"), seed=0)
    rows = sorted(text.train[i][0].tolist() for i in range(4))
    # 80 bytes to train on hold 4 rows of 16 targets; the first token of each is the last target before.
    assert rows == [list(range(first, first + 17)) for first in (1, 17, 33, 49)]
    assert [row.tolist() for row in held_out_rows(text.held_out, 9)] == [[list(range(81, 98))]]


def test_folders_are_searched_through_and_what_is_not_text_is_left_out(folder):
    text = corpus(small(folder), seed=0)
    assert text.size == 300 + 1 + 300
    tokens = {int(token) for i in range(40) for token in np.unique(text.train[i])}
    assert tokens <= {0, ord("a"), ord("b")}


def test_documents_are_ordered_by_the_seed_and_parted_by_a_separator(folder):
    def first_letters(seed):
        rows = held_out_rows(corpus(small(folder), seed).held_out, 1)
        return chr(rows[0][0, 0])

    assert {first_letters(seed) for seed in range(8)} == {"a", "b"}
    assert [first_letters(3) for _ in range(3)] == [first_letters(3)] * 3


def test_a_batch_is_a_function_of_seed_and_step(folder):
    one, same, other = (corpus(small(folder, batch=2), seed) for seed in (0, 0, 1))
    assert one.train[0].shape == (2, 17)
    assert one.train[0].dtype == np.int32
    order = [7, 3, 100]
    backwards = {i: same.train[i] for i in reversed(order)}
    for i in order:
        np.testing.assert_array_equal(one.train[i], backwards[i])
    assert any((one.train[i] != other.train[i]).any() for i in range(20))


def test_an_epoch_reads_every_row_once_and_the_next_in_another_order(tmp_path):
    (tmp_path / "text").write_bytes(bytes(range(1, 121)))
    text = corpus(small(tmp_path / "text", length=4), seed=0)
    firsts = [int(text.train[i][0, 0]) for i in range(46)]
    assert sorted(firsts[:23]) == sorted(firsts[23:]) == list(range(1, 93, 4))
    assert firsts[:23] != firsts[23:]


def test_held_out_rows_are_spread_evenly(folder):
    rows = corpus(small(folder, held_out=0.5), seed=0).held_out
    assert len(rows) == 18
    chosen = held_out_rows(rows, 3)
    for row, i in zip(chosen, (0, 6, 12), strict=True):
        np.testing.assert_array_equal(row, rows[i][None])


def test_the_default_text_is_the_standard_library_without_its_tests():
    files = standard_library()
    assert {"dataclasses.py", "argparse.py"} <= {file.name for file in files}
    assert not [file for file in files if {"test", "site-packages"} & set(file.parts)]


def test_files_of_a_folder_are_sorted_and_hidden_ones_left_out(folder):
    names = [str(file.relative_to(folder)) for file in files_below(folder)]
    assert names == ["a.txt", "binary", "empty.txt", "inner/b.md"]


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.paths: .*nowhere\.txt does not exist"):
        corpus(small(tmp_path / "nowhere.txt"), seed=0)


def test_a_named_file_that_is_not_text_is_refused(folder):
    with pytest.raises(ValueError, match=r"data\.paths: .*binary is not text: it is not UTF-8"):
        corpus(small(folder / "binary"), seed=0)


def test_a_named_file_with_a_null_byte_is_refused(tmp_path):
    (tmp_path / "null").write_bytes(b"text\0text" * 100)
    with pytest.raises(ValueError, match=r"data\.paths: .*null is not text: it has null bytes"):
        corpus(small(tmp_path / "null"), seed=0)


def test_a_corpus_without_text_is_refused(folder):
    with pytest.raises(ValueError, match=r"data\.paths has no text: .*empty\.txt"):
        corpus(small(folder / "empty.txt"), seed=0)


@pytest.mark.parametrize(
    ("length", "words"),
    [
        (16, r"too little text to hold out: 5 bytes of 100, and a row needs data\.length \+ 1 = 17"),
        (96, r"too little text to train on: 95 bytes of 100, and a row needs data\.length \+ 1 = 97"),
    ],
)
def test_too_little_text_is_refused_with_what_is_needed(tmp_path, length, words):
    (tmp_path / "short.txt").write_text("x" * 100)
    with pytest.raises(ValueError, match=words):
        corpus(small(tmp_path / "short.txt", length=length, held_out=0.05), seed=0)
