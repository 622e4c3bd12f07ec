"""The text of a run: paths in; batches to train on, held-out rows and facts about the text out."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from train.config.run import Run
from train.data import batches
from train.data.batch import Batch
from train.data.pair_layout import Conventions, PairLayout
from train.data.rows import DocumentPieces, Pairs, Stream, fitting
from train.data.split import Split, everything, hold_out
from train.data.tasks import task_of
from train.data.token_cache import TokenCache, token_caches
from train.data.tokenizers import Tokenizer, load_tokenizer

KINDS = {
    "text": ("text file", "text files"),
    "lines": ("file of JSON lines", "files of JSON lines"),
    "table": ("table", "tables"),
    "dataset": ("saved dataset", "saved datasets"),
}
"""Kinds of sources, in words: one, and several."""


class Examples(Sequence[tuple[str, str]]):
    """Documents with their summaries, as text, read from the cache on access."""

    def __init__(self, cache: TokenCache, documents: np.ndarray):
        self._cache, self._documents = cache, documents

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Examples(self._cache, self._documents[index])
        return self._cache.pair(int(self._documents[index]))


@dataclass(frozen=True)
class Corpus:
    """Batches to train on and to validate with, and facts about the text.

    Attributes:
      tokenizer: of the tokens.
      rows: the pipeline that `batches` starts.
      held_out: the rows of validation, at most evaluation.rows, in batches of one shape
        `[min(data.batch, rows), T]`; the last is padded. The same in all processes.
      examples: held-out pairs of document and summary; empty for a task without pairs.
      layout: what lies around documents and summaries; None for a task without pairs.
      size: bytes of text. This and the next three count held-out text too.
      documents: texts, or pairs.
      tokens: end tokens included.
      malformed: files and records that are left out.
      reports: these by file, in words.
      kinds: how many files of each kind of `train.data.sources.Source` gave documents.
      first: how the first document begins.
      unknown: share of the text's bytes, without white space, that the tokenizer does not spell: the greater
        of training and held-out text.
      truncated: documents cut to fit a row with their summary.
      lead_words: the median number of words in a training summary; None without summaries.
      fingerprint: equal only for the same tokens in the same rows in the same order.
    """

    tokenizer: Tokenizer
    rows: grain.IterDataset
    held_out: list[Batch]
    examples: Sequence[tuple[str, str]]
    layout: PairLayout | None
    size: int
    documents: int
    tokens: int
    malformed: int
    reports: tuple[str, ...]
    kinds: dict[str, int]
    first: str
    unknown: float
    truncated: int
    lead_words: int | None
    fingerprint: str

    @property
    def description(self) -> str:
        """What was found, in lines for the opening of a run."""
        files = ", ".join(
            f"{count:,} {KINDS[kind][count != 1]}" for kind, count in sorted(self.kinds.items())
        )
        unknown = f", {self.unknown:.2%} of the text unknown to the tokenizer" if self.unknown else ""
        lines = [
            f"Texts: {files}; {self.documents:,} documents, {self.size:,} bytes, {self.tokens:,} tokens"
            f"{unknown}.",
            f"The first begins: {self.first}",
        ]
        if self.malformed:
            lines.append(f"Left out: {self.malformed:,}")
            lines += [f"  {report}" for report in self.reports]
        return "\n".join(lines)

    @property
    def bytes_per_token(self) -> float:
        """Of the targets that are scored in `held_out`, end tokens included, which spell none."""
        scored = [batch.target_bytes[batch.weights > 0] for batch in self.held_out]
        return float(np.concatenate(scored).mean())

    def batches(self) -> grain.DatasetIterator:
        """Endless batches, NumPy arrays `[data.batch, T]`, the same in all processes.

        Each epoch is shuffled anew. The iterator's state can be saved and set at any batch; the batches
        after it are then the same, bit for bit. `close()` ends its thread.
        """
        return iter(self.rows)


def read_corpus(
    run: Run, tokenizer: Tokenizer | None = None, conventions: Conventions = Conventions()
) -> Corpus:
    """Reads the text, or its tokens from the cache, and cuts it into rows.

    Args:
      run: of which data, summarize, the task, the seed and evaluation.rows are read.
      tokenizer: the one of the config; None: it is loaded.
      conventions: of the pretrained model that the run begins from.

    Raises:
      FileNotFoundError: a path, or a tokenizer, does not exist.
      OSError: a file cannot be read, or the cache not be written.
      ValueError: text is malformed or cannot be used, see `token_caches` and `fitting`; or there is too
        little.
    """
    tokenizer = tokenizer or load_tokenizer(run.data.tokenizer, run.data.end_token, run.data.begin_token)
    layout = None
    if task_of(run).has_boundary:
        layout = PairLayout.of(run.summarize, tokenizer, conventions)
    caches = token_caches(run, tokenizer, layout)
    kept = [
        fitting(cache, run.data.length, layout, run.summarize.truncate)
        for cache in caches
        if layout is not None
    ]
    train, held_out = _split(run, caches)
    train_cut = _cut(run, caches[0], train, layout, kept[:1])
    held_out_cut = _cut(run, caches[-1], held_out, layout, kept[-1:])
    _check_size(run, train_cut, train, "train on")
    _check_size(run, held_out_cut, held_out, "hold out")
    return Corpus(
        tokenizer=tokenizer,
        rows=batches.batches(train_cut, run, tokenizer.target_bytes),
        held_out=batches.held_out_batches(held_out_cut, run, tokenizer.target_bytes),
        examples=Examples(caches[-1], held_out.documents) if kept else (),
        layout=layout,
        truncated=sum(int((each < cache.bodies).sum()) for each, cache in zip(kept, caches, strict=False)),
        lead_words=int(np.median(caches[0].summary_words[train.documents])) if kept else None,
        fingerprint=_fingerprint(run, tokenizer, caches, layout),
        **_facts(caches),
    )


def _split(run: Run, caches: list[TokenCache]) -> tuple[Split, Split]:
    """The documents to train on, and those held out."""
    whole = everything(caches[0], run.held_out_seed)
    if len(caches) > 1:
        return whole, everything(caches[1], run.held_out_seed)
    return hold_out(whole, run.data.held_out, task_of(run).held_out_by)


def _cut(
    run: Run, cache: TokenCache, split: Split, layout: PairLayout | None, kept: list[np.ndarray]
) -> batches.Cut:
    """The documents cut for rows of the run's kind."""
    if layout is not None:
        order, length = split.documents, run.data.length
        return Pairs(cache.tokens, split.spans, cache.bodies[order], kept[0][order], length, layout)
    kind = Stream if run.data.rows == "chunked" else DocumentPieces
    return kind(cache.tokens, split.spans, run.data.length)


