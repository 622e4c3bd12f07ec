"""Attention over a sequence that lies on a ring of devices: keys travel, as far as the mask shows them.

Each device keeps its queries. Shards of keys go from device to device in two arcs: forward, so that a
device receives those of the devices before it, nearest first, and then backward, from those after it.
The lengths of the arcs are data, the same on all devices: the least that bring every device the shards
in which its queries see anything. So one program serves a whole curriculum, which begins with a hop, or
none, and ends with all of them, and no layout of tokens is favoured.

A shard is sent on while it is attended to. Each device keeps the last shards that came, two; from there
the backward pass brings all shards home, and a hop behind them the gradients of their keys, which grow on
the way: a device computes its share of them while those of the devices before it come.

References: Liu et al. 2023, "Ring Attention", arXiv:2310.01889; the partial results are joined as in
Milakov & Gimelshein 2018, arXiv:1805.02867.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax

from dynmask_jax.array_typing import Array, Int, sum_dtype
from dynmask_jax.block_codes import SKIP
from dynmask_jax.context.arcs import shortest_arcs
from dynmask_jax.context.sequence_axis import SequenceAxis, with_gradients
from dynmask_jax.online_softmax import Partial, merge, normalize
from dynmask_jax.plans import Plan, plan_like
from dynmask_jax.scores import Scores
from dynmask_jax.vma import agreed, vary_like

AHEAD, BEHIND = 1, -1


def _forward(sequence: SequenceAxis, scores: Scores, qkv: tuple, local: Plan):
    q, k, v = qkv

    def visit(distance, keys) -> Partial:
        seen = part(local, sequence.owner(distance), sequence.devices)
        return Partial.of(*sequence.backend.forward(scores, q, *keys, seen))

    shape = (*q.shape[:3], v.shape[3])
    nothing = vary_like(Partial.empty(shape, sum_dtype(q.dtype)), q, k, local)
    ahead, behind = arcs(local, sequence.axis, sequence.mesh_axes, sequence.devices)

    def go_ahead(distance, carry):
        keys, partial = carry
        coming, found = _meanwhile(sequence.shift(keys, AHEAD), visit(distance, keys))
        return coming, merge(partial, found)

    def go_behind(distance, carry):
        # The first turn visits the last shard of the other arc, which has come but was not yet seen.
        travelling, (waiting_distance, waiting), partial = carry
        coming, found = _meanwhile(sequence.shift(travelling, BEHIND), visit(waiting_distance, waiting))
        return coming, (-(distance + 1), coming), merge(partial, found)

    last_ahead, partial = lax.fori_loop(0, ahead, go_ahead, ((k, v), nothing))
    start = (k, v), (ahead, last_ahead), partial
    last_behind, (distance, keys), partial = lax.fori_loop(0, behind, go_behind, start)
    out, lse = normalize(merge(partial, visit(distance, keys)))
    return (out.astype(q.dtype), lse), (last_ahead, last_behind)


def _gradients(sequence: SequenceAxis, scores: Scores, saved, kept, cotangents):
    q, k, v, local, out, lse = saved

    def visible(distance):
        return part(local, sequence.owner(distance), sequence.devices)

    def visit(distance, keys):
        """Shares of the gradients of the keys and values there, and of the queries and the bias.

        As the backend sums them: what brings them into shape is a copy, and done once for all visits.
        """
        saved = q, *keys, visible(distance), out, lse
        d_q, d_k, d_v, d_bias = sequence.backend.sums(scores, saved, cotangents)
        return (d_k, d_v), (d_q, d_bias)

    def arc(direction: int, length, carry):
        """Brings home the shards of an arc, from the second one on, and the gradients of all their keys."""

        def on(arrays):
            return sequence.shift(arrays, -direction)

        def step(turn, carry):
            keys, d_keys, staying = carry
            # The gradients that set out are those of the shard that was visited before.
            coming, (shares, share) = _meanwhile(
                (on(keys), on(d_keys)), visit(direction * (length - turn), keys)
            )
            return coming[0], _sum(coming[1], shares), _sum(staying, share)

        last, d_keys, staying = carry
        second = _once(length > 1, on, last)
        _, d_keys, staying = lax.fori_loop(1, length, step, (second, d_keys, staying))
        return _once(length > 0, on, d_keys), staying

    ahead, behind = arcs(local, sequence.axis, sequence.mesh_axes, sequence.devices)
    shards, distances = ((k, v), *kept), jnp.stack([jnp.int32(0), ahead, -behind])

    def first(staying, at):
        """Of the device's own keys, and of those that the forward pass left here last, if any came."""
        keys = jax.tree.map(lambda *each: lax.select_n(at, *each), *shards)
        came = (at == 0) | (distances[at] != 0)
        shares, share = lax.cond(came, visit, lambda *_: nothing, distances[at], keys)
        return _sum(staying, share), jax.tree.map(lambda x: x.astype(wide), shares)

    wide, kinds = lse.dtype, jax.eval_shape(visit, jnp.int32(0), (k, v))
    nothing = jax.tree.map(lambda x: vary_like(jnp.zeros(x.shape, x.dtype), q, k, v, local), kinds)
    zeros = jax.tree.map(lambda x: x.astype(wide), nothing[1])
    staying, shares = lax.scan(first, zeros, jnp.arange(3, dtype=jnp.int32))
    at_home, ahead_keys, behind_keys = (jax.tree.map(lambda x, at=at: x[at], shares) for at in range(3))
    ahead_keys, staying = arc(AHEAD, ahead, (kept[0], ahead_keys, staying))
    behind_keys, (d_q, d_bias) = arc(BEHIND, behind, (kept[1], behind_keys, staying))
    d_k, d_v = _sum(_sum(ahead_keys, behind_keys), at_home)
    saved = q, k, v, visible(0), out, lse
    return sequence.backend.shaped(scores, (d_q, d_k, d_v, d_bias), saved)


