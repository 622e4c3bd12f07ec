"""Tokenizers: text comes back, no text spells the end token, and what is no tokenizer is refused."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.train_texts import real_text, write_lines
from train.data.bpe import train_bpe
from train.data.records import TextRecord, records
from train.data.sources import sources
from train.data.tokenizers import END, Bytes, Tokenizer, load_tokenizer

TEXT = "the mask grows, and the query sees the keys that the mask shows; it's 1234 tokens\n\n" * 20
ANY_TEXT = st.text(st.characters(codec="utf-8"), max_size=80)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A text, a BPE made for it, and a sentencepiece model made for it."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "text.txt").write_text(TEXT)
    train_bpe([str(folder / "text.txt")], 300, {}, folder / "bpe.json")
    return folder


@pytest.fixture(scope="module")
def bpe(folder) -> Tokenizer:
    return load_tokenizer(str(folder / "bpe.json"))


@pytest.fixture(scope="module")
def pieces(folder) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs the extra hub")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=model,
        vocab_size=320,
        byte_fallback=True,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    (folder / "pieces.model").write_bytes(model.getvalue())
    return folder / "pieces.model"


def altered(source: Path, name: str, change) -> str:
    """The path of a tokenizer.json with `change` made to what it holds."""
    content = json.loads(source.read_text())
    change(content)
    (source.parent / name).write_text(json.dumps(content))
    return str(source.parent / name)


@given(ANY_TEXT.filter(lambda text: "\0" not in text))
def test_bytes_give_any_text_back(text):
    tokenizer = load_tokenizer("bytes")
    (ids,) = tokenizer.encode([text])
    assert (tokenizer.vocabulary, tokenizer.end) == (256, 0)
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode([*ids, 0]) == text


@given(text=ANY_TEXT)
@example(text=f"a{END}b <|endoftext|>")
@example(text=" \r\n\r\n\t  x  \n ")
@example(text="can't 1234567 …—!!?\n\n日本語 ß👍🏽\u200b\ufeff")
def test_bpe_gives_any_text_back_and_no_text_spells_the_end(bpe, text):
    (ids,) = bpe.encode([text])
    assert ids.dtype == "int32"
    assert ((ids >= 0) & (ids < bpe.vocabulary) & (ids != bpe.end)).all()
    assert bpe.decode([*ids, bpe.end]) == text


@given(ids=st.lists(st.integers(0, 255), max_size=12))
def test_decoding_never_fails_on_letters_that_are_cut(bpe, ids):
    assert isinstance(bpe.decode(ids), str)
    assert load_tokenizer("bytes").decode(ids) == bytes(filter(None, ids)).decode(errors="replace")
    assert load_tokenizer("bytes").decode("né".encode()[:2]) == "n\ufffd"


def test_bpe_knows_the_text_it_was_made_for(bpe):
    assert bpe.vocabulary == 300
    (ids,) = bpe.encode([TEXT])
    assert len(ids) < len(TEXT) / 3
    assert next(bpe.decode([i]) for i in bpe.encode([" mask's 12345"])[0]) == " mask"


def test_texts_are_encoded_each_on_its_own(bpe):
    one, none, two = bpe.encode(["the mask", "", "grows"])
    assert none.tolist() == []
    assert (bpe.decode(one), bpe.decode(two)) == ("the mask", "grows")


def test_a_bpe_is_made_of_documents_and_summaries(tmp_path):
    lines = [{"document": "zxzx " * 50, "summary": "qjqj " * 50}, b"{"]
    path = str(write_lines(tmp_path / "x.jsonl", lines))
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2: it is not JSON"):
        train_bpe([path], 270, {}, tmp_path / "bpe.json")
    assert not list(tmp_path.glob("*bpe*"))
    both = train_bpe([path], 270, {}, tmp_path / "made" / "bpe.json", skip_malformed=True)
    assert [len(ids) for ids in both.encode([" zxzx", " qjqj"])] == [1, 1]
    named = train_bpe([path], 270, {"text": "summary"}, tmp_path / "s.json", skip_malformed=True)
    assert [len(ids) for ids in named.encode([" zxzx", " qjqj"])] == [5, 1]


def test_a_bpe_is_not_written_over_another(folder):
    with pytest.raises(FileExistsError, match=r"bpe\.json is there already"):
        train_bpe([str(folder / "text.txt")], 300, {}, folder / "bpe.json")


def test_a_bpe_needs_text_and_room_for_all_bytes(folder, tmp_path):
    with pytest.raises(ValueError, match=r"vocabulary must be above 256, .* got 256"):
        train_bpe([str(folder / "text.txt")], 256, {}, tmp_path / "bpe.json")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"data\.paths has no text: .*none"):
        train_bpe([str(tmp_path / "none")], 300, {}, tmp_path / "bpe.json")


def test_padding_truncation_and_templates_of_a_tokenizer_json_are_not_taken(folder, bpe):
    def change(content):
        content["truncation"] = {
            "max_length": 3,
            "stride": 0,
            "strategy": "LongestFirst",
            "direction": "Right",
        }
        content["padding"] = {
            "strategy": {"Fixed": 40},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": END,
        }

    ids = load_tokenizer(altered(folder / "bpe.json", "cuts.json", change)).encode(["the query sees"])[0]
    assert ids.tolist() == bpe.encode(["the query sees"])[0].tolist()


def test_the_end_token_goes_by_its_usual_names_or_by_the_option(folder, bpe):
    def rename(content, *names):
        tokens = content["added_tokens"]
        content["added_tokens"] = [tokens[0] | {"content": n, "id": 300 + i} for i, n in enumerate(names)]
        del content["model"]["vocab"][END]
        content["model"]["vocab"] |= {name: 300 + i for i, name in enumerate(names)}

    eos = altered(folder / "bpe.json", "eos.json", lambda content: rename(content, "</s>"))
    assert load_tokenizer(eos).end == 300
    assert load_tokenizer(eos).vocabulary == 301
    two = altered(folder / "bpe.json", "two.json", lambda content: rename(content, "</s>", "<eos>"))
    with pytest.raises(
        ValueError, match=r"data\.tokenizer: .*two\.json has several .*, </s>, <eos> .*--data\.end"
    ):
        load_tokenizer(two)
    assert load_tokenizer(two, "<eos>").end == 301
    assert load_tokenizer(two, "<eos>").fingerprint != load_tokenizer(two, "</s>").fingerprint
    none = altered(folder / "bpe.json", "none.json", lambda content: rename(content, "[STOP]"))
    with pytest.raises(
        ValueError, match=r"none\.json has no end token of a usual name \(<\|endoftext\|>, .*"
    ):
        load_tokenizer(none)
    assert load_tokenizer(none, "[STOP]").end == 300
    with pytest.raises(ValueError, match=r"data\.end_token: .*none\.json has no token '</s>'"):
        load_tokenizer(none, "</s>")


def test_bytes_have_one_end_token():
    with pytest.raises(ValueError, match=r"data\.end_token: the tokenizer bytes has none but .* got '</s>'"):
        load_tokenizer("bytes", "</s>")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.json", b"{}", r"data\.tokenizer: .*x\.json is no tokenizer\.json"),
        ("x.json", b"\xff", r"x\.json is no tokenizer\.json"),
        ("x.model", b"text", r"data\.tokenizer: .*x\.model is no sentencepiece model"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        load_tokenizer(str(tmp_path / name))


def test_a_tokenizer_that_is_not_there_is_refused():
    with pytest.raises(FileNotFoundError, match=r"data\.tokenizer: byte does not exist: bytes, or the path"):
        load_tokenizer("byte")


def test_a_sentencepiece_model_gives_text_back_and_ends_with_its_own_token(pieces):
    tokenizer = load_tokenizer(str(pieces))
    (ids,) = tokenizer.encode(["the mask</s> grows é"])
    assert tokenizer.end == 2
    assert 2 not in ids
    assert tokenizer.decode([*ids, 2]) == "the mask</s> grows é"
    assert isinstance(tokenizer.decode(ids[:-1]), str)
    assert load_tokenizer(str(pieces), "<s>").end == 1
    with pytest.raises(ValueError, match=r"data\.end_token: .*pieces\.model has no token '<stop>'"):
        load_tokenizer(str(pieces), "<stop>")


def test_a_sentencepiece_model_without_the_library_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "x.model").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match=r"x\.model needs sentencepiece, .* -e \"\.\[hub\]\""):
        load_tokenizer(str(tmp_path / "x.model"))


def test_long_meetings_fit_32k_tokens_of_a_bpe_made_for_them(tmp_path):
    path = real_text("qmsum_ami_icsi.jsonl.gz")
    tokenizer = train_bpe([path], 8_192, {}, tmp_path / "bpe.json")
    pairs = [item.texts for item in records(sources([path]), "summarize", {}) if isinstance(item, TextRecord)]
    assert len(pairs) == 196
    longest = max(pairs, key=lambda pair: sum(map(len, pair)))
    assert sum(map(len, tokenizer.encode(longest))) + 1 <= 32_768


def test_a_continuation_reads_on_from_its_prompt(tmp_path):
    """As BERT's and sentencepiece's decoders, which leave out the space before a text's first word."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(special_tokens=["<eos>"], show_progress=False)
    library.train_from_iterator(["the cat sat on the mat"] * 9, trainer)
    library.save(str(tmp_path / "words.json"))
    tokenizer = load_tokenizer(str(tmp_path / "words.json"))
    before, after = tokenizer.encode(["the cat"])[0], tokenizer.encode(["the mat"])[0]
    assert tokenizer.decode(after) == "the mat"
    assert "the cat" + tokenizer.decode_after(before, after) == "the cat the mat"


def test_a_letter_that_is_cut_between_prompt_and_continuation_is_one():
    tokenizer, letters = Bytes(), np.frombuffer("é".encode(), np.uint8)
    assert tokenizer.decode_after(b"caf", letters) == "é"
    assert tokenizer.decode_after([*b"caf", letters[0]], letters[1:]) in ("\ufffd", "é")
