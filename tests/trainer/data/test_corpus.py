"""The corpus: real files to batches, what is held out, what is counted, and what is refused."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.train_texts import real_text, write_lines
from train.config.operation import Evaluation
from train.config.run import Run
from train.config.sections import Curriculum, Data, Summarize
from train.data.bpe import train_bpe
from train.data.corpus import Corpus, read_corpus


def run(folder: Path, *paths, task="lm", **options) -> Run:
    """A run on the paths; options of data, or records of other sections."""
    sections = {name: options.pop(name) for name in ("evaluation", "summarize", "seed") if name in options}
    named = {"paths": tuple(map(str, paths)), "length": 16, "held_out": 0.2, "cache": str(folder / "cache")}
    return Run(task=task, data=Data(**(named | options)), curriculum=Curriculum(start=4), **sections)


def first(text: Corpus, count: int) -> list:
    iterator = text.batches()
    found = [next(iterator) for _ in range(count)]
    iterator.close()
    return found


def words(rows) -> set[str]:
    """The texts of all segments."""
    found = set()
    for batch in rows:
        for inputs, segments in zip(batch.inputs, batch.segments, strict=True):
            found |= {bytes(inputs[segments == s].tolist()).decode() for s in range(1, segments.max() + 1)}
    return found


@pytest.fixture
def lines(tmp_path) -> Path:
    """Twenty texts of ten letters."""
    return write_lines(tmp_path / "x.jsonl", [{"text": chr(97 + i) * 10} for i in range(20)])


@pytest.fixture
def pairs(tmp_path) -> Path:
    """Ten documents of eight letters with their summaries, of 1, 2, …, 10 words."""
    texts = [chr(97 + i) for i in range(10)]
    records = [{"article": t * 8, "highlights": " ".join([t] * (i + 1))} for i, t in enumerate(texts)]
    return write_lines(tmp_path / "p.jsonl", records)


def test_texts_are_trained_on_or_held_out(tmp_path, lines):
    text = read_corpus(run(tmp_path, lines, evaluation=Evaluation(rows=99)))
    train, held_out = words(first(text, 60)), words(text.held_out)
    assert {word[0] for word in train} | {word[0] for word in held_out} == set("abcdefghijklmnopqrst")
    assert not train & held_out
    assert sum(map(len, held_out)) == pytest.approx(0.2 * 200, abs=2)
    assert (text.size, text.documents, text.tokens, text.malformed) == (200, 20, 220, 0)
    assert (text.bytes_per_token, text.lead_words, list(text.examples)) == (0.9, None, []), (
        "of 10 letters and ends, 9"
    )


def test_one_large_file_is_divided(tmp_path):
    (tmp_path / "x.txt").write_bytes(bytes(range(1, 101)))
    text = read_corpus(run(tmp_path, tmp_path / "x.txt", rows="chunked", evaluation=Evaluation(rows=1)))
    assert sorted(batch.inputs[0, 0] for batch in first(text, 5)) == [1, 17, 33, 49, 65]
    assert [held.inputs[0].tolist() for held in text.held_out] == [list(range(82, 98))]


def test_held_out_files_are_held_out(tmp_path, lines):
    (tmp_path / "held.txt").write_text("HELD")
    text = read_corpus(run(tmp_path, lines, held_out_paths=(str(tmp_path / "held.txt"),)))
    assert words(text.held_out) == {"HELD"}
    assert len(words(first(text, 60))) == 20
    assert (text.size, text.documents) == (204, 21)


def test_summaries_are_read_with_their_documents(tmp_path, pairs):
    text = read_corpus(run(tmp_path, pairs, task="summarize", length=32, evaluation=Evaluation(rows=99)))
    examples = [(chr(97 + i) * 8, " ".join([chr(97 + i)] * (i + 1))) for i in range(10)]
    assert len(text.examples) == 2
    assert set(text.examples) < set(examples)
    assert words(text.held_out) == {f"{d}\0{s}" for d, s in text.examples}
    train = [pair for pair in examples if pair not in set(text.examples)]
    assert words(first(text, 40)) == {f"{d}\0{s}" for d, s in train}
    assert (text.truncated, text.documents) == (0, 10)
    assert list(text.examples[1:]) == [text.examples[1]]


def test_lead_words_are_those_of_training_summaries(tmp_path, pairs):
    found = set()
    for seed in range(8):
        text = read_corpus(run(tmp_path, pairs, task="summarize", length=32, held_out=0.4, seed=seed))
        held_out = {len(summary.split()) for _, summary in text.examples}
        assert text.lead_words == int(np.median(sorted({*range(1, 11)} - held_out)))
        found.add(text.lead_words)
    assert len(found) > 1


def spelled(text, batch) -> list[bytes]:
    """The bytes that the scored targets of each row spell, by the tokenizer's own decoding."""
    return [
        text.tokenizer.decode(targets[weights > 0]).encode()
        for targets, weights in zip(batch.targets, batch.weights, strict=True)
    ]


def test_bytes_of_targets_are_those_of_what_is_scored(tmp_path, pairs):
    (tmp_path / "x.txt").write_text("a a a a a a a a a a " * 50 + "xyz")
    train_bpe([str(tmp_path / "x.txt")], 260, {}, tmp_path / "bpe.json")
    named = {"tokenizer": str(tmp_path / "bpe.json")}
    for text in (
        read_corpus(run(tmp_path, tmp_path / "x.txt", **named)),
        read_corpus(run(tmp_path, pairs, task="summarize", length=64, **named)),
    ):
        for batch in [*text.held_out, next(text.batches())]:
            counted = np.where(batch.weights > 0, batch.target_bytes, 0).sum(axis=1)
            assert counted.tolist() == list(map(len, spelled(text, batch)))


