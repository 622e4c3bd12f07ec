"""The bytes that each id spells: of every kind of tokenizer, against the text that was encoded."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from train.data.bpe import train_bpe
from train.data.tokenizers import SentencePiece, load_tokenizer

TEXT = "the cat sat on the mat, and the dog ran after the cat 12 times\n"


def spelled(tokenizer, text: str) -> bytes:
    return b"".join(tokenizer.pieces[id] for id in tokenizer.encode([text])[0])


def trained(model, trainer, **parts) -> Tokenizer:
    """A tokenizer with these parts, trained on the text."""
    library = Tokenizer(model)
    for part, value in parts.items():
        setattr(library, part, value)
    library.train_from_iterator([TEXT] * 9, trainer)
    return library


def bpe(vocabulary: int = 90, **options) -> tuple[models.BPE, trainers.BpeTrainer]:
    """An untrained BPE, and its trainer."""
    special = {"special_tokens": ["<unk>", "</s>"], "vocab_size": vocabulary, "show_progress": False}
    return models.BPE(unk_token="<unk>", **options), trainers.BpeTrainer(**special, **options)


def metaspace() -> Tokenizer:
    return trained(*bpe(), pre_tokenizer=pre_tokenizers.Metaspace(), decoder=decoders.Metaspace())


def wordpiece() -> Tokenizer:
    options = {"special_tokens": ["[UNK]", "[EOS]"], "vocab_size": 90, "show_progress": False}
    return trained(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(**options),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(),
    )


def suffix() -> Tokenizer:
    spaces = pre_tokenizers.WhitespaceSplit()
    return trained(*bpe(end_of_word_suffix="</w>"), pre_tokenizer=spaces, decoder=decoders.BPEDecoder())


def clip() -> Tokenizer:
    """Bytes, with a suffix: as CLIP's."""
    steps = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    return trained(
        *bpe(120, end_of_word_suffix="</w>"),
        pre_tokenizer=pre_tokenizers.Sequence(steps),
        decoder=decoders.ByteLevel(),
    )


def unigram() -> Tokenizer:
    special = {"special_tokens": ["<unk>", "</s>"], "unk_token": "<unk>"}
    return trained(
        models.Unigram(),
        trainers.UnigramTrainer(**special, vocab_size=60, show_progress=False),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
    )


def replace() -> Tokenizer:
    return trained(*bpe(), normalizer=normalizers.Replace(" ", "▁"), decoder=decoders.Replace("▁", " "))


def fallback() -> Tokenizer:
    """As Llama's: letters by name, other bytes as <0x..>, spaces by a normalizer."""
    letters = {"<unk>": 0, "</s>": 1, "▁": 2, "c": 3, "a": 4, "t": 5}
    vocabulary = letters | {f"<0x{byte:02X}>": byte + len(letters) for byte in range(256)}
    library = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    library.normalizer = normalizers.Replace(" ", "▁")
    steps = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
    library.decoder = decoders.Sequence([*steps])
    return library


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "x.txt").write_text(TEXT * 9, encoding="utf-8")
    train_bpe([str(folder / "x.txt")], 300, {}, folder / "bytes.json")
    for make in (metaspace, wordpiece, suffix, clip, unigram, replace, fallback):
        make().save(str(folder / f"{make.__name__}.json"))
    return folder


@given(st.text(st.characters(codec="utf-8"), max_size=40))
def test_byte_level_pieces_are_the_text(folder, text):
    assert spelled(load_tokenizer(str(folder / "bytes.json")), text) == text.encode()


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("metaspace", "the cat", b" the cat"),  # which puts a space before a text
        ("metaspace", "the жat", b" the at"),
        ("wordpiece", "the cats on", b"thecatson"),  # which keeps no spaces
        ("wordpiece", "the ж", b"the"),
        ("suffix", "the cat ж", b"thecat"),
        ("unigram", "the cat", b" the cat"),
        ("unigram", "жcat", b" cat"),
        ("clip", "the cat", b"thecat"),
        ("replace", "the cat", b"the cat"),
        ("fallback", "cat é\n", "cat é\n".encode()),
    ],
)
def test_pieces_are_what_the_tokens_stand_for(folder, name, text, expected):
    assert spelled(load_tokenizer(str(folder / f"{name}.json")), text) == expected


def test_an_unknown_token_that_is_added_as_a_word_spells_nothing(folder):
    library = Tokenizer(models.WordLevel({"the": 0, "<unk>": 1, "</s>": 2}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_tokens(["<unk>", "</s>"])
    library.save(str(folder / "added.json"))
    assert spelled(load_tokenizer(str(folder / "added.json")), "the cat") == b"the"


@pytest.mark.parametrize("name", ["metaspace", "unigram"])
def test_the_space_that_a_tokenizer_puts_before_a_text_is_none_of_its_bytes(folder, name):
    """As in rows of a stream, and in summaries: after an end token."""
    tokenizer = load_tokenizer(str(folder / f"{name}.json"))
    texts = ["the cat", "a mat on the mat", "dog"]
    stream = np.concatenate([np.append(ids, tokenizer.end) for ids in tokenizer.encode(texts)])
    inputs, targets = np.append(tokenizer.end, stream[:-1]), stream
    assert tokenizer.target_bytes(inputs, targets).sum() == sum(map(len, texts))


def test_special_tokens_spell_nothing(folder):
    for path in folder.glob("*.json"):
        tokenizer = load_tokenizer(str(path))
        assert tokenizer.pieces[tokenizer.end] == b""
        assert len(tokenizer.pieces) == tokenizer.vocabulary


def test_sentencepieces_bytes_and_unknown_ones(folder):
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs the extra hub")
    for fallback, expected in ((False, b" cat "), (True, " cat жé".encode())):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([TEXT.strip()] * 9),
            model_writer=model,
            vocab_size=330 if fallback else 60,
            byte_fallback=fallback,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        (folder / "x.model").write_bytes(model.getvalue())
        assert spelled(SentencePiece(folder / "x.model", None, None), "cat жé") == expected
