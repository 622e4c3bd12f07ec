"""The run whose model another one begins with: found by the words of a command, before they are parsed."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from train.checkpoint.folder import RunFolder
from train.checkpoint.load import SAFETENSORS
from train.config.run import Run
from train.pretrained.folder import PretrainedFolder
from train.pretrained.run import pretrained_run


def source_run(preset: Run, words: Sequence[str]) -> Run | None:
    """The run whose model and tokenizer are those of `--init-from`; None: the command decides them.

    A run that is resumed has them in its own config: the folder that it began from is not needed.

    Args:
      preset: the config that the words change.
      words: of the command line, without the preset's name.

    Raises:
      OSError, ValueError: the folder cannot be read, or its model cannot be computed.
    """
    names = ("init_from", "name", "folder")
    given = {name: value for name in names if (value := _value(words, name)) is not None}
    run = replace(preset, **given)
    if run.init_from is None:
        return None
    own = RunFolder.of(run)
    if own.config.is_file() and "--overwrite" not in words:
        saved = own.read_config()
        if saved.init_from == run.init_from:
            return saved
    source = Path(run.init_from)
    if source.suffix == SAFETENSORS:
        return None
    if (pretrained := PretrainedFolder.at(source)) is not None:
        return pretrained_run(pretrained, _value(words, "data.tokenizer"))
    other = RunFolder(source)
    theirs = other.read_config()
    return replace(theirs, data=replace(theirs.data, tokenizer=other.tokenizer_path(theirs)))


def _value(words: Sequence[str], name: str) -> str | None:
    """The last value that the words give an option."""
    value = None
    for word, after in pairwise([*words, ""]):
        option, equals, rest = word.partition("=")
        if option.replace("_", "-") == f"--{name.replace('_', '-')}":
            value = rest if equals else after or None
    return value
