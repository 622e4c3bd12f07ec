"""Attention over a sequence that lies on a ring of devices: keys travel, as far as the mask shows them.

Each device keeps its queries. Shards of keys go from device to device in two arcs: forward, so that a
device receives those of the devices before it, nearest first, and then backward, from those after it.
The lengths of the arcs are data, the same on all devices: the least that bring every device the shards
in which its queries see anything. So one program serves a whole curriculum, which begins with a hop, or
none, and ends with all of them, and no layout of tokens is favoured.

A shard is sent on while it is attended to. Each device keeps the last shards that came, two; from there
the backward pass brings all shards home, and with them the gradients of their keys, which grow on
the way.

References: Liu et al. 2023, "Ring Attention", arXiv:2310.01889; the partial results are joined as in
Milakov & Gimelshein 2018, arXiv:1805.02867.
"""

import jax
import jax.numpy as jnp
from jax import lax

from dynmask_jax.array_typing import Array, Int, sum_dtype
from dynmask_jax.block_codes import SKIP
from dynmask_jax.context.arcs import shortest_arcs
from dynmask_jax.context.sequence_axis import SequenceAxis, with_gradients
from dynmask_jax.online_softmax import Partial, merge, normalize
from dynmask_jax.plans import Plan, plan
from dynmask_jax.vma import agreed, vary_like

AHEAD, BEHIND = 1, -1


def _forward(sequence: SequenceAxis, q, k, v, local: Plan):
    def visit(distance, keys) -> Partial:
        seen = part(local, sequence.owner(distance), sequence.devices)
        return Partial.of(*sequence.backend.forward(sequence.scores, q, *keys, seen))

    nothing = vary_like(Partial.empty(q.shape, sum_dtype(q.dtype)), q, k, local)
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


def _gradients(sequence: SequenceAxis, saved, kept, cotangents):
    q, k, v, local, out, lse = saved

    def visit(distance, keys):
        seen = part(local, sequence.owner(distance), sequence.devices)
        shares = sequence.backend.gradients(sequence.scores, (q, *keys, seen, out, lse), cotangents)
        return tuple(x.astype(lse.dtype) for x in shares)

    def arc(direction: int, length, last, d_q):
        """Brings home the shards of an arc, the farthest first, which is where the forward pass left it."""

        def step(turn, carry):
            keys, d_keys, d_q = carry
            share_q, *shares = visit(direction * (length - turn), keys)
            # The keys may set out at once, and their gradients while those of the queries are computed.
            keys = sequence.shift(keys, -direction)
            d_keys = sequence.shift(jax.tree.map(jnp.add, d_keys, tuple(shares)), -direction)
            return keys, d_keys, d_q + share_q

        nothing = vary_like((jnp.zeros(k.shape, lse.dtype),) * 2, q, k, local)
        _, d_keys, d_q = lax.fori_loop(0, length, step, (last, nothing, d_q))
        return d_keys, d_q

    ahead, behind = arcs(local, sequence.axis, sequence.mesh_axes, sequence.devices)
    d_q = vary_like(jnp.zeros(q.shape, lse.dtype), q, k, local)
    (k_ahead, v_ahead), d_q = arc(AHEAD, ahead, kept[0], d_q)
    (k_behind, v_behind), d_q = arc(BEHIND, behind, kept[1], d_q)
    home_q, home_k, home_v = visit(jnp.int32(0), (k, v))
    return (
        (d_q + home_q).astype(q.dtype),
        (k_ahead + k_behind + home_k).astype(k.dtype),
        (v_ahead + v_behind + home_v).astype(v.dtype),
    )


def _meanwhile(coming, found: Partial):
    """Both, the transfer to be done before what the kernel found is merged.

    Else XLA's scheduler for TPU hides a large shard's transfer behind the merge alone, which is memory
    traffic itself, and not behind the kernel.
    """
    return lax.optimization_barrier((coming, found))


attend_on_ring = with_gradients(_forward, _gradients)


def part(local: Plan, owner, shards: int) -> Plan:
    """The device's plan for the keys of one owner."""
    size = local.lengths[1] // shards
    tokens = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, owner * size, size, axis=1), local.kv_tokens)
    if size % local.block_k:  # the shard is cut into blocks of its own
        return plan(local.mask, local.q_tokens, tokens, block_q=local.block_q, block_k=local.block_k)
    blocks = size // local.block_k
    codes = lax.dynamic_slice_in_dim(local.codes, owner * blocks, blocks, axis=2)
    return Plan(local.mask, local.q_tokens, tokens, codes, local.block_q, local.block_k)


def arcs(
    local: Plan, axis: str, mesh_axes: tuple[str, ...], devices: int
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """How far keys travel forward and backward along an axis, the same on all devices of the mesh."""
    distances = jnp.arange(devices, dtype=jnp.int32)
    owners = (lax.axis_index(axis) - distances) % devices
    sees = jax.vmap(lambda owner: (part(local, owner, devices).codes != SKIP).any())(owners)
    return shortest_arcs(agreed(sees.astype(jnp.int32), mesh_axes) > 0)
