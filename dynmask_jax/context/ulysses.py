"""Attention over a sequence that lies on several devices: heads are sharded for a while instead of tokens.

Each device trades its part of the sequence in all heads for the whole sequence in a part of the heads,
attends, and trades back. So it needs at least as many heads as devices, query heads and key heads.

Reference: Jacobs et al. 2023, "DeepSpeed Ulysses", arXiv:2309.14509.
"""

import dataclasses

import jax
from jax import lax

from dynmask_jax.backends.backend import Backend
from dynmask_jax.dispatch import attend
from dynmask_jax.partitioning import Partitioning
from dynmask_jax.plans import Plan
from dynmask_jax.scores import Scores


def attend_by_heads(partitioning: Partitioning, backend: Backend, scores: Scores, own: Plan, shards: tuple):
    """`(out, lse)` of this device's shards of q, k and v; `own` is for the whole sequence."""
    q, k, v = (lax.all_to_all(x, partitioning.axis, 2, 1, tiled=True) for x in shards)
    own, scores = (
        dataclasses.replace(own, mask=partitioning.own_heads(own.mask)),
        partitioning.own_heads(scores),
    )
    results = attend(q, k, v, None, own, scores, backend=backend)
    return jax.tree.map(lambda x: lax.all_to_all(x, partitioning.axis, 1, 2, tiled=True), results)
