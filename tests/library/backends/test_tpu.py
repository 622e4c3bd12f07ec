"""What only the TPU backend has: its flat list of blocks, its refusals. The battery covers its results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MASKS, SHAPES, Shape, enable_x64
from slow import mostly

from dynmask_jax import Predicate, Tokens, Unsupported, attention, plan
from dynmask_jax.backends import tpu_grid
from dynmask_jax.backends.tpu_lists import active_blocks
from dynmask_jax.block_codes import FULL, SKIP, TEST
from tests.library.test_attention import assert_backend_is_dense


def test_the_list_of_active_blocks():
    """Lines of two rows, of which one shows nothing: it is listed once, for its zeros."""
    codes = jnp.array([[FULL, SKIP, TEST], [SKIP, SKIP, SKIP], [SKIP, TEST, SKIP]], jnp.int8)
    active, length = active_blocks(codes, jnp.array([0, 0, 3]))
    used = [
        (int(active.line[i]), int(active.column[i]), *(int(x) for x in active.at(i)))
        for i in range(int(length))
    ]
    assert used == [(0, 0, FULL, 1, 0), (0, 2, TEST, 0, 1), (1, 0, SKIP, 1, 1), (2, 4, TEST, 1, 1)]


@pytest.mark.parametrize("most", mostly([1, 4, 7], [4]))
@pytest.mark.parametrize("shape_name", mostly(["ragged", "one_kv_head"], ["ragged"]))
def test_a_list_too_long_is_done_in_groups(most, shape_name, monkeypatch):
    """Groups of one line, of one that does not divide the lines, and of several."""
    monkeypatch.setattr(tpu_grid, "MOST_BLOCKS", most)
    jax.clear_caches()  # a program made before would still hold the old number
    assert_backend_is_dense(MASKS["same_segment"], SHAPES[shape_name], "tpu")


@pytest.mark.parametrize(("block_q", "block_k"), mostly([(128, 128), (256, 128), (100, 200)], [(100, 200)]))
def test_blocks_of_whole_registers_and_others(block_q, block_k):
    shape = Shape(batch=1, queries=300, keys=270, block_q=block_q, block_k=block_k)
    assert_backend_is_dense(MASKS["window"] | MASKS["same_segment"], shape, "tpu", soft_cap=2.0)


@pytest.mark.parametrize(("block_q", "block_k"), mostly([(128, 128), (256, 128)], [(256, 128)]))
@pytest.mark.parametrize("mask_name", mostly(["everything", "causal"], ["causal"]))
def test_full_blocks_beside_tested_ones(mask_name, block_q, block_k):
    """Only blocks of whole registers are ever full in the forward pass."""
    shape = Shape(batch=1, queries=512, keys=400, block_q=block_q, block_k=block_k)
    codes = plan(MASKS[mask_name], *shape.tokens(), block_q=block_q, block_k=block_k).codes
    assert {FULL, TEST} <= set(np.unique(codes))
    assert_backend_is_dense(MASKS[mask_name], shape, "tpu")


def test_leaves_of_unsigned_numbers_keep_their_sign():
    def above(q, k, seed):
        return (seed >> 31) == (k.position >= 0).astype(jnp.uint32)

    mask = Predicate(above, jnp.uint32(2**31))
    with pytest.warns(UserWarning, match="cannot be read over blocks"):
        assert_backend_is_dense(mask, SHAPES["even"], "tpu")


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float16, jnp.uint8])
def test_leaves_of_other_types_are_refused(dtype):
    mask = Predicate(lambda q, k, n: q.position - k.position < n.astype(jnp.int32), dtype(5))
    with pytest.raises(Unsupported, match=r"has a leaf of (int8|float16|uint8); a kernel takes bool, int32"):
        attention(*Shape().qkv(), mask, backend="tpu")


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float64])
def test_dtypes_it_lacks_are_refused(dtype):
    with enable_x64(True):
        q, k, v = (x.astype(dtype) for x in Shape().qkv())
        with pytest.raises(Unsupported, match=r"float32 and bfloat16, got float(16|64); backend 'xla'"):
            attention(q, k, v, MASKS["causal"], backend="tpu")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (lambda table=jnp.arange(16): table, r"closes over an array \(int32\[16\]\)"),
        (lambda table=np.arange(16): jnp.asarray(table), r"closes over an array \(int32\[16\]\)"),
        (lambda: jnp.arange(16), "uses gather, which a kernel cannot"),
    ],
)
def test_a_mask_that_looks_things_up_is_refused(table, words):
    by_table = Predicate(lambda q, k: table()[q.position % 16] < k.position)
    with pytest.warns(UserWarning, match="cannot be read over blocks"):
        the_plan = plan(by_table, Tokens.sequence(40))
    with pytest.raises(Unsupported, match=words):
        attention(*Shape().qkv(), the_plan, backend="tpu")
