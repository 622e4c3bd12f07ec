"""What only the TPU backend has: its flat list of blocks, its refusals. The battery covers its results."""

import jax.numpy as jnp
import numpy as np
import pytest
from cases import MASKS, SHAPES, Shape
from test_attention import assert_backend_is_dense

from dynmask_jax import Predicate, Tokens, Unsupported, attention, plan
from dynmask_jax.backends import tpu_grid
from dynmask_jax.plans import FULL, SKIP, TEST


def test_the_list_of_active_blocks():
    """Lines of two rows, of which one shows nothing: it is listed once, for its zeros."""
    codes = jnp.array([[FULL, SKIP, TEST], [SKIP, SKIP, SKIP], [SKIP, TEST, SKIP]], jnp.int8)
    active, length = tpu_grid.active_blocks(codes, jnp.array([0, 0, 3]))
    used = [
        (int(active.line[i]), int(active.column[i]), *(int(x) for x in active.at(i)))
        for i in range(int(length))
    ]
    assert used == [(0, 0, FULL, 1, 0), (0, 2, TEST, 0, 1), (1, 0, SKIP, 1, 1), (2, 4, TEST, 1, 1)]


@pytest.mark.parametrize("most", [1, 4, 7])
@pytest.mark.parametrize("shape_name", ["ragged", "one_kv_head"])
def test_a_list_too_long_is_done_in_groups(most, shape_name, monkeypatch):
    """Groups of one line, of one that does not divide the lines, and of several."""
    monkeypatch.setattr(tpu_grid, "MOST_BLOCKS", most)
    assert_backend_is_dense(MASKS["same_segment"], SHAPES[shape_name], "tpu", scale=0.5 + most / 100)


@pytest.mark.parametrize(("block_q", "block_k"), [(128, 128), (256, 128), (100, 200)])
def test_blocks_of_whole_registers_and_others(block_q, block_k):
    shape = Shape(batch=1, queries=300, keys=270, block_q=block_q, block_k=block_k)
    assert_backend_is_dense(MASKS["window"] | MASKS["same_segment"], shape, "tpu", soft_cap=2.0)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float64])
def test_dtypes_it_lacks_are_refused(dtype):
    import jax

    with jax.enable_x64(True):
        q, k, v = (x.astype(dtype) for x in Shape().qkv())
        with pytest.raises(Unsupported, match=r"float32 and bfloat16, got float(16|64); backend 'xla'"):
            attention(q, k, v, MASKS["causal"], backend="tpu")


@pytest.mark.parametrize("table", [jnp.arange(16), np.arange(16)])
def test_a_mask_that_looks_things_up_is_refused(table):
    by_table = Predicate(lambda q, k: jnp.asarray(table)[q.position % 16] < k.position)
    with pytest.warns(UserWarning, match="cannot be read over blocks"):
        the_plan = plan(by_table, Tokens.sequence(40))
    with pytest.raises(Unsupported, match=r"closes over an array \(int\d+\[16\]\)"):
        attention(*Shape().qkv(), the_plan, backend="tpu")
