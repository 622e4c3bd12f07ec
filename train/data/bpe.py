"""A byte-level BPE tokenizer, trained on texts."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from train.data.records import Malformed, records
from train.data.sources import sources
from train.data.tokenizers import ALPHABET, END, Tokenizer, load_tokenizer
from train.disk import check_writable

WORD = (  # a token of `train_bpe` is within one word, as words are in GPT-4's tokenizer
    r"[^\r\n\p{L}\p{N}]?\p{L}+"  # letters, with the space or the mark before them
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # marks, with the line ends after them
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_bpe(
    paths: Sequence[str],
    vocabulary: int,
    columns: Mapping[str, str],
    out: Path,
    *,
    skip_malformed: bool = False,
) -> Tokenizer:
    """A byte-level BPE tokenizer trained on texts, written to a `tokenizer.json`.

    It encodes any text, and decoding gives the text back. Of pairs, documents and summaries are read.

    Args:
      paths: what `data.paths` takes.
      vocabulary: the number of ids, the 256 bytes and the end token `<|endoftext|>` included. A small text
        may not have enough pairs of tokens for so many; the tokenizer then has fewer.
      columns: data.columns.
      out: the file to write. Its folders are created.
      skip_malformed: skip lines that cannot be read.

    Raises:
      FileExistsError: the file exists.
      OSError: its folder cannot be written to.
      ValueError: `vocabulary` is too small, there is no text, or some cannot be read.
    """
    if vocabulary <= ALPHABET:
        raise ValueError(
            f"vocabulary must be above {ALPHABET}, all bytes and the end token {END}, got {vocabulary}"
        )
    if out.exists():
        raise FileExistsError(f"{out} is there already, and runs may depend on it: name another file")
    out.parent.mkdir(parents=True, exist_ok=True)
    check_writable(out.parent)
    library = _train(_texts(paths, columns, skip_malformed), vocabulary)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    library.save(str(unfinished))
    unfinished.replace(out)
    return load_tokenizer(str(out))


def _train(texts: Iterator[str], vocabulary: int) -> Any:
    """A byte-level BPE of the library `tokenizers`."""
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Library

    library = Library(models.BPE())
    words = pre_tokenizers.Split(Regex(WORD), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    return library


def _texts(paths: Sequence[str], columns: Mapping[str, str], skip_malformed: bool) -> Iterator[str]:
    """Every text at the paths, documents and summaries."""
    some = False
    for record in records(sources(paths), None, columns):
        if not isinstance(record, Malformed):
            some = True
            yield from record.texts
        elif record.asked_for and not skip_malformed:
            raise record.error()
    if not some:
        raise ValueError(f"data.paths has no text: {', '.join(paths)}")
