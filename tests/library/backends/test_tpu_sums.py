"""Sums that a TPU kernel keeps in HBM: dq, to which every line of keys adds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MASKS, Shape
from jax.experimental.pallas import tpu as pltpu
from slow import mostly

from dynmask_jax import Causal, Predicate, Window, attention, plan
from dynmask_jax.backends import tpu_grid
from dynmask_jax.backends.tpu_sums import turns
from tests.library.test_attention import assert_backend_is_dense


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        (1, ([0, 1, 1, 2, 3, 4, 5], [1, 1, 0, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0, 1])),
        (2, ([0, 2, 4, 6, 8, 10, 12], [1] * 7, [0, 0, 1, 0, 0, 0, 0])),
        (4, ([0, 4, 8, 12, 16, 20, 24], [1] * 7, [0] * 7)),
    ],
)
def test_turns(group, expected):
    """A sum is recent where the turn before the last had it; two heads of a column come by in turns."""
    found = turns(jnp.array([5, 7, 7, 5, 6, 8, 6]), group)
    for have, want in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(have).astype(int), want)


@pytest.fixture
def copies_that_take_their_time(monkeypatch):
    """Kernels run in the interpreter that copies only when a copy is waited for, and looks for races."""
    late = pltpu.InterpretParams(dma_execution_mode="on_wait", detect_races=True)
    monkeypatch.setattr(tpu_grid, "_on_platform", functools.partial(tpu_grid._call, interpret=late))
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("copies_that_take_their_time")
@pytest.mark.parametrize(
    ("mask_name", "queries", "kv_heads"),
    mostly(
        [(*rest, kv) for kv in (2, 1) for rest in (("everything", 8), ("everything", 16), ("causal", 24))],
        [("everything", 16, 2), ("everything", 8, 1)],
    ),
)
def test_what_is_read_was_written(mask_name, queries, kv_heads):
    """One block of queries, which every step adds to; two, or two heads of one, which come by in turns."""
    shape = Shape(
        batch=1, queries=queries, keys=24, heads=2, kv_heads=kv_heads, head_dim=4, block_q=8, block_k=8
    )
    assert_backend_is_dense(MASKS[mask_name], shape, "tpu")


def _program(mask, shape: Shape):
    the_plan = plan(mask, *shape.tokens(), block_q=shape.block_q, block_k=shape.block_k)

    def loss(q, k, v):
        return (attention(q, k, v, the_plan, backend="tpu") ** 2).sum()

    return jax.jit(jax.grad(loss, (0, 1, 2)))


def test_queries_that_no_block_shows_anything():
    """Their gradients are 0 to the bit, whether their blocks are in the list or not."""
    shape = Shape(queries=48, keys=48, block_q=8)
    nothing = Predicate(lambda q, k: (q.position >= 16) & (q.position < 40))
    dq, dk, dv = _program(nothing & Causal(), shape)(*shape.qkv())
    assert not np.asarray(dq)[:, :16].any()
    assert not np.asarray(dq)[:, 40:].any()
    assert np.asarray(dq)[:, 16:40].all()
    assert np.asarray(dk)[:, :40].all()
    assert not np.asarray(dv)[:, 40:].any()


@pytest.mark.parametrize("most", mostly([2, 9, 13], [9]))
def test_groups_of_lines_change_no_bit(most, monkeypatch):
    """A sum is added up line by line, in the order of the lines, in however many calls."""
    shape = Shape(batch=1, queries=37, keys=29, heads=2, kv_heads=1, head_dim=4)
    mask = Causal() & Window(20) | Window(3, ahead=1)
    program = _program(mask, shape)
    whole = [program(*shape.qkv()) for _ in range(2)]
    monkeypatch.setattr(tpu_grid, "MOST_BLOCKS", most)
    jax.clear_caches()  # a program made before would still hold the old number
    for found in (whole[1], _program(mask, shape)(*shape.qkv())):
        jax.tree.map(np.testing.assert_array_equal, found, whole[0])
