"""Attention over a sequence that lies on several devices: each gathers all keys and attends with its queries.

One collective in place of a ring's many, where all keys fit a device. What the mask hides is not
computed, but travels. The keys are gathered again in the backward pass, so none of them is kept.
"""

import jax
from jax import lax

from dynmask_jax.context.sequence_axis import SequenceAxis, with_gradients
from dynmask_jax.plans import Plan
from dynmask_jax.scores import Scores


def _forward(sequence: SequenceAxis, scores: Scores, qkv: tuple, local: Plan):
    q, *shards = qkv
    return sequence.backend.forward(scores, q, *_gathered(sequence, shards), local), ()


def _gradients(sequence: SequenceAxis, scores: Scores, saved, kept, cotangents):
    q, k, v, local, out, lse = saved
    saved = q, *_gathered(sequence, (k, v)), local, out, lse
    d_q, *d_keys, d_bias = sequence.backend.gradients(scores, saved, cotangents)
    # As many roundings as devices, were the sums not wide.
    wide = (x.astype(lse.dtype) for x in d_keys)
    shares = (lax.psum_scatter(x, sequence.axis, scatter_dimension=1, tiled=True) for x in wide)
    return d_q, *(x.astype(k.dtype) for x in shares), d_bias


def _gathered(sequence: SequenceAxis, shards):
    """Shards `[B, S / devices, …]` of all devices, in their order: `[B, S, …]`."""
    return jax.tree.map(lambda x: lax.all_gather(x, sequence.axis, axis=1, tiled=True), shards)


attend_to_gathered = with_gradients(_forward, _gradients)