def test_long_documents_are_refused_or_cut_and_counted(tmp_path, pairs):
    asked = run(tmp_path, pairs, task="summarize", length=24)
    with pytest.raises(
        ValueError, match=r"data\.length: 2 of 10 examples .*p\.jsonl, line 9: a document of 8 "
    ):
        read_corpus(asked)
    text = read_corpus(replace(asked, summarize=Summarize(truncate=True)))
    assert text.truncated == 2
    assert "jjjj\0" + " ".join("j" * 10) in words([*first(text, 40), *text.held_out])


def test_malformed_lines_are_counted(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [{"text": "a" * 20}, b"{", {"text": "b" * 20}])
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2"):
        read_corpus(run(tmp_path, path))
    text = read_corpus(run(tmp_path, path, skip_malformed=True))
    assert (text.malformed, text.documents, len(text.reports)) == (1, 2, 1)


def test_the_fingerprint_changes_with_the_text_and_with_its_order(tmp_path, lines):
    asked = run(tmp_path, lines)
    one = read_corpus(asked).fingerprint
    assert read_corpus(replace(asked, folder="elsewhere", steps=7)).fingerprint == one
    lines.touch()
    assert read_corpus(asked).fingerprint == one
    others = {
        read_corpus(replace(asked, seed=1)).fingerprint,
        read_corpus(replace(asked, data=replace(asked.data, length=17))).fingerprint,
        read_corpus(replace(asked, data=replace(asked.data, held_out=0.3))).fingerprint,
    }
    write_lines(lines, [{"text": chr(97 + i) * 10} for i in reversed(range(20))])
    assert len(others | {read_corpus(asked).fingerprint, one}) == 5


def test_runs_of_several_seeds_hold_out_the_same_rows(tmp_path, lines):
    for kind in ("packed", "chunked"):
        options = {"held_out_seed": 5, "rows": kind, "batch": 2, "evaluation": Evaluation(rows=2)}
        one, two = (read_corpus(run(tmp_path, lines, seed=seed, **options)) for seed in (1, 2))
        own = read_corpus(run(tmp_path, lines, seed=1, **(options | {"held_out_seed": None})))
        assert one.held_out[0].inputs.tolist() == two.held_out[0].inputs.tolist()
        assert one.held_out[0].inputs.tolist() != own.held_out[0].inputs.tolist()
        assert [b.inputs.tolist() for b in first(one, 4)] != [b.inputs.tolist() for b in first(two, 4)]
        assert len({one.fingerprint, two.fingerprint, own.fingerprint}) == 3


def test_the_cache_lies_beside_the_run_folders(tmp_path, lines):
    asked = run(tmp_path, lines)
    read_corpus(replace(asked, folder=str(tmp_path / "runs"), data=replace(asked.data, cache=None)))
    assert len(list((tmp_path / "runs" / "cache").iterdir())) == 1


def test_the_default_text_is_the_standard_library(tmp_path):
    text = read_corpus(run(tmp_path, length=512))
    assert text.size > 5_000_000
    assert "def " in "".join(words(text.held_out))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "summarize"}, r"data\.paths: summarize needs pairs of document and summary"),
        ({"columns": {"summary": "s"}}, r"data\.columns: the task lm reads text, got a column for summary"),
        ({"tokenizer": "none.json"}, r"data\.tokenizer: none\.json does not exist"),
        ({"held_out_paths": ("none.txt",)}, r"data\.held_out_paths: none\.txt does not exist"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        read_corpus(run(tmp_path, **({"batch": 2} | options)))


def test_text_that_is_trained_on_is_not_held_out(tmp_path, lines):
    with pytest.raises(ValueError, match=r"data\.held_out_paths: .*x\.jsonl is in data\.paths too"):
        read_corpus(run(tmp_path, tmp_path, held_out_paths=(str(lines),)))


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (
            1,
            {},
            r"data\.paths has too little text to hold out: 0 tokens with data\.held_out = 0\.05, and .* 2",
        ),
        (
            2,
            {"held_out": 0.5},
            r"data\.paths has too little text to train on: 0 tokens with data\.held_out = 0\.5, and .* 2",
        ),
        (
            99,
            {"rows": "chunked"},
            r"too little text to hold out: 5 tokens with .*, and a row needs data\.length \+ 1 = 17",
        ),
        (
            99,
            {"rows": "chunked", "length": 95},
            r"to train on: 95 tokens with .* data\.length \+ 1 = 96",
        ),
    ],
)
def test_too_little_text_is_refused_with_what_is_needed(tmp_path, size, options, message):
    (tmp_path / "x.txt").write_text("x" * size)
    with pytest.raises(ValueError, match=message):
        read_corpus(run(tmp_path, tmp_path / "x.txt", **({"held_out": 0.05} | options)))


def test_rows_of_real_text_are_filled(tmp_path):
    path = real_text("peps.jsonl.gz")
    text = read_corpus(run(tmp_path, path, length=8_192, batch=4, columns={"text": "document"}))
    real = np.mean([(batch.segments > 0).mean() for batch in first(text, 64)])
    assert text.documents == 539
    assert real >= 0.95


def test_long_meetings_need_no_cutting_at_32k(tmp_path):
    path = real_text("qmsum_ami_icsi.jsonl.gz")
    train_bpe([path], 8_192, {}, tmp_path / "bpe.json")
    named = {"tokenizer": str(tmp_path / "bpe.json"), "length": 32_768, "held_out": 0.15}
    text = read_corpus(run(tmp_path, path, task="summarize", **named))
    assert (text.documents, len(text.examples), text.truncated) == (196, 29, 0)
    assert text.lead_words is not None
    assert 80 < text.lead_words < 140
    (batch,) = first(text, 1)
    assert math.isclose(batch.weights.sum(), (batch.positions >= 32_768).sum())
