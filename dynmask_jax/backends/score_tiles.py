"""Bias and dropout on one tile, for the loops of the XLA backends."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dynmask_jax.array_typing import Array, Bool, Float, Int, pytree, static
from dynmask_jax.backends.blocks import Blocks, Cut, Heads, visible_columns, visible_rows
from dynmask_jax.bias_algebra import by_group, learnable, score_pairs
from dynmask_jax.find_codes import blocks_of
from dynmask_jax.indexing import at, tree_at
from dynmask_jax.plans import Plan, tiles_of
from dynmask_jax.scores import Scores
from dynmask_jax.tiles import Tiles
from dynmask_jax.vma import vary_like


class Place(NamedTuple):
    """Where a tile is: sequence b, the plan's row for it, its heads, block i of queries and j of keys."""

    b: Array
    row: Array | int
    heads: Heads
    i: Array
    j: Array


@pytree
class ScoreTiles:
    """The scores of one call with what they need of each tile. Made by `score_tiles`.

    Tiles are `[k, rows, bk]`, or with `keys_first` `[k, bk, rows]`, of k of the K key heads; see `Blocks` for
    the rows.

    Attributes:
      scores: scale, soft cap, bias and dropout.
      tiles: the plan's tokens in blocks.
      query_words, key_words: what draws are made of, in blocks; None without dropout. They are made once for
        all tiles: within a tile a compiler would hash them anew for each pair.
      group: G, query heads of a key head.
    """

    scores: Scores
    tiles: Tiles
    query_words: tuple[Blocks, Blocks] | None
    key_words: Int[Array, "R Sb bk"] | None
    group: int = static()

    def where_tested(self, function: Callable, tested, place: Place, *, keys_first: bool = False):
        """`function(visible)`, with the mask of a tile where it is tested, and None where all is visible.

        The mask is `[*k, rows, bk]`, or `[*k, bk, rows]`; it is always evaluated where `tested` is None. To
        hide nothing in full tiles was a quarter of a forward pass on a CPU.
        """

        def alike(result):  # of one type with the mask inside shard_map
            return vary_like(result, self.tiles, place.row, place.i, place.j)

        def in_mask():
            visible = visible_columns if keys_first else visible_rows
            return alike(function(visible(self.tiles, place, self.group)))

        return in_mask() if tested is None else lax.cond(tested, in_mask, lambda: alike(function(None)))

    def biased(self, capped: Float[Array, "K a b"], place: Place, *, keys_first: bool = False):
        """A tile's logits with the bias, from those without."""
        if self.scores.bias is None:
            return capped
        return capped + self._bias(self.scores.bias, place, keys_first).astype(capped.dtype)

    def bias_gradient(self, d_logits: Float[Array, "K bk rows"], place: Place) -> list[Array]:
        """Gradients of the bias's learnable leaves, from a tile's with its keys first."""
        numbers, rebuilt = learnable(self.scores.bias)
        if not numbers:
            return []
        numbers = [jnp.asarray(number).astype(d_logits.dtype) for number in numbers]

        def tile(numbers):
            bias = self._bias(rebuilt(numbers), place, keys_first=True)
            return jnp.broadcast_to(bias, d_logits.shape).astype(d_logits.dtype)

        return jax.vjp(tile, numbers)[1](d_logits)[0]

    def no_gradient(self, dtype) -> list[Array]:
        """Zeros, from which gradients of the bias are summed."""
        return [jnp.zeros(jnp.shape(number), dtype) for number in learnable(self.scores.bias)[0]]

    def kept(self, pairs: Float[Array, "K a b"], place: Place, *, keys_first: bool = False):
        """A tile's numbers, 0 for the pairs that are dropped."""
        if self.scores.dropout is None:
            return pairs
        return jnp.where(self._kept(place, keys_first), pairs, 0.0)

    def rescaled(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """x over 1 − rate: what dropout makes of weights that are kept."""
        return x if self.scores.dropout is None else x * self.scores.dropout.scale.astype(x.dtype)

    def _bias(self, bias, place: Place, keys_first: bool) -> Float[Array, "*K a b"]:
        q, k = tree_at(self.tiles.q, place.row, place.i), tree_at(self.tiles.k, place.row, place.j)

        def pairs(one_head):
            return score_pairs(one_head, q, k, keys_first=keys_first)

        own, count = place.heads.of(bias, self.group), place.heads.size
        tile = by_group(own, pairs, count * self.group, count)  # [k, G, …]
        tile = jnp.broadcast_to(tile, (tile.shape[0], self.group, *tile.shape[2:]))
        if keys_first:
            return tile.swapaxes(1, 2).reshape(tile.shape[0], tile.shape[2], -1)
        return tile.reshape(tile.shape[0], -1, tile.shape[3])

    def _kept(self, place: Place, keys_first: bool) -> Bool[Array, "K a b"]:
        assert self.scores.dropout is not None
        assert self.query_words is not None
        assert self.key_words is not None
        first, second = (words.rows(place.b, place.i, 1, place.heads) for words in self.query_words)
        of_keys = at(self.key_words, place.row, place.j)
        if keys_first:
            return self.scores.dropout.kept(first[:, None], second[:, None], of_keys[None, :, None])
        return self.scores.dropout.kept(first[..., None], second[..., None], of_keys[None, None])


def score_tiles(scores: Scores, plan: Plan, group: int) -> ScoreTiles:
    """The scores of a call, for the plan's tiles."""
    query_words = key_words = None
    if scores.dropout is not None:
        cut = Cut(plan.block_q)
        first, second = (Blocks.of(x, cut, group) for x in scores.dropout.of_queries(plan.q_tokens))
        query_words = first, second
        key_words = blocks_of(scores.dropout.of_keys(plan.kv_tokens), plan.block_k)
    return ScoreTiles(scores, tiles_of(plan), query_words, key_words, group)
