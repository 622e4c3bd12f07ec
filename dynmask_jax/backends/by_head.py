"""Attention under a mask with per-head leaves, at the cost of what each head shows.

A plan's codes are merged over heads, so one head that sees all would make every head pay. Key heads are
computed one after the other instead, each with its G query heads, under a plan with the codes of these alone.
The passes get smaller calls of the same kind, and know nothing of it.

The plan does not keep the codes of each head, which would be N times as large. They are found in each pass:
that costs O(Tb·Sb), as much as to merge kept codes over G heads.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dynmask_jax.array_typing import Array
from dynmask_jax.backends.backend import Backend, as_summed
from dynmask_jax.bias_algebra import learnable
from dynmask_jax.block_codes import TEST
from dynmask_jax.mask_algebra import head_count
from dynmask_jax.plans import Plan, plan_as
from dynmask_jax.scores import Scores


def by_key_head(backend: Backend) -> Backend:
    """The backend, which takes one key head at a time where leaves of the mask are per head."""
    return replace(
        backend, forward=_Forward(backend.forward), sums=_Sums(backend), shaped=_Shaped(backend.shaped)
    )


@dataclass(frozen=True)
class _Forward:
    """A forward pass of one key head at a time. A record, so that backends of equal passes are equal."""

    forward: Callable

    def __call__(self, scores: Scores, q, k, v, plan: Plan):
        if head_count(plan.mask) is None:
            return self.forward(scores, q, k, v, plan)

        def of_group(own: _Group):
            operands = own.queries(q), *own.keys((k, v))
            return self.forward(own.leaves(scores), *operands, own.plan(plan))

        return jax.tree.map(_joined, _over_groups(of_group, q, k))


@dataclass(frozen=True)
class _Sums:
    """A backward pass, likewise. Of heads one by one, gradients are in the shapes of their arrays."""

    backend: Backend

    def __call__(self, scores: Scores, saved: tuple, cotangents: tuple):
        q, k, v, plan, out, lse = saved
        if head_count(plan.mask) is None:
            return self.backend.sums(scores, saved, cotangents)

        def of_group(own: _Group):
            operands = own.queries(q), *own.keys((k, v)), own.plan(plan), *own.queries((out, lse))
            return self.backend.gradients(own.leaves(scores), operands, own.queries(cotangents))

        *found, d_bias = _over_groups(of_group, q, k)
        numbers, _ = learnable(scores.bias)
        d_bias = [
            x.reshape(-1, *x.shape[2:]) if jnp.ndim(number) else x.sum(axis=0)
            for x, number in zip(d_bias, numbers, strict=True)
        ]
        return *map(_joined, found), d_bias


@dataclass(frozen=True)
class _Shaped:
    """What brings the gradients of `_Sums` into shape, where they are not."""

    shaped: Callable

    def __call__(self, scores: Scores, gradients: tuple, saved: tuple):
        shaped = self.shaped if head_count(saved[3].mask) is None else as_summed
        return shaped(scores, gradients, saved)


class _Group(NamedTuple):
    """One key head and the query heads that read it.

    Attributes:
      number: of the key head.
      size: G.
    """

    number: Array
    size: int

    def queries(self, tree):
        """Of arrays `[B, T, N, …]` the group's heads."""
        return self._slices(tree, self.size, axis=2)

    def keys(self, tree):
        """Of arrays `[B, S, K, …]` the group's head."""
        return self._slices(tree, 1, axis=2)

    def leaves(self, tree):
        """Of leaves `[N, …]` the group's; scalars as they are."""
        return jax.tree.map(lambda x: self._slices(x, self.size, axis=0) if jnp.ndim(x) else x, tree)

    def plan(self, whole: Plan) -> Plan:
        """The group's plan: it skips the blocks that no head of the group sees."""
        mask = self.leaves(whole.mask)
        own = plan_as(whole, mask)

        def known(of_all, of_own):
            # What is known of all heads holds for these. It may be more than the mask says of the tokens now.
            return jnp.where(of_all == TEST, of_own, of_all)

        codes, fine = jax.tree.map(known, (whole.codes, whole.fine), (own.codes, own.fine))
        return replace(whole, mask=mask, codes=codes, fine=fine)

    def _slices(self, tree, size: int, *, axis: int):
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, self.number * size, size, axis), tree)


def _over_groups(of_group: Callable, q, k):
    """Results of all groups, stacked `[K, …]`."""
    heads, key_heads = q.shape[2], k.shape[2]
    numbers = jnp.arange(key_heads, dtype=jnp.int32)
    return lax.map(lambda number: of_group(_Group(number, heads // key_heads)), numbers)


def _joined(x: Array) -> Array:
    """Of groups `[K, B, T, G, …]`: `[B, T, N, …]`."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])
