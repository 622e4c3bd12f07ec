"""Batches of NumPy rows in, arrays on the mesh's devices out."""

import jax
import numpy as np
from jax.sharding import Mesh

from dynmask_jax.array_typing import Array, Int
from train.data.batch import Batch
from train.parallel.mesh import ROWS, TOKENS, is_sharded, parts_of, sharding_over


def place_batch(mesh: Mesh, batch: Batch, order: Int[np.ndarray, " T"] | None = None) -> Batch:
    """A batch's rows on the devices that compute on them; each process fills its own devices.

    On a mesh of one device the batch is returned as it is, in NumPy arrays.

    Args:
      mesh: the devices.
      batch: NumPy arrays `[B, T]`, the whole batch in every process. B is a multiple of the devices that
        rows are partitioned over: see `pad_rows`.
      order: the token at each place of a row, as `layout_order` returns it; None: rows stay as they are.
    """
    if not is_sharded(mesh):
        return batch
    sharding = sharding_over(mesh, ROWS, TOKENS)

    def place(leaf: np.ndarray) -> Array:
        def part(index) -> np.ndarray:
            rows, tokens = index
            return leaf[index] if order is None else leaf[rows][:, order[tokens]]

        return jax.make_array_from_callback(leaf.shape, sharding, part)

    return jax.tree.map(place, batch)


def pad_rows(mesh: Mesh, batch: Batch) -> Batch:
    """The batch with rows of padding at its end, so that the devices of rows divide their number."""
    missing = -len(batch.inputs) % parts_of(mesh, *ROWS)
    return jax.tree.map(lambda leaf: np.pad(leaf, ((0, missing), (0, 0))), batch) if missing else batch
