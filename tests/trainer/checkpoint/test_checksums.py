"""Checksums of arrays: every changed bit is seen, and sharding does not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from train.checkpoint import checksums
from train.checkpoint.checksums import leaves


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_a_checksum_sees_every_changed_number(dtype):
    whole = np.arange(40) % 2
    others = [np.where(np.arange(40) == i, 1 - whole, whole) for i in range(40)]
    assert len({leaves({"x": jnp.asarray(x, dtype)})["x"][2] for x in (whole, *others)}) == 41


def test_a_checksum_tells_zeros_of_either_sign_and_one_nan_from_another():
    bits = jnp.asarray([0, 2**31, 0x7FC00000, 0x7FC00001], jnp.uint32)
    numbers = jax.lax.bitcast_convert_type(bits, jnp.float32)
    assert len({leaves({"x": number})["x"][2] for number in numbers}) == 4


@pytest.mark.parametrize("spread", [P("a", "b"), P("b"), P(None, ("a", "b")), P()])
def test_a_checksum_is_the_same_on_any_mesh_and_brings_nothing_together(spread):
    numbers = jax.random.normal(jax.random.key(0), (16, 24, 8)).astype(jnp.bfloat16)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    apart = jax.device_put(numbers, jax.sharding.NamedSharding(mesh, spread))
    assert leaves({"x": apart}) == leaves({"x": numbers})
    compiled = checksums._checksums.lower({"x": apart}).compile().as_text()
    assert "all-gather" not in compiled
