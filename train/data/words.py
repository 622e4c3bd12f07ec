"""The words of a text in any script: what summaries are scored by, and cut after."""

import unicodedata
from collections.abc import Iterator
from functools import cache
from typing import Any

UNSPACED = ("Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan")
"""Scripts that are written without spaces between words: each character counts as one."""
_UNSPACED = "".join(rf"\p{{{script}}}" for script in UNSPACED)
WORD = rf"[{_UNSPACED}]\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]&&[^{_UNSPACED}]]+"
COUNTED = rf"[{_UNSPACED}]\p{{M}}*|[^\s{_UNSPACED}]+"
"""Patterns of the library `tokenizers`: a word that is scored, and one that is counted, with its marks."""


def words(text: str) -> list[str]:
    """The words of a text: runs of letters, marks and digits; of `UNSPACED` scripts, characters.

    They are in lower case and in Unicode's form NFKC, so that é is é however it was typed, without marks that
    do not print, such as the joiners in Persian words. Split by the library `tokenizers`.

    >>> words("The naïve fox's 2 dens; \u072a\u06c1\u0627, 你好")
    ['the', 'naïve', 'fox', 's', '2', 'dens', '\u072a\u06c1\u0627', '你', '好']
    """
    text = unicodedata.normalize("NFKC", text).lower()
    printed = "".join(letter for letter in text if unicodedata.category(letter) != "Cf")
    return [word for word, _ in _splitter(WORD).pre_tokenize_str(printed)]


def first_words(text: str, count: int) -> str:
    """The text up to the end of its first words, which white space parts, with single spaces for that.

    >>> first_words("One  two,\\nthree four", 3)
    'One two, three'
    """
    # So much as is needed, and no more: documents may be long.
    size = 16 * count + 256
    while size < len(text):
        ends = list(_ends(text[:size]))
        if len(ends) > count:  # the last may be cut
            return " ".join(text[: ends[count - 1]].split())
        size *= 2
    ends = list(_ends(text))
    return " ".join((text[: ends[count - 1]] if len(ends) > count else text).split())


def word_count(text: str) -> int:
    """How many words `first_words` counts in a text."""
    return sum(1 for _ in _ends(text))


def _ends(text: str) -> Iterator[int]:
    return (end for _, (_, end) in _splitter(COUNTED).pre_tokenize_str(text))


@cache
def _splitter(pattern: str) -> Any:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    return Split(Regex(pattern), "removed", invert=True)
