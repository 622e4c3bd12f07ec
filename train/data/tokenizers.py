"""Text to tokens and back: bytes, a `tokenizer.json`, a sentencepiece model."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from train.data.pieces import pieces_of_library, pieces_of_sentencepiece

Ids = Int[np.ndarray, " tokens"]
END = "<|endoftext|>"  # of the tokenizers that are trained here
ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|eos|>")
ALPHABET = 256  # of bytes


class Tokenizer(ABC):
    """Texts as whole numbers in `0 <= id < vocabulary`.

    Attributes:
      vocabulary: the number of ids.
      end: the id that follows each text and is in none.
      begin: the id before each document; None: there is none.
      fingerprint: equal only for tokenizers that give the same ids.
      pieces: the bytes of text that each id spells; none for special tokens, and for the unknown one, which
        stands for text that the tokenizer cannot spell.
    """

    vocabulary: int
    end: int
    begin: int | None = None
    fingerprint: str
    pieces: Sequence[bytes]
    names_special_tokens = False
    """Whether special tokens stand for their names in a text of `encode_template`."""

    @cached_property
    def token_bytes(self) -> Int[np.ndarray, " ids"]:
        """The number of bytes of text that each id spells, int32."""
        return np.array([len(piece) for piece in self.pieces], np.int32)

    @cached_property
    def _adds_space(self) -> bool:
        """Whether the tokenizer puts a space before a text."""
        return self.pieces[next(iter(self.encode(["a"])[0]), self.end)].startswith(b" ")

    @cached_property
    def _leading_spaces(self) -> Int[np.ndarray, " ids"]:
        """1 for each id that begins with the space which the tokenizer puts before a text, else 0."""
        if not self._adds_space:
            return np.zeros(len(self.pieces), np.int32)
        return np.array([piece.startswith(b" ") for piece in self.pieces], np.int32)

    def target_bytes(self, inputs: Any, targets: Any) -> np.ndarray:
        """The bytes of text that each target spells, of NumPy arrays of ids.

        After an end or begin token a text begins, and the space that some tokenizers put there is none of its
        bytes.
        """
        first = inputs == self.end if self.begin is None else np.isin(inputs, (self.end, self.begin))
        return self.token_bytes[targets] - np.where(first, self._leading_spaces[targets], 0)

    @cached_property
    def token_letters(self) -> Int[np.ndarray, " ids"]:
        """The same without white space, which some tokenizers do not keep."""
        return np.array([len(b"".join(piece.split())) for piece in self.pieces], np.int32)

    def begun(self, document: Ids) -> Ids:
        """A document's tokens after the begin token, where there is one."""
        return document if self.begin is None else np.append(np.int32(self.begin), document)

    def check_fits(self, rows: int):
        """Refuses an embedding of so few rows that tokens of text have none; special tokens may lack theirs.

        Raises:
          ValueError: such a token, by its id.
        """
        if beyond := [id for id in range(rows, self.vocabulary) if self.pieces[id]]:
            raise ValueError(
                f"data.tokenizer: the token {beyond[0]} is beyond the model's vocabulary (model.vocab_size), "
                f"which has {rows} tokens"
            )

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The tokens of each text, int32, without the begin and end tokens."""

    def encode_after(self, texts: Sequence[str]) -> list[Ids]:
        """The tokens of texts that go on from others: a space that the tokenizer puts before a text is the
        text's own first one; or it is left out, if it is a token by itself.
        """
        if not self._adds_space:
            return self.encode(texts)
        encoded = self.encode([text.removeprefix(" ") for text in texts])
        return [
            ids[1:] if len(ids) and self.pieces[ids[0]] == b" " and not text.startswith(" ") else ids
            for text, ids in zip(texts, encoded, strict=True)
        ]

    def encode_template(self, text: str, *, goes_on: bool) -> Ids:
        """The tokens of a template's text, which goes on from another or does not.

        The names of special tokens stand for these, where the tokenizer has `names_special_tokens`.
        """
        return (self.encode_after if goes_on else self.encode)([text])[0]

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of the tokens; bytes that are not valid text, such as half a character, become �.

        End tokens are left out. Of bytes and of a BPE of `train.data.bpe`, `decode(encode([text])[0])` is
        the text.
        """

    def decode_after(self, before: Iterable[int], ids: Iterable[int]) -> str:
        """The text of tokens that follow others, so that it reads on from these: with the space that a
        tokenizer leaves out at a text's beginning. Where `before` ends within a letter, as no text does, � is
        the rest of it.
        """
        before = list(before)
        start, whole = self.decode(before), self.decode([*before, *ids])
        return whole.removeprefix(start) if whole.startswith(start) else self.decode(ids)


class Bytes(Tokenizer):
    """A token is a byte of UTF-8; the end token is the null byte, which no text holds."""

    vocabulary = ALPHABET
    end = 0
    fingerprint = "bytes"
    pieces = (b"", *(bytes([byte]) for byte in range(1, ALPHABET)))

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(id for id in map(int, ids) if id != self.end).decode("utf-8", errors="replace")


