"""Inside shard_map and pmap, with JAX's checks on: what one device gives, each of eight gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE
from jax.sharding import AxisType, PartitionSpec
from slow import mostly

from dynmask_jax import Causal, Tokens, Window, attention, plan
from dynmask_jax.dispatch import BACKENDS

MESH = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto, AxisType.Auto))
SPLIT = PartitionSpec("data", None, "tensor", None)
PLAN = plan(Causal() & Window(jnp.int32(5)), Tokens.sequence(24), block_q=8, block_k=8)


def arrays(batch=4):
    return tuple(jax.random.normal(jax.random.key(i), (batch, 24, 4, 8)) for i in range(3))


def loss(attend, q, k, v):
    return jnp.sin(attend(q, k, v)).sum()


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, **TOLERANCE[jnp.dtype("float32")])


@pytest.mark.parametrize("backend", mostly(BACKENDS, ["xla", "gpu"]))
def test_batch_and_heads_over_devices(backend):
    alone = functools.partial(attention, backend=backend)
    specs = (SPLIT, SPLIT, SPLIT, PartitionSpec())
    spread = jax.shard_map(alone, mesh=MESH, in_specs=specs, out_specs=SPLIT)
    actual, expected = (
        jax.jit(jax.value_and_grad(lambda *qkv, f=f: loss(lambda *a: f(*a, PLAN), *qkv), (0, 1, 2)))(
            *arrays()
        )
        for f in (spread, alone)
    )
    assert_same(jax.tree.leaves(actual), jax.tree.leaves(expected))


@pytest.mark.parametrize("backend", mostly(BACKENDS, ["xla_wide", "tpu"]))
def test_keys_that_all_devices_share_get_the_sum_of_their_gradients(backend):
    """Queries lie apart, keys and values are the same everywhere: as one batch row on each device."""
    q, k, v = arrays(2)[0], *(x[:1] for x in arrays(2)[1:])
    attend = functools.partial(attention, backend=backend)
    specs = (PartitionSpec("data"), PartitionSpec(), PartitionSpec(), PartitionSpec())
    spread = jax.shard_map(attend, mesh=MESH, in_specs=specs, out_specs=PartitionSpec("data"))

    def together(q, k, v, plan):
        return attend(q, *(jnp.broadcast_to(x, q.shape) for x in (k, v)), plan)

    actual, expected = (
        jax.jit(jax.grad(lambda *qkv, f=f: loss(lambda *a: f(*a, PLAN), *qkv), (0, 1, 2)))(q, k, v)
        for f in (spread, together)
    )
    assert_same(actual, expected)


def test_a_plan_made_inside_counts_the_same():
    tokens = Tokens(jnp.arange(48).reshape(2, 24) % 24)

    def pairs(tokens):
        return plan(Causal() & Window(5), tokens, block_q=8, block_k=8).visible_pairs()[None]

    spread = jax.shard_map(pairs, mesh=MESH, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"))
    assert spread(tokens).tolist() == [110.0, 110.0]


def test_pmap_over_the_batch():
    q, k, v = (x[:, None] for x in arrays())
    spread = jax.pmap(functools.partial(attention, backend="xla"), in_axes=(0, 0, 0, None))
    np.testing.assert_allclose(
        spread(q, k, v, PLAN)[:, 0], attention(*arrays(), PLAN), **TOLERANCE[jnp.dtype("float32")]
    )
