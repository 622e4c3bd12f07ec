"""The run whose model another one begins with: found by the words of a command, before they are parsed."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from train.checkpoint.export import load_config
from train.checkpoint.folder import RunFolder
from train.checkpoint.load import SAFETENSORS
from train.config.presets import PRESETS
from train.config.run import Run
from train.config.sections import Optimizer
from train.pretrained.extend import Source, extended
from train.pretrained.folder import PretrainedFolder
from train.pretrained.run import pretrained_run, with_source


def preset_run(preset: str, words: Sequence[str]) -> tuple[Run, Source | None]:
    """The config of a preset with what follows from `--init-from`, and the source of its model.

    Args:
      preset: its name.
      words: of the command line, without the preset's name.

    Raises:
      OSError, ValueError: as `find_source`; or the rows of the preset extend would not be longer.
    """
    run = PRESETS[preset]()
    source = find_source(run, words)
    if source is None:
        return run, None
    run = with_source(run, source.run)
    return extended(run, source, length_of(words)) if preset == "extend" else run, source


def find_source(preset: Run, words: Sequence[str]) -> Source | None:
    """The run whose model and tokenizer are those of `--init-from`; None: it is not given.

    A run that is resumed has them in its own config: what it began from is not needed.

    Args:
      preset: the config that the words change.
      words: of the command line, without the preset's name.

    Raises:
      OSError, ValueError: the folder or file cannot be read, or its model cannot be computed.
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
            return Source(saved, run.init_from, saved.data.length, resumes=True)
    source = Path(run.init_from)
    if (pretrained := PretrainedFolder.at(source)) is not None:
        theirs = pretrained_run(pretrained, _value(words, "data.tokenizer"))
        longest = theirs.model.max_position_embeddings
        assert longest is not None  # config.json has it
        return Source(theirs, run.init_from, longest)
    theirs = _trained(source)
    return Source(
        theirs,
        run.init_from,
        max(theirs.model.max_position_embeddings or 0, theirs.data.length),
        last_rate(theirs.optimizer),
    )


def _trained(source: Path) -> Run:
    """The config of a run's folder or of a file of `export`, with the tokenizer that is there."""
    if source.suffix == SAFETENSORS:
        return load_config(source)
    folder = RunFolder(source)
    run = folder.read_config()
    return replace(run, data=replace(run.data, tokenizer=folder.tokenizer_path(run)))


def last_rate(optimizer: Optimizer) -> float:
    """The learning rate that a run ended with; a tenth of its peak where it fell to nothing.

    >>> last_rate(Optimizer(learning_rate=1e-3, final=0.25))
    0.00025
    """
    return optimizer.learning_rate * (optimizer.final or 0.1)


def length_of(words: Sequence[str]) -> int | None:
    """The tokens in a row that the words ask for; None where they do not, or in no number."""
    try:
        return int(_value(words, "data.length") or "")
    except ValueError:
        return None


def _value(words: Sequence[str], name: str) -> str | None:
    """The last value that the words give an option."""
    value = None
    for word, after in pairwise([*words, ""]):
        option, equals, rest = word.partition("=")
        if option.replace("_", "-") == f"--{name.replace('_', '-')}":
            value = rest if equals else after or None
    return value
