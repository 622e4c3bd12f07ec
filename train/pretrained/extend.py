"""The preset `extend`, with what depends on the model that it begins with: lengths, rotary scaling, rate."""

import math
from dataclasses import dataclass, replace

from train.config.model import RopeScaling
from train.config.run import Run

TIMES = 4
"""Of the old context, in a row: where data.length is not given."""
CHUNKS = 256
"""The largest multiple that chunks are rounded to, so that they end with blocks of attention."""


@dataclass(frozen=True)
class Source:
    """Where the model of a run is from.

    Attributes:
      run: a config with its model and tokenizer; of a run that resumes, its own.
      name: how its folder was named.
      context: tokens of the longest context that it was trained at.
      learning_rate: that it ended with; None: not known.
      resumes: whether `run` is the saved config of the very run that goes on.
    """

    run: Run
    name: str
    context: int
    learning_rate: float | None = None
    resumes: bool = False


def extended(run: Run, source: Source, length: int | None) -> Run:
    """The run with rows longer than its source's context, under chunks that grow from that context.

    At the first step every chunk is a row as the source was trained on.

    Args:
      run: the preset, with the model of the source.
      source: of its first weights.
      length: tokens in a row; None: `TIMES` the old context.

    Raises:
      ValueError: the rows are no longer than the old context.
    """
    if source.resumes:
        return _as_begun(run, source.run)
    old, length = source.context, source.context * TIMES if length is None else length
    if length <= old:
        raise ValueError(
            f"data.length must be above the {old:,} tokens that {source.name} was trained at, for the preset "
            f"extend, got {length:,}"
        )
    rate = run.optimizer.learning_rate if source.learning_rate is None else source.learning_rate
    return replace(
        run,
        model=replace(run.model, rope_scaling=scaled(run.model.rope_scaling, old, length)),
        data=replace(run.data, length=length),
        optimizer=replace(run.optimizer, learning_rate=rate),
        curriculum=replace(run.curriculum, start=old, multiple_of=math.gcd(old, length, CHUNKS)),
        evaluation=replace(run.evaluation, old_context=old),
    )


def scaled(scaling: RopeScaling, old: int, new: int) -> RopeScaling:
    """The rotary scaling of a model whose context grows.

    A model that has none gets YaRN, which is reported to surpass interpolation and a raised base with and
    without fine-tuning (Peng et al. 2023, arXiv:2309.00071), and which transformers reads. One that has been
    extended before keeps its kind.

    Args:
      scaling: of the model.
      old, new: tokens of its context, before and after.

    >>> scaled(RopeScaling(), 1_024, 8_192).factor
    8.0
    >>> scaled(RopeScaling("linear", factor=2.0), 2_048, 8_192).factor
    8.0
    """
    if scaling.kind == "none":
        return RopeScaling("yarn", new / old, old)
    if scaling.kind == "yarn" and scaling.original_max_position_embeddings:
        # Its factor may already reach beyond the context that it was trained at.
        needed = new / scaling.original_max_position_embeddings
        return replace(scaling, factor=max(scaling.factor, needed))
    return replace(scaling, factor=scaling.factor * new / old)


def _as_begun(run: Run, saved: Run) -> Run:
    """The run with what `extended` decided when it began: its source is not read again."""
    return replace(
        run,
        data=replace(run.data, length=saved.data.length),
        optimizer=replace(run.optimizer, learning_rate=saved.optimizer.learning_rate),
        curriculum=replace(
            run.curriculum, start=saved.curriculum.start, multiple_of=saved.curriculum.multiple_of
        ),
        evaluation=replace(run.evaluation, old_context=saved.evaluation.old_context),
    )
