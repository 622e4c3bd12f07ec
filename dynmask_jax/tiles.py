"""The mask between one block of queries and one block of keys."""

import jax.numpy as jnp

from dynmask_jax.array_typing import Array, Bool, pytree, static
from dynmask_jax.indexing import tree_at
from dynmask_jax.mask_algebra import Mask, visible_pairs
from dynmask_jax.tokens import Tokens


@pytree
class Tiles:
    """A plan's tokens cut into blocks, so that a loop takes each with one slice. Made by `tiles_of`.

    Attributes:
      mask: the plan's mask.
      q: queries, `[R, Tb, bq]`; k: keys, `[R, Sb, bk]`.
      lengths: T and S.
    """

    mask: Mask
    q: Tokens
    k: Tokens
    lengths: tuple[int, int] = static()

    def visible(
        self, row, i, j, *, keys_first: bool = False
    ) -> Bool[Array, "*N bq bk"] | Bool[Array, "*N bk bq"]:
        """The mask between block i of queries and block j of keys: `[bq, bk]`, or `[N, bq, bk]`.

        With `keys_first`, `[bk, bq]` and `[N, bk, bq]`. False at the padding of a ragged block.
        """
        seen = visible_pairs(
            self.mask, tree_at(self.q, row, i), tree_at(self.k, row, j), keys_first=keys_first
        )
        (t, s), bq, bk = self.lengths, self.q.shape[-1], self.k.shape[-1]
        if t % bq == 0 and s % bk == 0:
            return seen
        q_inside, k_inside = (
            n * size + jnp.arange(size, dtype=jnp.int32) < end for n, size, end in ((i, bq, t), (j, bk, s))
        )
        outer, inner = (k_inside, q_inside) if keys_first else (q_inside, k_inside)
        return seen & jnp.broadcast_to(outer[:, None] & inner[None, :], seen.shape)
