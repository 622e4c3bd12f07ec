"""The bytes of text that each id of a tokenizer spells.

Bits per byte divide by them, and what a tokenizer cannot spell is found by them.
"""

import json
import re
from functools import cache
from typing import Any

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE = "▁"  # sentencepiece's


def pieces_of_library(library: Any, vocabulary: int, end: int) -> list[bytes]:
    """The pieces of a tokenizer of the library `tokenizers`, which keeps them in the form its decoder reads.

    A tokenizer without a decoder joins tokens by spaces that it did not read: of these none is counted.
    """
    facts = json.loads(library.to_str())
    kinds = {part["type"]: part for part in _parts(facts)}
    model = facts["model"]
    continuing = model.get("continuing_subword_prefix") or ""
    word_end = model.get("end_of_word_suffix") or kinds.get("BPEDecoder", {}).get("suffix") or ""
    space = kinds.get("Metaspace", {}).get("replacement") or _space(facts)
    unknown = _unknown(model)

    def spelled(id: int, token: str) -> bytes:
        if token == unknown or id == end:
            return b""
        if id in added:
            return b"" if added[id]["special"] else token.encode()
        token = token.removeprefix(continuing).removesuffix(word_end)
        if "ByteLevel" in kinds:
            alphabet = _alphabet()
            return bytes(alphabet[letter] for letter in token if letter in alphabet)
        if model.get("byte_fallback") and (byte := BYTE.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        return (token.replace(space, " ") if space else token).encode()

    added = {token["id"]: token for token in facts["added_tokens"]}
    tokens = {id: token for token, id in library.get_vocab(with_added_tokens=True).items()}
    return [spelled(id, tokens[id]) if id in tokens else b"" for id in range(vocabulary)]


def pieces_of_sentencepiece(library: Any) -> list[bytes]:
    """The pieces of a sentencepiece model."""

    def spelled(id: int) -> bytes:
        if library.IsControl(id) or library.IsUnknown(id) or library.IsUnused(id):
            return b""
        token = library.IdToPiece(id)
        return bytes([int(token[3:5], 16)]) if library.IsByte(id) else token.replace(SPACE, " ").encode()

    return [spelled(id) for id in range(library.GetPieceSize())]


def _parts(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps before and after the model, those in sequences too."""
    steps = [facts.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]
    found = []
    while steps:
        if step := steps.pop():
            found.append(step)
            steps += [
                part for each in step.values() if isinstance(each, list) for part in each if _is_step(part)
            ]
    return found


def _is_step(part: Any) -> bool:
    return isinstance(part, dict) and "type" in part


def _space(facts: dict[str, Any]) -> str:
    """What the decoder makes a space of, "" where there is nothing."""
    for part in _parts({"decoder": facts.get("decoder")}):
        if part["type"] == "Replace" and part.get("content") == " ":
            return part["pattern"].get("String", "")
    return ""


def _unknown(model: dict[str, Any]) -> str | None:
    """The token for what cannot be spelled."""
    if (id := model.get("unk_id")) is not None:  # of a unigram model, whose vocabulary is a list
        return model["vocab"][id][0]
    return model.get("unk_token")


@cache
def _alphabet() -> dict[str, int]:
    """GPT-2's letter for each byte, by which byte-level tokenizers write bytes that do not print."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}
