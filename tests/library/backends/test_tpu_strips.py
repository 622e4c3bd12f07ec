"""Strips of keys: of a partial tile the TPU kernels compute those alone that show anything."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import HEADS, MASKS, Shape
from slow import mostly

from dynmask_jax import ALiBi, Causal, Chunks, Dropout, Predicate, Tokens, mask_tensor
from dynmask_jax.backends.tpu_strips import strip_size, strips_of
from dynmask_jax.block_codes import FULL
from dynmask_jax.plans import plan_in
from tests.library.test_attention import assert_same, results

SHAPE = Shape(batch=2, queries=300, keys=1100, block_q=256, block_k=512)
STRIP = 128


def plan_of(mask, shape: Shape = SHAPE, fine: tuple[int, int] = (128, 128)):
    return plan_in(mask, *shape.tokens(), blocks=(shape.block_q, shape.block_k), fine=fine)


def of_strips(*places: int):
    """A mask that shows these strips of every four."""
    return Predicate(_strips, jnp.int32(sum(1 << place for place in places)))


def _strips(q, k, shown):
    strip = k.position // STRIP % 4
    # A comparison for each: blocks are read over spans, and shifts are not.
    of = [((shown // (1 << place)) % 2 == 1) & (strip == place) for place in range(4)]
    return of[0] | of[1] | of[2] | of[3]


def test_words():
    """How many strips of each block show anything, then which."""
    tokens = Tokens.sequence(1024)
    seen = plan_in(Causal() & Chunks(384), tokens, tokens, blocks=(256, 512), fine=(128, 128))
    strips = strips_of(seen)
    assert strips is not None
    numbers = [[(int(word) >> 4 * at) & 15 for at in range(5)] for word in np.asarray(strips)[0].ravel()]
    assert numbers == [
        [2, 0, 1, 0, 0],
        [0, 0, 0, 0, 0],
        [4, 0, 1, 2, 3],
        [0, 0, 0, 0, 0],
        [1, 3, 0, 0, 0],
        [2, 0, 1, 0, 0],
        [0, 0, 0, 0, 0],
        [2, 2, 3, 0, 0],
    ]


@pytest.mark.parametrize(
    ("blocks", "fine", "size"),
    [
        ((256, 512), (128, 128), 128),
        ((256, 512), (256, 256), 256),
        ((256, 1024), (128, 128), 256),
        ((256, 256), (64, 64), 128),
        ((256, 128), (128, 128), None),
        ((256, 512), (128, 512), None),
        ((256, 200), (128, 200), None),
    ],
)
def test_keys_in_a_strip(blocks, fine, size):
    tokens = Tokens.sequence(2048)
    assert strip_size(plan_in(Causal(), tokens, tokens, blocks=blocks, fine=fine)) == size


@pytest.mark.parametrize("mask_name", ["causal", "window", "same_segment", "random_chunks"])
def test_a_strip_that_is_left_out_shows_nothing(mask_name):
    shape = Shape(batch=2, queries=300, keys=700)
    q, k = shape.tokens()
    seen = plan_in(MASKS[mask_name], q, k, blocks=(64, 512), fine=(32, 64))
    shown = np.asarray(mask_tensor(MASKS[mask_name], q, k)).reshape(-1, 300, 700)
    shown = np.pad(shown, ((0, 0), (0, -300 % 64), (0, -700 % 512)))
    shown = shown.reshape(2, -1, 64, 2, 4, STRIP).any(axis=(2, 5))
    words = np.asarray(strips_of(seen))[..., None]
    listed = (words >> (4 * np.arange(1, 5))) & 15
    valid = np.arange(4) < (words & 15)
    computed = ((listed[..., None] == np.arange(4)) & valid[..., None]).any(axis=-2)
    assert not (shown & ~computed).any()
    assert not computed.all()


PLAIN = jax.jit(results, static_argnames="backend")
"""Masks that differ in their leaves alone are one program."""


def assert_strips_are_dense(mask, dtype=jnp.float32, shape: Shape = SHAPE, **options):
    the_plan = plan_of(mask, shape)
    assert strips_of(the_plan) is not None
    run = jax.jit(functools.partial(results, **options), static_argnames="backend") if options else PLAIN
    actual, expected = (run(*shape.qkv(dtype), the_plan, backend=name) for name in ("tpu", "dense"))
    assert_same(actual, expected, dtype)


@pytest.mark.parametrize(
    "places", mostly(["0", "3", "01", "13", "012", "023", "0123"], ["3", "13", "023", "0123"])
)
def test_these_strips_alone(places):
    mask = of_strips(*map(int, places))
    words = np.asarray(strips_of(plan_of(mask)))
    assert len(places) in set(words.ravel() & 15)
    assert_strips_are_dense(mask & Causal())


@pytest.mark.slow  # all numbers of strips above, bfloat16 below
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("mask_name", ["causal", "same_segment", "per_head_window"])
def test_masks_whose_tiles_have_all_numbers_of_strips(mask_name, dtype):
    assert_strips_are_dense(MASKS[mask_name], dtype)


OPTIONS = {"bias": ALiBi.for_heads(HEADS), "dropout": Dropout(0.3, jax.random.key(5)), "soft_cap": 2.0}
EACH_AND_ALL = [(name,) for name in OPTIONS] + [(*OPTIONS,)]


@pytest.mark.parametrize(
    "names",
    [pytest.param(x, marks=[] if len(x) > 1 else pytest.mark.slow, id="+".join(x)) for x in EACH_AND_ALL],
)
def test_every_option_on_strips(names):
    assert_strips_are_dense(of_strips(1) | Chunks(200), **{name: OPTIONS[name] for name in names})


@pytest.mark.parametrize("dtype", mostly([jnp.float32, jnp.bfloat16], [jnp.bfloat16]))
def test_full_tiles_beside_strips(dtype):
    shape = Shape(batch=1, queries=512, keys=1024, block_q=256, block_k=512)
    mask = Predicate(lambda q, k: (q.position >= 256) | (k.position // STRIP == 6))
    assert FULL in np.asarray(plan_of(mask, shape).codes)
    assert_strips_are_dense(mask, dtype, shape)
