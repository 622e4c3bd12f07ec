"""The options of a run that a Hugging Face folder decides: the model's, and those of its tokenizer."""

from dataclasses import replace
from pathlib import Path

from train.config.model import Model
from train.config.run import Run, option_values
from train.config.sections import BASE_TEMPLATE, Data, Summarize
from train.data.tokenizers import open_library, open_sentencepiece
from train.pretrained.config import model_of
from train.pretrained.folder import CONFIG, PretrainedFolder

COMPUTING = ("dtype", "remat", "backend", "attention_dropout")
"""Options of the model that say how a run computes: they are the run's."""
EXTENDING = ("rope_theta", "rope_scaling.")
"""Options of the model that a run may change, to read longer texts than the model was trained at."""


def pretrained_run(folder: PretrainedFolder, tokenizer: str | None = None) -> Run:
    """A config with the model and the tokenizer of a folder.

    Args:
      folder: that transformers saved.
      tokenizer: the path of the tokenizer; None: the folder's.

    Raises:
      FileNotFoundError: the folder has no tokenizer, and none is named; or the one that is named is missing.
      ValueError: its config.json describes a model that the Transformer cannot compute; or the tokenizer is
        none that a folder has.
    """
    try:
        model = model_of(folder.config())
    except ValueError as error:
        raise ValueError(f"{folder.path / CONFIG}: {error}") from error
    if tokenizer == "bytes":
        raise ValueError(
            f"data.tokenizer: bytes is not the tokenizer of a Hugging Face model, as in {folder.path}"
        )
    name = tokenizer or str(folder.tokenizer())
    begin = begin_token(Path(name))
    return Run(
        model=model,
        data=Data(tokenizer=name, end_token=folder.end_token(), begin_token=begin),
        # Its tokens have never seen later ones, and nothing but text tells it that a summary follows.
        summarize=Summarize(prefix="causal", template=BASE_TEMPLATE),
    )


def with_source(run: Run, source: Run) -> Run:
    """The run with the model, the tokenizer and the layout of summaries of another; how it computes stays its
    own."""
    kept = {name: getattr(run.model, name) for name in COMPUTING}
    taken = {name: getattr(source.data, name) for name in ("tokenizer", "end_token", "begin_token")}
    layout = {name: getattr(source.summarize, name) for name in ("prefix", "template", "instruction")}
    return replace(
        run,
        model=replace(source.model, **kept),
        data=replace(run.data, **taken),
        summarize=replace(run.summarize, **layout),
    )


def check_agreement(model: Model, source: Model, name: str):
    """Refuses options of a model that are not those of the weights that it begins with.

    Raises:
      ValueError: with each such option, its value and that of the source.
    """
    ours, theirs = option_values(model), option_values(source)
    if different := [
        f"model.{option} is {theirs[option]!r} there, {ours[option]!r} asked for"
        for option in ours
        if ours[option] != theirs[option] and not option.startswith((*COMPUTING, *EXTENDING))
    ]:
        raise ValueError(f"init_from: {name} is of another model than this run's: {'; '.join(different)}")


def begin_token(tokenizer: Path) -> str | None:
    """The special token that transformers puts before each text; None: there is none.

    A tokenizer.json says it itself. A sentencepiece model has one, which tokenizer_config.json beside it may
    leave out (`add_bos_token`).

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is no tokenizer; or it puts several tokens before a text.
    """
    if tokenizer.suffix == ".model":
        pieces, _ = open_sentencepiece(tokenizer)
        begin = pieces.bos_id()
        added = PretrainedFolder(tokenizer.parent).tokenizer_config().get("add_bos_token", True)
        return pieces.IdToPiece(begin) if begin >= 0 and added else None
    library, _ = open_library(tokenizer)
    encoding = library.encode("a")
    count = next((i for i, special in enumerate(encoding.special_tokens_mask) if not special), 0)
    if count > 1:
        raise ValueError(
            f"{tokenizer} puts several tokens before a text, {', '.join(encoding.tokens[:count])}: one is "
            "supported"
        )
    return encoding.tokens[0] if count else None
