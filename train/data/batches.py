"""Pieces of documents in, batches of rows out: `grain` pipelines."""

from collections.abc import Iterable, Iterator
from itertools import islice

import grain
import numpy as np

from train.config.run import Run
from train.data.batch import Batch
from train.data.rows import (
    CONTEXT,
    SEGMENTS,
    TOKENS,
    ByteCount,
    DocumentPieces,
    Item,
    Pairs,
    Stream,
    as_batch,
)

AHEAD = 2  # batches prefetched while the model trains

Cut = DocumentPieces | Pairs | Stream


def batches(cut: Cut, run: Run, byte_count: ByteCount) -> grain.IterDataset:
    """Endless batches `[data.batch, T]`, shuffled anew in each epoch.

    Every item is read once in an epoch. Packing may lay the last items of an epoch beside the first of
    the next. Every process reads all rows and gives each of its devices its part. So the position in the data
    is a property of the run, and any number of processes can resume its checkpoints. Reading costs little
    beside training on long rows.
    """
    seed = _seed(run.seed)
    endless = grain.MapDataset.source(cut).seed(seed).shuffle().repeat()
    rows = _rows(endless, run, run.data.packing_bins, seed)
    loss_from = cut.loss_from
    made = rows.batch(run.data.batch).map(lambda rows: as_batch(rows, loss_from, byte_count))
    return grain.experimental.ThreadPrefetchIterDataset(made, prefetch_buffer_size=AHEAD)


def held_out_batches(cut: Cut, run: Run, byte_count: ByteCount) -> list[Batch]:
    """At most evaluation.rows rows, in batches of one shape; the last is padded.

    Rows of a stream are evenly spaced in it; packed rows hold items that the seed of what is
    held out chooses.
    """
    seed, most = _seed(run.held_out_seed), run.evaluation.rows
    if isinstance(cut, Stream):
        count = min(most, len(cut))
        rows = [cut[i * len(cut) // count] for i in range(count)]
    else:
        items = grain.MapDataset.source(cut).seed(seed).shuffle()
        rows = list(islice(_rows(items, run, min(most, run.data.packing_bins), seed), most))
    return list(padded_batches(rows, min(run.data.batch, len(rows)), cut.loss_from, byte_count))


def padded_batches(rows: Iterable[Item], size: int, loss_from: int, byte_count: ByteCount) -> Iterator[Batch]:
    """The rows in batches of `size`, the last filled up with padding; the rest as `as_batch`."""
    left = iter(rows)
    while part := list(islice(left, size)):
        padding = {name: np.zeros_like(part[0][name]) for name in (TOKENS, SEGMENTS, CONTEXT)}
        part += [padding] * (size - len(part))
        yield as_batch(
            {name: np.stack([row[name] for row in part]) for name in padding}, loss_from, byte_count
        )


def _rows(items: grain.MapDataset, run: Run, bins: int, seed: int) -> grain.IterDataset:
    """The items packed into rows. No threads read: the tokens are in memory or memory-mapped."""
    one_by_one = items.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    if run.data.rows == "chunked":
        return one_by_one
    return grain.experimental.FirstFitPackIterDataset(
        one_by_one, length_struct={TOKENS: run.data.length}, num_packing_bins=bins, seed=seed
    )


def _seed(number: int) -> int:
    """A seed in the 32 bits that grain takes."""
    return int(np.random.SeedSequence(number).generate_state(1)[0])
