"""Lines of blocks that are much longer than others are cut into chunks, each with a program of its own."""

import functools
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import HEADS, TOLERANCE, Shape
from hypothesis import given, settings
from hypothesis import strategies as st
from slow import examples, mostly

from dynmask_jax import (
    ALiBi,
    Causal,
    Dropout,
    Mask,
    Predicate,
    SameSegment,
    Sinks,
    Tokens,
    Window,
    attention,
    plan,
)
from dynmask_jax.backends.gpu import Grain, Grains, gpu_backend
from dynmask_jax.backends.gpu_chunks import chunks_of
from dynmask_jax.backends.gpu_lines import Layout, key_lists, query_lists
from dynmask_jax.backends.gpu_lists import lists_of
from dynmask_jax.backends.kernel_tile import Tile
from dynmask_jax.scores import Scores

FLOAT32 = TOLERANCE[jnp.dtype("float32")]
TILE = Grain(16, 16, 4, 1)
KEY = jax.random.key(5)
SCALED = Scores(None, None, 1.0, None)


@settings(max_examples=examples(40, thorough=400))
@given(
    seed=st.integers(0, 2**31),
    sizes=st.sampled_from([(2, 7, 40, 30), (3, 9, 12, 2), (1, 1, 40, 64), (1, 5, 33, 7), (2, 3, 2, 60)]),
)
def test_every_block_of_every_line_is_in_one_place(seed, sizes):
    rows, lines, columns, budget = sizes
    random = np.random.default_rng(seed)
    # Lines of any density: a few long ones among short ones, and empty ones.
    density = random.choice([0.0, 0.05, 0.5, 1.0], (rows, lines, 1))
    codes = random.integers(1, 3, (rows, lines, columns)) * (random.random((rows, lines, columns)) < density)
    slots = min(budget, lines * columns)
    most = min(slots // 2, lines)
    found = jax.jit(_of_codes, static_argnums=(1, 2, 3))(jnp.asarray(codes, jnp.int8), budget, slots, most)
    (chunks, long_lines), length = jax.tree.map(np.asarray, found), (codes > 0).sum(axis=2)
    assert chunks.line.shape == (rows, slots + lines)
    for row in range(rows):
        size = max(1, -(-2 * length[row].sum() // budget))
        count = -(-length[row] // size) * (length[row] > size)
        assert count.sum() <= slots
        assert (count > 0).sum() <= most
        _check_places(jax.tree.map(lambda x, row=row: x[row], chunks), codes[row], size, count, slots)
        _check_long_lines(jax.tree.map(lambda x, row=row: x[row], long_lines), count)


def _of_codes(codes, budget, slots, most):
    return chunks_of(lists_of(codes), budget, slots, most)


def _check_places(chunks, codes, size: int, count, slots: int):
    """Each line is covered by one place, if short, or else by `count` slots in a row."""
    covered = np.zeros((*codes.shape, 2), int)  # [line, place in its list, full or to test]
    for place, line in enumerate(chunks.line):
        blocks = [range(int(begin[place]), int(end[place])) for begin, end in (chunks.full, chunks.test)]
        if not chunks.stores[place]:
            assert not any(map(len, blocks))
            continue
        assert (count[line] > 0) == (place < slots)
        assert place >= slots or sum(map(len, blocks)) <= size
        for kind, places in enumerate(blocks):
            covered[line, places, kind] += 1
    numbers = np.arange(codes.shape[1])
    for kind, code in enumerate((2, 1)):  # full, test
        np.testing.assert_array_equal(
            covered[:, :, kind], numbers < (codes == code).sum(axis=1, keepdims=True)
        )
    for line in np.flatnonzero(count):
        places = np.flatnonzero(chunks.line[:slots] * (chunks.stores[:slots] > 0) == line)
        if line:  # line 0 is also that of what is not used
            np.testing.assert_array_equal(places, places[0] + np.arange(count[line]))
    stored = chunks.line[slots:][chunks.stores[slots:] > 0]
    np.testing.assert_array_equal(np.sort(stored), np.flatnonzero(count == 0))


def _check_long_lines(found, count):
    """All of them are there, with slots one after the other."""
    number = (count > 0).sum()
    assert set(found.line[:number]) == set(np.flatnonzero(count))
    np.testing.assert_array_equal(found.count[:number], count[found.line[:number]])
    assert not found.count[number:].any()
    np.testing.assert_array_equal(found.first, np.cumsum(found.count) - found.count)


def test_no_slots_where_lines_are_whole():
    lists = lists_of(jnp.asarray(np.eye(5)[None], jnp.int8))
    chunks, long_lines = chunks_of(lists, 0, 0, 0)
    assert chunks.line.shape == (1, 5)
    assert long_lines.count.shape == (1, 0)
    assert chunks.stores.all()


@dataclass(frozen=True)
class Case:
    """A call with a long line.

    Attributes:
      mask, shape, options: of the call.
      rows: whether each sequence has tokens of its own.
      keys: whether the long line is one of keys.
      busy: programs that keep the card busy.
    """

    mask: Mask
    shape: Shape = field(default_factory=lambda: Shape(queries=300, keys=310, block_q=32, block_k=16))
    options: dict = field(default_factory=dict)
    rows: bool = False
    keys: bool = False
    busy: int = 64

    def plan(self):
        q, k = Tokens.sequence(self.shape.queries), Tokens.sequence(self.shape.keys)
        if self.shape.queries == 1:
            q = Tokens(jnp.array([self.shape.keys - 1]))
        if self.rows:
            q, k = self.shape.tokens()
        return plan(self.mask, q, k, block_q=self.shape.block_q, block_k=self.shape.block_k)

    def layout(self, *, keys_first: bool) -> Layout:
        seen, shape = self.plan(), self.shape
        heads = shape.batch * (shape.kv_heads if keys_first else shape.heads)
        return Layout.of(Tile.of(SCALED, seen, keys_first=keys_first), seen, TILE, heads, self.busy)

    def backend(self, busy: int | None = None):
        return gpu_backend(Grains(TILE, TILE, TILE, busy=busy or self.busy))


GLOBAL = Predicate(lambda q, k, n: (q.position >= n) & (q.position < n + 3), 200)
"""A few queries in the middle see every key."""
SEEN_BY_ALL = Predicate(lambda q, k, n: (k.position >= n) & (k.position < n + 3), 150)
SINKS = Causal() & (Window(20) | Sinks(4))
SCORES = {"bias": ALiBi.for_heads(HEADS), "dropout": Dropout(0.3, KEY)}
CASES = {
    "global query": Case(GLOBAL | Window(9, ahead=9)),
    "key seen by all": Case(SEEN_BY_ALL | Window(9), keys=True),
    "sinks": Case(SINKS, keys=True),
    "sinks of documents": Case(SINKS & SameSegment() | Sinks(2), rows=True, keys=True),
    "decode": Case(Causal(), Shape(batch=1, queries=1, keys=700, block_k=16), busy=256),
    "decode rows": Case(
        Causal() & SameSegment(), Shape(queries=20, keys=600, block_q=32, block_k=16), rows=True
    ),
    "one key head": Case(SINKS, Shape(1, 300, 300, kv_heads=1, block_q=16, block_k=16), keys=True),
    "heads alike": Case(SINKS, Shape(1, 300, 300, kv_heads=4, block_q=32, block_k=32), keys=True),
    "per-head window": Case(Causal() & (Window(jnp.array([3, 9, 20, 40])) | Sinks(4)), keys=True),
    "bias and dropout": Case(GLOBAL | Window(9, ahead=9), options=SCORES),
    "sinks with bias and dropout": Case(SINKS, options=SCORES, keys=True),
    "unseen rows": Case(Causal() & Window(9) & ~Sinks(20) | GLOBAL, options=SCORES),
}
BY_DEFAULT = ["sinks of documents", "decode", "unseen rows"]
"""Lines of keys and of queries, rows with tokens of their own, bias and dropout."""


def results(q, k, v, seen, backend, bias=None, **options):
    """Out, lse, and the gradients of q, k, v and the bias's leaves, of a loss that reads both."""

    def loss(q, k, v, bias):
        out, lse = attention(q, k, v, seen, backend=backend, bias=bias, return_lse=True, **options)
        waves = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return (out * waves).sum() + jnp.sin(jnp.where(jnp.isfinite(lse), lse, 0.0)).sum(), (out, lse)

    gradients, outputs = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(q, k, v, bias)
    return [*outputs, *jax.tree.leaves(gradients)]


@functools.cache
def program(name: str, backend):
    return jax.jit(functools.partial(results, backend=backend, **CASES[name].options))


def arguments(case: Case):
    return *case.shape.qkv(), case.plan()


@pytest.mark.parametrize("name", mostly(CASES, BY_DEFAULT))
def test_out_lse_and_gradients_are_the_oracles(name):
    case = CASES[name]
    found, expected = (program(name, backend)(*arguments(case)) for backend in (case.backend(), "dense"))
    for a, b in zip(found, expected, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        # A gradient of a key that all queries see, or of a bias, is a sum of hundreds; so is its error.
        scale = max(1.0, np.abs(b[np.isfinite(b)]).max())
        np.testing.assert_allclose(a, b, rtol=FLOAT32["rtol"], atol=FLOAT32["atol"] * scale)


@pytest.mark.parametrize("name", CASES)
def test_the_longest_chain_is_about_what_all_programs_have_alike(name):
    case = CASES[name]
    layout, lists_of_lines = case.layout(keys_first=case.keys), key_lists if case.keys else query_lists

    @jax.jit
    def cut():
        lists = lists_of_lines(case.plan())
        return lists, chunks_of(lists, layout.budget, layout.slots, layout.long_lines)[0]

    lists, chunks = cut()
    assert (np.asarray(chunks.stores)[:, : layout.slots].sum(axis=1) > 1).all(), "slots are used"
    length = np.asarray(lists.full + lists.test)
    heads = case.shape.batch * (case.shape.kv_heads if case.keys else case.shape.heads)
    ideal = length.sum(axis=1) * layout.line.tiles * heads / case.busy
    chain = np.sum([end - begin for begin, end in (chunks.full, chunks.test)], axis=0).max(axis=1)
    assert (chain <= np.maximum(1, 2 * ideal)).all()
    assert (chain < length.max(axis=1)).all()


def test_lines_that_are_alike_stay_whole():
    """And where programs abound there is no slot, and no kernel that merges."""
    case = replace(CASES["sinks"], mask=Window(20, ahead=20), keys=False)
    layout, lists = case.layout(keys_first=False), query_lists(case.plan())
    chunks, long_lines = chunks_of(lists, layout.budget, layout.slots, layout.long_lines)
    assert layout.slots > 0
    assert not np.asarray(long_lines.count).any()
    assert np.asarray(chunks.stores)[:, layout.slots :].all()
    for busy, merges in ((case.busy, True), (1, False)):
        backend = case.backend(busy)
        traced = str(
            jax.make_jaxpr(functools.partial(results, backend=backend))(*case.shape.qkv(), case.plan())
        )
        for name in ("forward", "dq", "dkv"):
            assert f"dynmask_{name}" in traced
            assert (f"dynmask_{name}_merge" in traced) == merges


@pytest.mark.parametrize("dtype", mostly([jnp.bfloat16, jnp.float32], [jnp.bfloat16]))
def test_nan_of_a_chunk_reaches_all_who_see_it(dtype):
    """And nobody else: the sinks' line of keys and the global query's are long, a window's are not."""
    case = CASES["global query"]
    q, k, v = case.shape.qkv(dtype)
    bad = k.at[0, 250, 1].set(jnp.nan)
    found, expected = (
        attention(q, bad, v, case.plan(), backend=name, return_lse=True) for name in (case.backend(), "dense")
    )
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        assert np.isnan(np.asarray(b)).any()


@pytest.mark.parametrize("name", mostly(["sinks", "unseen rows"], ["unseen rows"]))
def test_results_are_the_same_bit_for_bit(name):
    case = CASES[name]
    call = program(name, case.backend())
    for a, b in zip(call(*arguments(case)), call(*arguments(case)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_partial_results_do_not_grow_with_the_tokens():
    """As many slots for a million tokens as for ten thousand."""
    slots = set()
    for length in (8_192, 2**20):
        tokens = jax.eval_shape(lambda length=length: Tokens.sequence(length))
        seen = jax.eval_shape(functools.partial(plan, Causal(), block_q=128, block_k=128), tokens)
        slots.add(Layout.of(Tile.of(SCALED, seen), seen, Grain(64, 64, 4, 1), 8, 256).slots)
    assert slots == {32}