class Subwords(Tokenizer):
    """A `tokenizer.json` of the library `tokenizers`. Text that spells a special token is encoded as text."""

    names_special_tokens = True

    def __init__(self, path: Path, end_token: str | None, begin_token: str | None):
        self._library, content = open_library(path)
        self._library.encode_special_tokens = True
        self._library.no_padding()
        self._library.no_truncation()
        ids = self._library.get_vocab(with_added_tokens=True)
        name = _end_token(ids, end_token, path)
        self.vocabulary, self.end = max(ids.values()) + 1, ids[name]
        self.begin = _begin_token(ids, begin_token, path)
        self.fingerprint = _fingerprint("tokenizer.json", name, content, begin_token)
        self.pieces = pieces_of_library(self._library, self.vocabulary, self.end)

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        encoded = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(text.ids, np.int32) for text in encoded]

    def encode_template(self, text: str, *, goes_on: bool) -> Ids:
        self._library.encode_special_tokens = False
        try:
            return super().encode_template(text, goes_on=goes_on)
        finally:
            self._library.encode_special_tokens = True

    def decode(self, ids: Iterable[int]) -> str:
        kept = [id for id in map(int, ids) if id not in (self.end, self.begin)]
        return self._library.decode(kept, skip_special_tokens=True)


class SentencePiece(Tokenizer):
    """A sentencepiece model. It may normalise white space and characters."""

    def __init__(self, path: Path, end_token: str | None, begin_token: str | None):
        self._library, content = open_sentencepiece(path)
        self.vocabulary = self._library.GetPieceSize()
        ids = {self._library.IdToPiece(id): id for id in range(self.vocabulary)}
        eos = self._library.eos_id()
        name = end_token or (self._library.IdToPiece(eos) if eos >= 0 else None)
        name = _end_token(ids, name, path)
        self.end = ids[name]
        self.begin = _begin_token(ids, begin_token, path)
        self.fingerprint = _fingerprint("sentencepiece", name, content, begin_token)
        self.pieces = pieces_of_sentencepiece(self._library)

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        return [np.array(ids, np.int32) for ids in self._library.EncodeAsIds(list(texts))]

    def decode(self, ids: Iterable[int]) -> str:
        return self._library.DecodeIds([id for id in map(int, ids) if id not in (self.end, self.begin)])


def load_tokenizer(name: str, end_token: str | None = None, begin_token: str | None = None) -> Tokenizer:
    """The tokenizer of data.tokenizer: bytes, or one from a file.

    Args:
      name: "bytes", the path of a sentencepiece model (`….model`), or of a `tokenizer.json`.
      end_token: data.end_token; None: the one with a usual name.
      begin_token: data.begin_token; None: there is none.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is not a tokenizer; it has no such begin or end token, or no end token with a usual name;
        or its library is not installed.
    """
    if name == "bytes":
        if end_token is not None:
            raise ValueError(
                f"data.end_token: the tokenizer bytes has none but the null byte, got {end_token!r}"
            )
        if begin_token is not None:
            raise ValueError(f"data.begin_token: the tokenizer bytes has none, got {begin_token!r}")
        return Bytes()
    path = Path(name)
    kind = SentencePiece if path.suffix == ".model" else Subwords
    return kind(path, end_token, begin_token)


def open_library(path: Path) -> tuple[Any, bytes]:
    """The tokenizer of a `tokenizer.json` as the library `tokenizers` has it, and the file's content.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is no tokenizer.json.
    """
    from tokenizers import Tokenizer as Library

    content = _content(path)
    try:
        return Library.from_str(content.decode("utf-8")), content
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"data.tokenizer: {path} is no tokenizer.json ({error})") from error


def open_sentencepiece(path: Path) -> tuple[Any, bytes]:
    """The model in a file as the library `sentencepiece` has it, and the file's content.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is no sentencepiece model, or the library is not installed.
    """
    content = _content(path)
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ValueError(
            f'data.tokenizer: {path} needs sentencepiece, which is not installed: pip install -e ".[hub]"'
        ) from error
    library: Any = SentencePieceProcessor()
    try:
        library.LoadFromSerializedProto(content)
    except RuntimeError as error:
        raise ValueError(f"data.tokenizer: {path} is no sentencepiece model ({error})") from error
    return library, content


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(
            f"data.tokenizer: {path} does not exist: bytes, or the path of a tokenizer.json or of a "
            "sentencepiece model (….model)"
        )
    return path.read_bytes()


def _end_token(ids: Mapping[str, int], asked: str | None, path: Path) -> str:
    """The name of the end token among a tokenizer's."""
    if asked is not None:
        if asked not in ids:
            raise ValueError(f"data.end_token: {path} has no token {asked!r}")
        return asked
    usual = [name for name in ENDS if name in ids]
    if len(usual) == 1:
        return usual[0]
    found = f"several tokens of a usual name, {', '.join(usual)}" if usual else "no end token of a usual name"
    raise ValueError(
        f"data.tokenizer: {path} has {found} ({', '.join(ENDS)}): name the one that ends a text with "
        "--data.end-token"
    )


def _begin_token(ids: Mapping[str, int], name: str | None, path: Path) -> int | None:
    """The id of the begin token."""
    if name is not None and name not in ids:
        raise ValueError(f"data.begin_token: {path} has no token {name!r}")
    return None if name is None else ids[name]


def _fingerprint(kind: str, end: str, content: bytes, begin: str | None) -> str:
    names = end if begin is None else f"{end} {begin}"
    return f"{kind} {hashlib.sha256(content).hexdigest()} {names}"