def _sum(total, more):
    """Trees of arrays added, in the types of the first."""
    return jax.tree.map(lambda x, y: x + y.astype(x.dtype), total, more)


def _once(needed, function, arrays):
    """`function(arrays)` where it is needed, by all devices or none."""
    return lax.fori_loop(0, needed.astype(jnp.int32), lambda _, arrays: function(arrays), arrays)


def _meanwhile(coming, found):
    """Both, the transfer to be done before what the kernel found is merged or added.

    Else XLA's scheduler for TPU hides a large shard's transfer behind that alone, which is memory traffic
    itself, and not behind the kernel.
    """
    return lax.optimization_barrier((coming, found))


attend_on_ring = with_gradients(_forward, _gradients)


def part(local: Plan, owner, shards: int) -> Plan:
    """The device's plan for the keys of one owner."""
    size = local.lengths[1] // shards
    tokens = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, owner * size, size, axis=1), local.kv_tokens)
    if size % local.block_k:  # the shard is cut into blocks of its own
        return plan_like(local, local.mask, local.q_tokens, tokens)

    def of_owner(codes):
        blocks = codes.shape[2] // shards
        return lax.dynamic_slice_in_dim(codes, owner * blocks, blocks, axis=2)

    codes, fine = jax.tree.map(of_owner, (local.codes, local.fine))
    return replace(local, kv_tokens=tokens, codes=codes, fine=fine)


def arcs(
    local: Plan, axis: str, mesh_axes: tuple[str, ...], devices: int
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """How far keys travel forward and backward along an axis, the same on all devices of the mesh."""
    distances = jnp.arange(devices, dtype=jnp.int32)
    owners = (lax.axis_index(axis) - distances) % devices
    sees = jax.vmap(lambda owner: (part(local, owner, devices).codes != SKIP).any())(owners)
    return shortest_arcs(agreed(sees.astype(jnp.int32), mesh_axes) > 0)
