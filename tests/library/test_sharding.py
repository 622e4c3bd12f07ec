"""Plain `attention` on meshes: each device computes its own rows and heads, and no array is gathered."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE, collectives
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from slow import mostly

from dynmask_jax import Causal, SameSegment, Tokens, Window, attention, context_parallel, plan
from dynmask_jax.dispatch import BACKENDS

BATCH, LENGTH, HEADS, HEAD_DIM = 8, 24, 4, 8


def mesh_of(shape, names, kind):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


MESHES = {
    "explicit": (mesh_of((4, 2), ("fsdp", "tp"), AxisType.Explicit), None),
    "explicit_rows": (mesh_of((8,), ("data",), AxisType.Explicit), None),
    "auto_by_name": (mesh_of((4, 2), ("data", "tensor"), AxisType.Auto), None),
    "auto_told": (mesh_of((4, 2), ("x", "y"), AxisType.Auto), P("x", None, "y")),
}
"""name -> the mesh, whose first axis partitions rows and whose second, if any, heads; and the `sharding`."""


def arrays(kv_heads=2, dtype=jnp.float32, heads=HEADS):
    shapes = [(BATCH, LENGTH, n, HEAD_DIM) for n in (heads, kv_heads, kv_heads)]
    return [jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes)]


def packed():
    place = jnp.arange(LENGTH)[None, :] + 3 * jnp.arange(BATCH)[:, None]
    return Tokens(
        jnp.broadcast_to(jnp.arange(LENGTH), place.shape), jnp.where(place < 40, 1 + place // 15, 0)
    )


def loss(arrays, sinks, tokens, window, attend):
    the_plan = plan(Causal() & Window(window) & SameSegment(), tokens, block_q=8, block_k=8)
    out, lse = attend(*arrays, the_plan, sinks=sinks, return_lse=True)
    weight = jnp.arange(HEAD_DIM, dtype=out.dtype)[None, None, None]
    return (jnp.sin(out) * weight).astype(jnp.float32).sum() + jnp.where(jnp.isfinite(lse), lse, 0.0).sum()


def value_and_gradients(attend):
    return jax.jit(jax.value_and_grad(functools.partial(loss, attend=attend), (0, 1)))


def on_mesh(mesh, *trees):
    """Arrays `[B, T, heads, H]`, sinks `[N]` and tokens `[B, T]`, on the devices whose part they are."""
    rows, heads = (*mesh.axis_names, None)[:2]

    def spec(x):
        if x.ndim == 1:
            return P(heads)
        share = heads if x.ndim == 4 and heads and x.shape[2] % mesh.shape[heads] == 0 else None
        return P(rows, None, share) if x.ndim == 4 else P(rows)

    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec(x))), trees)


def assert_same(actual, expected, dtype="float32"):
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        tolerance = TOLERANCE[jnp.dtype(dtype)]
        scale = max(1.0, float(jnp.abs(b).max()))
        np.testing.assert_allclose(a, b, rtol=tolerance["rtol"], atol=tolerance["atol"] * scale)


CASES = [(mesh, backend, kv_heads) for mesh in MESHES for backend in BACKENDS for kv_heads in (4, 2, 1)]
BY_DEFAULT = {*((mesh, "xla", 2) for mesh in MESHES), ("auto_by_name", "tpu", 1)}


@functools.cache
def on_one_device(backend: str, kv_heads: int):
    return value_and_gradients(functools.partial(attention, backend=backend))(*ordinary(kv_heads), 7)


def ordinary(kv_heads: int):
    return arrays(kv_heads), jnp.linspace(-1.0, 1.0, HEADS), packed()


@pytest.mark.parametrize(("mesh", "backend", "kv_heads"), mostly(CASES, BY_DEFAULT))
def test_values_and_gradients_are_those_of_one_device_and_nothing_is_gathered(mesh, backend, kv_heads):
    mesh, sharding = MESHES[mesh]
    expected = on_one_device(backend, kv_heads)
    with jax.set_mesh(mesh):
        placed = on_mesh(mesh, *ordinary(kv_heads))
        attend = functools.partial(attention, backend=backend, sharding=sharding)
        program = value_and_gradients(attend).lower(*placed, 7).compile()
        assert_same(program(*placed, 7), expected)
    assert collectives(program) == set()


@pytest.mark.parametrize("mesh", mostly(["explicit", "auto_by_name"], ["explicit"]))
def test_bfloat16(mesh):
    mesh, _ = MESHES[mesh]
    arguments = arrays(1, jnp.bfloat16), jnp.linspace(-1.0, 1.0, HEADS), packed()
    _, (expected, _) = value_and_gradients(attention)(*arguments, 7)
    with jax.set_mesh(mesh):
        _, (actual, _) = value_and_gradients(attention)(*on_mesh(mesh, *arguments), 7)
    wide = functools.partial(jax.tree.map, lambda x: x.astype(jnp.float32))
    assert_same(wide(actual), wide(expected), "bfloat16")


@pytest.mark.parametrize(("heads", "kv_heads"), mostly([(4, 1), (6, 3), (12, 3), (8, 4)], [(12, 3)]))
def test_fewer_key_heads_than_devices_or_ones_that_straddle_them(heads, kv_heads):
    """3 key heads on 2 devices: the second of them is read on both."""
    mesh, _ = MESHES["explicit"]
    arguments = arrays(kv_heads, heads=heads), jnp.linspace(-1.0, 1.0, heads), packed()
    expected = value_and_gradients(attention)(*arguments, 7)
    with jax.set_mesh(mesh):
        assert_same(value_and_gradients(attention)(*on_mesh(mesh, *arguments), 7), expected)


def test_leaves_of_a_mask_for_each_head_go_to_its_device():
    mesh, _ = MESHES["explicit"]
    mask, qkv = Causal() & Window(jnp.array([1, 3, 9, 24])), arrays()
    expected = attention(*qkv, mask)
    with jax.set_mesh(mesh):
        actual = jax.jit(attention)(*on_mesh(mesh, qkv)[0], mask)
        assert_same(actual, expected)
        assert jax.typeof(actual).sharding.spec == P("fsdp", None, "tp", None)


def test_eager_calls_vmap_and_remat_on_an_explicit_mesh():
    mesh, _ = MESHES["explicit"]
    qkv, mask = arrays(), Causal() & Window(5)
    expected = attention(*qkv, mask)
    placed = on_mesh(mesh, qkv)[0]
    assert_same(attention(*placed, mask), expected)  # no mesh was set: the arrays' own
    with jax.set_mesh(mesh):
        twice = [jnp.stack([x, x]) for x in placed]
        assert_same(jax.vmap(lambda *a: attention(*a, mask))(*twice)[1], expected)

        @jax.jit
        def slope(q, k, v):
            return jax.grad(lambda q: jax.checkpoint(lambda q: attention(q, k, v, mask).sum())(q))(q)

        whole = jax.grad(lambda q: attention(q, *qkv[1:], mask).sum())(qkv[0])
        assert_same(slope(*placed), whole)


def test_a_plan_of_partitioned_tokens_counts_and_narrows_as_that_of_whole_ones():
    mesh, _ = MESHES["explicit"]
    tokens, mask = packed(), Causal() & SameSegment()

    def facts(tokens):
        the_plan = plan(mask, tokens, block_q=8, block_k=8)
        local = the_plan & Window(5)
        return the_plan.codes, the_plan.visible_pairs(), local.codes, local.visible_pairs(), local.exposure()

    expected = facts(tokens)
    joined = plan(mask & Window(5), tokens, block_q=8, block_k=8)
    np.testing.assert_array_equal(expected[2], joined.codes)
    with jax.set_mesh(mesh):
        by_rows = jax.device_put(tokens, NamedSharding(mesh, P("fsdp")))
        by_tokens = jax.device_put(tokens, NamedSharding(mesh, P("fsdp", "tp")))
        for placed in (by_rows, by_tokens):
            for a, b in zip(jax.jit(facts)(placed), expected, strict=True):
                np.testing.assert_array_equal(a, b)


EXPLICIT = [
    ("ring", (2, 4), ("data", "context")),
    ("all_gather", (2, 4), ("fsdp", "context")),
    ("ulysses", (4, 2), ("dp", "context")),
    ("ring", (4, 2), ("context", "tp")),
]


@pytest.mark.parametrize(("strategy", "shape", "names"), mostly(EXPLICIT, EXPLICIT[3:]))
def test_context_parallel_on_explicit_meshes(strategy, shape, names):
    mesh = mesh_of(shape, names, AxisType.Explicit)
    kinds = {name: "heads" if name == "tp" else "tokens" if name == "context" else "rows" for name in names}
    axes = {kind: name for name, kind in kinds.items()}
    spec = P(axes.get("rows"), "context", axes.get("heads"))
    arguments = arrays(), jnp.linspace(-1.0, 1.0, HEADS), packed()
    expected = value_and_gradients(attention)(*arguments, 7)
    attend = context_parallel(attention, mesh=mesh, strategy=strategy)
    with jax.set_mesh(mesh):
        qkv = [jax.device_put(x, NamedSharding(mesh, spec)) for x in arguments[0]]
        tokens = jax.device_put(arguments[2], NamedSharding(mesh, P(axes.get("rows"), "context")))
        assert_same(value_and_gradients(attend)(qkv, arguments[1], tokens, 7), expected)
        the_plan = attend.placed(plan(Causal() & SameSegment(), tokens))
        whole = plan(Causal() & SameSegment(), arguments[2])
        assert attend.visible_pairs(the_plan) == whole.visible_pairs()
        assert attend.travel(*qkv[:2], the_plan).hops > 0


def test_an_explicit_mesh_that_was_not_set():
    mesh = mesh_of((8,), ("context",), AxisType.Explicit)
    attend = context_parallel(attention, mesh=mesh)
    qkv, mask = arrays(), Causal() & Window(9)
    assert_same(jax.jit(attend)(*qkv, mask), attention(*qkv, mask))


def partitioned(spec, mesh=MESHES["explicit"][0]):
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x in arrays()]


REFUSED = {
    "tokens": (
        {"spec": P("fsdp", "tp")},
        {},
        r"q partitions tokens over the mesh axis 'tp': .*context_parallel\(attention, mesh=mesh, axis='tp'\)",
    ),
    "head_dim": (
        {"spec": P("fsdp", None, None, "tp")},
        {},
        "q partitions the head dim over the mesh axis 'tp'",
    ),
    "told_tokens": ({}, {"sharding": P(None, "x")}, "sharding partitions tokens over the mesh axis 'x'"),
    "told_axis": ({}, {"sharding": P("rows")}, "names the mesh axis 'rows'; its axes are x, y"),
    "told_size": (
        {},
        {"sharding": P(("x", "y")), "batch": 6},
        r"the batch \(6\) must be a multiple of the 8 devices of sharding",
    ),
    "told_twice": ({}, {"sharding": P("x", None, "x")}, "names the mesh axis 'x' twice"),
    "told_nothing": ({}, {"sharding": P(P.UNCONSTRAINED)}, "must name mesh axes or None for each axis of q"),
    "typed_tokens_told_rows": (
        {"spec": P("fsdp", "tp")},
        {"sharding": P("fsdp")},
        "q partitions tokens over the mesh axis 'tp'",
    ),
    "told_heads": (
        {},
        {"sharding": P(None, None, ("x", "y"))},
        r"query heads \(4\) must be a multiple of the 8",
    ),
    "told_rank": (
        {},
        {"sharding": P(None, None, None, None, "x")},
        "sharding must be of .batch, tokens, heads",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_partitioned_is_refused_with_the_remedy(name):
    placed, options, message = REFUSED[name]
    mesh = MESHES["explicit" if placed else "auto_told"][0]
    qkv = partitioned(placed["spec"]) if placed else arrays()
    qkv = [x[: options.get("batch", BATCH)] for x in qkv]
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        attention(*qkv, Causal(), sharding=options.get("sharding"))


def test_arrays_that_contradict_each_other_are_refused():
    mesh = mesh_of((2,), ("x",), AxisType.Explicit)
    q, k, v = arrays()
    q, k = (
        jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in ((q, P("x")), (k, P(None, None, "x")))
    )
    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match="one of q, k and v partitions rows, another heads"),
    ):
        attention(q, k, v, Causal())


def test_a_sharding_needs_a_mesh_and_a_spec():
    with pytest.raises(ValueError, match=r"there is no mesh: jax\.set_mesh, or a NamedSharding"):
        attention(*arrays(), Causal(), sharding=P("x"))
    with pytest.raises(
        TypeError, match=r"sharding must be a PartitionSpec or a NamedSharding of q.*got tuple"
    ):
        attention(*arrays(), Causal(), sharding=("x",))
    mesh = MESHES["auto_told"][0]
    out = jax.jit(functools.partial(attention, sharding=NamedSharding(mesh, P("x", None, "y"))))(
        *arrays(), Causal()
    )
    assert out.sharding.spec == P("x", None, "y")


def test_axes_without_a_usual_name_are_warned_of_and_one_row_is_not():
    mesh, _ = MESHES["auto_told"]
    attend = functools.partial(attention, backend="dense")
    assert_same(attend(*arrays(), Causal(), sharding=P()), attend(*arrays(), Causal()))
    with jax.set_mesh(mesh), pytest.warns(UserWarning, match="the mesh axes 'x', 'y' compute the same"):
        assert_same(attend(*arrays(), Causal()), attend(*arrays(), Causal(), sharding=P("x")))
    with jax.set_mesh(MESHES["auto_by_name"][0]):
        assert_same(attend(*(x[:1] for x in arrays()), Causal()), attend(*arrays(), Causal())[:1])
        with pytest.warns(UserWarning, match="the mesh axes 'data' compute the same: .*does not divide"):
            attend(*(x[:6] for x in arrays()), Causal())


@pytest.mark.parametrize("kind", mostly([AxisType.Auto, AxisType.Explicit], [AxisType.Explicit]))
def test_inside_shard_map_attention_is_one_devices(kind):
    """Over all axes of the mesh or some: JAX differentiates no shard_map inside another."""
    mesh = mesh_of((4, 2), ("data", "tensor"), kind)

    def loss(attend, *qkv):
        return jnp.sin(attend(*qkv)).sum()

    def alone(q, k, v):
        return attention(q, k, v, Causal() & Window(7))

    expected = jax.grad(functools.partial(loss, alone), (0, 1, 2))(*arrays())
    with jax.set_mesh(mesh):
        for spec, axes in ((P("data", None, "tensor"), {"data", "tensor"}), (P("data"), {"data"})):
            inside = jax.shard_map(alone, in_specs=(spec,) * 3, out_specs=spec, axis_names=axes)
            qkv = [jax.device_put(x, NamedSharding(mesh, spec)) for x in arrays()]
            assert_same(jax.jit(jax.grad(functools.partial(loss, inside), (0, 1, 2)))(*qkv), expected)
        with pytest.raises(ValueError, match=r"inside jax\.shard_map attention is one device's"):
            jax.shard_map(
                functools.partial(attention, sharding=P("data")),
                in_specs=(P("data"),) * 3 + (P(),),
                out_specs=P("data"),
            )(*qkv, Causal())


def test_vmap_over_an_axis_that_the_mesh_partitions():
    qkv, mask = [x[:, None] for x in arrays()], Causal()
    attend = functools.partial(attention, mask_or_plan=mask)
    expected = jax.vmap(attend)(*qkv)
    with jax.set_mesh(MESHES["auto_by_name"][0]):
        assert_same(jax.jit(jax.vmap(attend, spmd_axis_name="data"))(*qkv), expected)
    mesh, _ = MESHES["explicit"]
    placed = [jax.device_put(x, NamedSharding(mesh, P("fsdp"))) for x in qkv]
    # JAX 0.7 does not tell which axes those are, and has an error of its own.
    words = "jax.vmap maps an axis that the mesh partitions" if jax.__version_info__ >= (0, 9) else ""
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=re.escape(words)):
        jax.vmap(attend)(*placed)