def _check_size(run: Run, cut: batches.Cut, split: Split, purpose: str):
    """Refuses too little text."""
    if len(cut):
        return
    separate = purpose == "hold out" and run.data.held_out_paths
    needed = f"data.length + 1 = {run.data.length + 1}" if run.data.rows == "chunked" else "2"
    share = "" if separate else f" with data.held_out = {run.data.held_out}"
    raise ValueError(
        f"{'data.held_out_paths' if separate else 'data.paths'} has too little text to {purpose}: "
        f"{split.spans.tokens} tokens{share}, and a row needs {needed}"
    )


def _facts(caches: list[TokenCache]) -> dict[str, Any]:
    """Facts about the text of all caches, by the fields of `Corpus`."""
    return {
        "size": sum(cache.size for cache in caches),
        "documents": sum(len(cache.documents) for cache in caches),
        "tokens": sum(len(cache.tokens) for cache in caches),
        "malformed": sum(cache.malformed for cache in caches),
        "reports": tuple(report for cache in caches for report in cache.reports),
        "kinds": dict(sum((Counter(cache.kinds) for cache in caches), Counter())),
        "first": caches[0].first,
        "unknown": max(cache.unknown for cache in caches),
    }


def _fingerprint(run: Run, tokenizer: Tokenizer, caches: list[TokenCache], layout: PairLayout | None) -> str:
    texts = [cache.fingerprint for cache in caches]
    rows = [run.data.rows, run.data.length, run.data.packing_bins, run.summarize.truncate]
    split = [run.task, run.seed, run.data.held_out]
    if run.data.held_out_seed is not None:  # else as before there was this option
        split.append(run.data.held_out_seed)
    around = []
    if layout is not None and layout.key:
        around = [x.tolist() for x in (layout.before, layout.between, layout.after)]
    asked = json.dumps([tokenizer.fingerprint, texts, rows, split, *around])
    return hashlib.sha256(asked.encode()).hexdigest()
