"""The command `tokenizer`: trains a BPE tokenizer."""

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from train.data.bpe import train_bpe


@dataclass(frozen=True)
class TrainTokenizer:
    """Trains a byte-level BPE tokenizer on your texts: a tokenizer.json for --data.tokenizer."""

    paths: tyro.conf.Positional[tuple[str, ...]]
    """Text files, JSONL files, folders of them, globs, or saved datasets, as for --data.paths."""
    out: Path = Path("tokenizer.json")
    """The file to write."""
    vocabulary: int = 8192
    """Size of the vocabulary, with the 256 bytes and the end token."""
    columns: dict[str, str] = field(default_factory=dict)
    """The columns of records, where they do not have their usual names: text body, for example."""
    skip_malformed: bool = False
    """Skip lines that cannot be read instead of stopping at the first."""


def train_tokenizer(command: TrainTokenizer):
    """Writes the tokenizer, and prints its size.

    Raises:
      ValueError, OSError: with the reason why it cannot.
    """
    if not command.paths:
        raise ValueError("tokenizer needs texts: tokenizer FILE_OR_FOLDER …")
    tokenizer = train_bpe(
        command.paths, command.vocabulary, command.columns, command.out, skip_malformed=command.skip_malformed
    )
    print(f"{command.out}: {tokenizer.vocabulary:,} tokens; train with --data.tokenizer {command.out}")
