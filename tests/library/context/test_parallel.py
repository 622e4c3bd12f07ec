"""On eight devices, what one device gives: every strategy, layout, mask, in values and all gradients."""

import functools
import re

import chex
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MASKS, TOLERANCE, UNREADABLE
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from slow import mostly

from dynmask_jax import (
    Causal,
    Everything,
    Heads,
    SameSegment,
    Tokens,
    Window,
    attention,
    balance,
    context_parallel,
    growing_window,
    layout_order,
    linear,
    mask_tensor,
    plan,
)
from dynmask_jax.context.arcs import shortest_arcs
from dynmask_jax.context.layouts import LAYOUTS
from dynmask_jax.dispatch import BACKENDS
from dynmask_jax.nnx import Attention
from dynmask_jax.partitioning import STRATEGIES


def mesh_of(**sizes: int):
    count = int(np.prod(list(sizes.values())))
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=jax.devices()[:count])


RING = mesh_of(context=8)
LENGTH = 96  # 12 a device
LAYOUT_OPTIONS = {"striped": {"stripe": 3}, "dealt": {"work": np.arange(32) % 7}}


def arrays(heads=16, kv_heads=8, batch=2, length=LENGTH, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(
        jax.random.normal(key, (batch, length, n, 8), dtype)
        for key, n in zip(keys, (heads, kv_heads, kv_heads), strict=True)
    )


def packed(batch=2, length=LENGTH):
    """Documents of 31 tokens, whose positions begin anew, and padding; more of it in the second row, so
    that of eight devices two hold nothing else."""
    row = np.arange(batch)[:, None]
    place = np.arange(length)[None, :] + 7 * row
    segment = np.where(np.arange(length)[None, :] < length - 5 - length // 4 * row, 1 + place // 31, 0)
    return (place % 31).astype(np.int32), segment.astype(np.int32)


def for_heads(mask, heads):
    """The mask with its per-head leaves for so many heads."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, heads // len(leaf)) if jnp.ndim(leaf) else leaf, mask)


def everything(attend, mask, blocks, q, k, v, position, segment):
    """out, lse and the gradients of q, k, v of a scalar that depends on both."""
    tokens = Tokens(position, segment)
    seen = plan(mask, tokens, block_q=blocks[0], block_k=blocks[1])

    def loss(q, k, v):
        out, lse = attend(q, k, v, seen, return_lse=True)
        shown = jnp.where(jnp.isneginf(lse), 0.0, lse)
        return jnp.sin(out.astype(jnp.float32)).sum() + jnp.square(shown).sum() / 20, (out, lse)

    (_, results), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return *results, *gradients


@functools.cache
def alone(name: str, heads: int, kv_heads: int):
    """The oracle, on one device, of packed rows."""
    oracle = functools.partial(attention, backend="dense")
    mask = for_heads(MASKS[name], heads)
    return jax.jit(functools.partial(everything, oracle, mask, (12, 12)))(*arrays(heads, kv_heads), *packed())


def assert_same(actual, expected, dtype=jnp.float32):
    for a, b in zip(actual, expected, strict=True):
        # Sums over all keys, in another order: a little of the greatest.
        scale = np.abs(np.where(np.isfinite(b), b, 0)).max()
        tolerance = TOLERANCE[jnp.dtype(dtype)]
        np.testing.assert_allclose(a, b, rtol=tolerance["rtol"], atol=tolerance["atol"] * max(1, scale))


EVERY = [(name, strategy) for name in MASKS for strategy in STRATEGIES]
KINDS = {
    "ring": {"same_segment", "per_head_window", "unreadable"},
    "all_gather": {"same_segment", "nothing"},
    "ulysses": {"per_head_window"},
}
BY_DEFAULT = [(name, strategy) for name, strategy in EVERY if name in KINDS[strategy]]


@pytest.mark.filterwarnings(f"ignore:.*{UNREADABLE}")
@pytest.mark.parametrize(("name", "strategy"), mostly(EVERY, BY_DEFAULT))
def test_every_strategy_layout_and_mask(name, strategy):
    """Packed rows and grouped queries; one program for all layouts, which are data."""
    blocks = (6, 4) if len(name) % 2 else (5, 7)  # that divide a device's part, and ragged ones
    attend = context_parallel(functools.partial(attention, backend="xla"), mesh=RING, strategy=strategy)
    heads = {"heads": 16, "kv_heads": 8} if strategy == "ulysses" else {"heads": 4, "kv_heads": 2}
    spread = jax.jit(functools.partial(everything, attend, for_heads(MASKS[name], heads["heads"]), blocks))
    qkv, tokens = arrays(**heads), packed()
    for layout in LAYOUTS:
        order = layout_order(layout, LENGTH, 8, **LAYOUT_OPTIONS.get(layout, {}))
        back = np.argsort(order)
        found = spread(*(x[:, order] for x in qkv), *(x[:, order] for x in tokens))
        assert_same([x[:, back] for x in found], alone(name, **heads))
    assert spread._cache_size() == 1


@pytest.mark.parametrize(
    ("backend", "strategy"),
    mostly(
        [(name, strategy) for name in BACKENDS if name != "xla" for strategy in STRATEGIES],
        [("tpu", "ring"), ("gpu", "all_gather"), ("dense", "ulysses")],
    ),
)
def test_every_backend(backend, strategy):
    """On rows, tokens and heads at once; each head its own window, as `tensor` and ulysses cut them."""
    mesh = mesh_of(data=2, context=2, tensor=2)
    mask = Causal() & Window(jnp.array([3, 40, 11, 7, 20, 13, 5, 60]))
    attend = context_parallel(functools.partial(attention, backend=backend), mesh=mesh, strategy=strategy)
    oracle = functools.partial(attention, backend="dense")
    actual, expected = (
        jax.jit(functools.partial(everything, f, mask, (16, 16)))(
            *arrays(8, 4, length=64), *packed(length=64)
        )
        for f in (attend, oracle)
    )
    assert_same(actual, expected)


@pytest.mark.usefixtures("optimized")
def test_a_program_that_xla_optimizes():
    """The other tests compile with little optimization by default, see conftest.py."""
    test_every_backend("xla", "ring")


@pytest.mark.parametrize("backend", mostly(["xla", "tpu"], ["tpu"]))
def test_an_axis_of_the_mesh_that_nothing_lies_along(backend):
    """Its devices all do the same, and gradients are not added up over them."""
    attend = context_parallel(functools.partial(attention, backend=backend), mesh=mesh_of(stage=2, context=2))
    actual, expected = (
        jax.jit(functools.partial(everything, f, Causal(), (8, 8)))(
            *arrays(2, 2, length=32), *packed(length=32)
        )
        for f in (attend, functools.partial(attention, backend="dense"))
    )
    assert_same(actual, expected)


@pytest.mark.parametrize("strategy", mostly(STRATEGIES, ["ring"]))
def test_bfloat16_with_every_option(strategy):
    mesh = mesh_of(fsdp=2, context=4)
    attend = context_parallel(functools.partial(attention, soft_cap=5.0), mesh=mesh, strategy=strategy)
    q, k, v = arrays(8, 4, dtype=jnp.bfloat16)
    seen = plan(Causal() & SameSegment(), Tokens(*packed()), block_q=8, block_k=8)

    def loss(attend, q, k, v, sinks):
        out = attend(q, k, v, seen, sinks=sinks, scale=0.5)
        return jnp.square(out.astype(jnp.float32)).sum()

    actual, expected = (
        jax.jit(jax.grad(functools.partial(loss, f), (0, 1, 2, 3)))(q, k, v, jnp.linspace(-1, 1, 8))
        for f in (attend, functools.partial(attention, soft_cap=5.0))
    )
    assert_same(
        [np.asarray(x, np.float32) for x in actual],
        [np.asarray(x, np.float32) for x in expected],
        jnp.bfloat16,
    )


@pytest.mark.parametrize("strategy", mostly(STRATEGIES, ["ring"]))
def test_what_is_not_finite_reaches_only_those_who_see_it(strategy):
    """A bad key on one device, a bad value on another, a bad query on a third."""
    attend = context_parallel(functools.partial(attention, backend="xla"), mesh=RING, strategy=strategy)
    q, k, v = arrays()
    k, v, q = k.at[0, 17, 3].set(jnp.nan), v.at[1, 40, 5].set(jnp.inf), q.at[0, 90, 1, 2].set(-jnp.inf)
    call = functools.partial(everything, mask=Causal() & Window(30), blocks=(6, 6))
    position = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (2, LENGTH))
    actual, expected = (
        jax.jit(functools.partial(call, f))(q=q, k=k, v=v, position=position, segment=np.ones_like(position))
        for f in (attend, functools.partial(attention, backend="xla"))
    )
    assert 0 < np.isnan(expected[0]).mean() < 0.1
    assert_same(actual, expected)


def counted(monkeypatch):
    """A list that each permute of the program adds its shape to, once it is executed."""
    executed, permute = [], jax.lax.ppermute

    def counting(x, axis, permutation):
        def add(device):
            if device == 0:
                executed.append((x.shape, str(x.dtype)))

        jax.debug.callback(add, jax.lax.axis_index(axis))
        return permute(x, axis, permutation)

    monkeypatch.setattr(jax.lax, "ppermute", counting)
    return executed


def test_hops_and_bytes_over_a_curriculum(monkeypatch):
    """Executed transfers, counted as they happen, are what `travel` says; one trace for all steps."""
    executed = counted(monkeypatch)
    attend = context_parallel(functools.partial(attention, backend="xla"), mesh=RING)
    curriculum, tokens = growing_window(linear(1, LENGTH, 95)), Tokens.sequence(LENGTH)
    q, k, v = arrays(4, 2)

    @jax.jit
    @chex.assert_max_traces(1)
    def forward(step):
        seen = plan(curriculum(step), tokens, block_q=6, block_k=6)
        return attend(q, k, v, seen), attend.travel(q, k, seen)

    hops = []
    for window in (1, 2, 7, 12, 13, 14, 25, 26, 60, 84, 85, 86, 96):
        executed.clear()
        _, travel = jax.block_until_ready(forward(window - 1))
        jax.effects_barrier()
        shard = (2, 12, 2, 8)
        assert executed == [(shard, "float32")] * 2 * int(travel.hops)
        assert int(travel.bytes) == 2 * int(travel.hops) * 4 * np.prod(shard)
        hops.append(int(travel.hops))
    # A query at a shard's beginning sees window - 1 keys before it, 12 of them in each shard.
    assert hops == [0, 1, 1, 1, 1, 2, 2, 3, 5, 7, 7, 7, 7]


def test_the_backward_pass_goes_as_far_and_brings_the_gradients_home(monkeypatch):
    executed = counted(monkeypatch)
    attend = context_parallel(functools.partial(attention, backend="xla"), mesh=RING)
    q, k, v = (x.astype(jnp.bfloat16) for x in arrays(4, 2))

    def loss(q, k, v, window):
        seen = plan(Causal() & Window(window), Tokens.sequence(LENGTH), block_q=6, block_k=6)
        return attend(q, k, v, seen).astype(jnp.float32).sum()

    def simulated(window):
        rows = jax.tree.map(lambda x: jnp.tile(x, (2, 1)), Tokens.sequence(LENGTH))
        how = {"block": 6, "heads": Heads(4, 2, 8), "layouts": ["contiguous"], "strategies": ["ring"]}
        return balance(Causal() & Window(window), rows, 8, **how).pick.cost

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    for window, hops in ((1, 0), (5, 1), (26, 3), (96, 7)):
        executed.clear()
        jax.block_until_ready(gradient(q, k, v, window))
        jax.effects_barrier()
        kinds = [dtype for _, dtype in executed]
        # k and v there and back, and their gradients back, in float32; k and v of one hop are there already.
        there_and_back = hops + (hops if hops > 1 else 0)
        assert (kinds.count("bfloat16"), kinds.count("float32")) == (2 * there_and_back, 2 * hops)
        sent = sum(np.prod(shape) * jnp.dtype(kind).itemsize for shape, kind in executed)
        assert sent == simulated(window).bytes


@pytest.mark.parametrize(
    ("layout", "window", "hops"),
    [("contiguous", 6, 1), ("zigzag", 6, 2), ("contiguous", 96, 7), ("zigzag", 96, 7)],
)
def test_keys_go_both_ways_where_that_is_shorter(layout, window, hops):
    """In zigzag, the keys before a device's two chunks lie on the devices on its two sides."""
    order = layout_order(layout, LENGTH, 8)
    seen = plan(Causal() & Window(window), Tokens(order), block_q=6, block_k=6)
    travel = context_parallel(attention, mesh=RING).travel(*arrays(4, 2)[:2], seen)
    assert int(travel.hops) == hops


@pytest.mark.parametrize(("strategy", "hops"), [("ring", 7), ("all_gather", 7)])
def test_values_of_another_width_travel_too(strategy, hops):
    q, k, v = arrays(4, 2)
    v = jnp.concatenate([v] * 3, axis=-1)
    seen = plan(Everything(), Tokens.sequence(LENGTH))
    travel = context_parallel(attention, mesh=RING, strategy=strategy).travel(q, k, seen, v)
    # Of a ring both ways the longer arc and the shorter one; either way all shards come by.
    assert (int(travel.hops), float(travel.bytes)) == (hops, hops * (k.nbytes + v.nbytes) / 8)


@given(st.lists(st.booleans(), min_size=2, max_size=9))
def test_the_arcs_are_the_shortest_that_reach_all_that_is_needed(needed):
    n = len(needed)

    def reaches(ahead, behind):
        return all(not need or d <= ahead or (d and n - d <= behind) for d, need in enumerate(needed))

    ahead, behind = map(int, jax.jit(shortest_arcs)(jnp.array(needed)))
    assert reaches(ahead, behind)
    assert ahead + behind == min(a + b for a in range(n) for b in range(n) if reaches(a, b))


def test_a_row_of_one_device_is_the_plain_attention():
    attend = context_parallel(attention, mesh=mesh_of(data=2, context=1))
    seen = plan(Causal(), Tokens.sequence(LENGTH), block_q=16, block_k=16)
    q, k, v = arrays()
    np.testing.assert_array_equal(attend(q, k, v, seen), attention(q, k, v, seen))
    travel = attend.travel(q, k, seen)
    assert (int(travel.hops), float(travel.bytes)) == (0, 0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_visible_pairs_are_counted_each_where_its_query_lies(strategy):
    attend = context_parallel(attention, mesh=mesh_of(data=2, context=2, tensor=2), strategy=strategy)
    for mask in (Causal() & SameSegment(), MASKS["per_head_window"], MASKS["strided"]):
        tokens = Tokens(*packed())
        seen = plan(mask, tokens, block_q=10, block_k=8)
        pairs = np.mean(np.sum(mask_tensor(mask, *2 * [tokens]), axis=(-1, -2)).reshape(2, -1), axis=1).sum()
        assert float(attend.visible_pairs(seen)) == pytest.approx(pairs)


def test_placed_plans_are_gathered_once():
    """Of a placed plan every device holds all keys' tokens, and its own queries'."""
    attend = context_parallel(attention, mesh=RING)
    seen = jax.jit(lambda tokens: attend.placed(plan(Causal(), tokens, block_q=6, block_k=6)))(
        Tokens.sequence(LENGTH)
    )
    assert seen.kv_tokens.position.sharding.is_fully_replicated
    assert seen.q_tokens.position.sharding.is_equivalent_to(
        NamedSharding(RING, PartitionSpec(None, "context")), 2
    )


def test_in_a_flax_layer_under_remat():
    """The layer is the same with either attention."""
    attend = context_parallel(attention, mesh=mesh_of(data=2, context=4))
    shape = {"num_kv_heads": 2, "rope_theta": 100.0, "rngs": nnx.Rngs(0)}
    layer, spread = (
        Attention(16, 4, attention=f, **shape | {"rngs": nnx.Rngs(0)}) for f in (attention, attend)
    )
    x = jax.random.normal(jax.random.key(3), (2, LENGTH, 16))
    seen = plan(Causal() & SameSegment(), Tokens(*packed()), block_q=8, block_k=8)

    def gradient(layer):
        graph, weights = nnx.split(layer)
        call = jax.checkpoint(lambda weights, x: nnx.merge(graph, weights)(x, seen))
        return jax.jit(jax.grad(lambda w, x: jnp.sin(call(w, x)).sum(), (0, 1)))(weights, x)

    assert_same(jax.tree.leaves(gradient(spread)), jax.tree.leaves(gradient(layer)))


def test_neither_pass_holds_more_than_its_shards():
    """No array of all keys, but their tokens, on any device: memory of a ring is that of its shards."""
    attend = context_parallel(functools.partial(attention, backend="xla"), mesh=RING)
    length = 8_192
    q, k, v = (jax.ShapeDtypeStruct((1, length, 4, 64), jnp.float32) for _ in range(3))
    on = NamedSharding(RING, PartitionSpec(None, "context"))
    q, k, v = (jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on) for x in (q, k, v))

    def loss(q, k, v):
        return attend(q, k, v, plan(Causal(), Tokens.sequence(length), block_q=256, block_k=256)).sum()

    text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v).compile().as_text()
    assert re.search(rf"f32\[1,{length // 8},4,64\]", text)
    assert not re.search(rf"f32\[1,{length},4,64\]", text)


MISUSES = {
    "sequence": (
        {},
        {"length": 100},
        "the sequence of queries (100) must be a multiple of the 8 devices of the mesh's 'context'",
    ),
    "heads": (
        {"strategy": "ulysses"},
        {"heads": 4, "kv_heads": 2},
        "query heads (4) must be a multiple of the 8",
    ),
    "key_heads": (
        {"strategy": "ulysses"},
        {"heads": 8, "kv_heads": 2},
        "key heads (2) must be a multiple of the 8 devices",
    ),
    "batch": ({"mesh": {"data": 4, "context": 2}}, {}, "the batch (2) must be a multiple of the 4 devices"),
    "tensor": (
        {"mesh": {"context": 2, "tensor": 4}},
        {"heads": 4, "kv_heads": 2},
        "key heads (2) must be a multiple of the 4 devices of the mesh's 'tensor'",
    ),
    "axis": ({"axis": "sequence"}, {}, "the mesh has no axis 'sequence'; its axes are context"),
    "batch_axes": ({"batch_axes": ("rows",)}, {}, "the mesh has no axis 'rows'; its axes are context"),
    "head_axis": ({"head_axis": "heads"}, {}, "the mesh has no axis 'heads'; its axes are context"),
    "twice": ({"head_axis": "context"}, {}, "the mesh's axis 'context' is named for two axes"),
    "strategy": (
        {"strategy": "rings"},
        {},
        "strategy must be one of 'ring', 'all_gather', 'ulysses', got 'rings'",
    ),
}


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_refused_by_name(name):
    options, shape, words = MISUSES[name]
    mesh = mesh_of(**options.get("mesh", {"context": 8}))
    with pytest.raises(ValueError, match=re.escape(words)):
        context_parallel(attention, **options | {"mesh": mesh})(*arrays(**shape), Causal())


def test_other_functions_and_meshes_are_refused():
    with pytest.raises(TypeError, match=r"attention must be dynmask_jax\.attention"):
        context_parallel(nnx.dot_product_attention, mesh=RING)
    with pytest.raises(TypeError, match=r"mesh must be a jax\.sharding\.Mesh, got tuple"):
        context_parallel(attention, mesh=(8,))
    for method in ("placed", "visible_pairs"):
        with pytest.raises(TypeError, match="plan must be a Plan, made by plan"):
            getattr(context_parallel(attention, mesh=RING), method)(Causal())
    with pytest.raises(ValueError, match="the plan is for 40 queries and 40 keys, got 96 and 96"):
        context_parallel(attention, mesh=RING).travel(*arrays()[:2], plan(Causal(), Tokens.sequence(40)))
    with pytest.raises(TypeError, match="attention has no option 'window'; it has backend"):
        context_parallel(attention, mesh=RING)(*arrays(), Causal(), window=3)
