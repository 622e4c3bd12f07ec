"""What Flax's own layers are told of a batch, by `set_tokens` or as their mask: documents and padding."""

import functools

import chex
import flax.linen as nn
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from slow import mostly

from dynmask_jax import (
    Causal,
    Everything,
    Prefix,
    SameSegment,
    Tokens,
    Unsupported,
    Window,
    attention,
    context_parallel,
    growing_window,
    linear,
    mask_tensor,
    plan,
)
from dynmask_jax import linen as our_linen
from dynmask_jax import nnx as our_nnx
from dynmask_jax.flax_mask import Shown

LENGTH, WIDTH, HEADS = 24, 32, 4
PACKED = growing_window(linear(2, LENGTH, steps=8), base=Causal() & SameSegment())
PADDING = jnp.arange(LENGTH)[None, :] < jnp.array([[LENGTH], [17]])
CLOSE = {"rtol": 2e-5, "atol": 5e-6}


def inputs(seed=0, batch=2):
    return jax.random.normal(jax.random.key(seed), (batch, LENGTH, WIDTH))


def documents(first=10):
    """Two rows, cut at other places, the second padded."""
    rows = Tokens.packed([first, 24 - first]), Tokens.packed([5, 8, 6], length=LENGTH)
    return jax.tree.map(lambda *fields: jnp.stack(fields), *rows)


class Stack(nnx.Module):
    """Three of Flax's own layers, one after the other."""

    def __init__(self, make=lambda: our_nnx.attention_fn(PACKED), **options):
        options = {"decode": False, **options}
        self.layers = getattr(nnx, "List", list)(  # Flax 0.11 takes lists as they are
            nnx.MultiHeadAttention(HEADS, WIDTH, rngs=nnx.Rngs(i), attention_fn=make(), **options)
            for i in range(3)
        )

    def __call__(self, x, **options):
        for layer in self.layers:
            x = x + layer(x, **options)
        return x


class Scanned(nnx.Module):
    """The same, their parameters stacked."""

    def __init__(self, remat=False):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return nnx.MultiHeadAttention(
                HEADS, WIDTH, decode=False, rngs=rngs, attention_fn=our_nnx.attention_fn(PACKED)
            )

        self.layers, self.remat = make(nnx.Rngs(0)), remat

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(layer, x):
            apply = nnx.remat(lambda layer, x: layer(x)) if self.remat else lambda layer, x: layer(x)
            return x + apply(layer, x)

        return run(self.layers, x)


def flaxs_own():
    """The stack with Flax's attention, which takes a mask array."""
    return Stack(lambda: nnx.dot_product_attention)


def array(step, tokens):
    return mask_tensor(PACKED(step), tokens)[:, None]


def test_packed_rows_are_one_compilation_over_steps_and_batches():
    ours, theirs = Stack(), flaxs_own()
    chex.clear_trace_counter()

    @nnx.jit
    @chex.assert_max_traces(n=1)
    def run(model, x, step):
        our_nnx.set_step(model, step)
        return model(x)

    for step, tokens in ((0, documents()), (3, documents(7)), (9, documents(20))):
        our_nnx.set_tokens(ours, tokens)
        expected = theirs(inputs(), mask=array(step, tokens))
        shown = tokens.segment > 0  # a query of padding sees nothing here, and means over all in Flax
        np.testing.assert_allclose(run(ours, inputs(), step)[shown], expected[shown], **CLOSE)


@pytest.mark.parametrize("forget", [True, False])
def test_tokens_set_inside_jit_stay_with_the_model_until_they_are_forgotten(forget):
    model, traces = Stack(), []

    @nnx.jit
    def run(model, tokens):
        traces.append(1)
        our_nnx.set_step(model, 9)
        our_nnx.set_tokens(model, tokens)
        out = model(inputs())
        if forget:
            our_nnx.set_tokens(model, None)
        return out

    outs = [run(model, documents(first)) for first in (10, 7, 20)]
    assert len(traces) == (1 if forget else 2)
    assert not np.allclose(outs[0], outs[1])


def loss(model, x):
    return jnp.square(model(x)).mean()


SCANNED_AND_REMAT = functools.partial(Scanned, remat=True)


@pytest.mark.parametrize("make", mostly([Stack, Scanned, SCANNED_AND_REMAT], [Stack, SCANNED_AND_REMAT]))
def test_gradients_by_nnx_and_by_a_functional_loop(make):
    """The functional loop splits, merges inside `jax.grad`, and nothing of the tokens comes out."""
    model = make()
    our_nnx.set_step(model, 5)
    our_nnx.set_tokens(model, documents())
    expected = nnx.grad(loss)(model, inputs())
    our_nnx.set_tokens(model, None)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def gradients(params, rest, step, tokens):
        def of(params):
            model = nnx.merge(graph, params, rest, copy=True)
            our_nnx.set_step(model, step)
            our_nnx.set_tokens(model, tokens)
            return loss(model, inputs())

        return jax.grad(of)(params)

    actual = gradients(params, rest, 5, documents())
    chex.assert_trees_all_close(nnx.to_pure_dict(actual), nnx.to_pure_dict(expected), rtol=2e-4, atol=1e-6)
    other = gradients(params, rest, 5, documents(3))
    assert not np.allclose(*(jax.tree.leaves(each)[0] for each in (actual, other)))


def test_variables_from_outside_a_gradient_are_refused_with_the_remedy():
    """`nnx.merge` reuses the variables of the states it is given, which here are of the trace around."""
    model = Stack()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def run(params, told):
        return jax.grad(lambda params: loss(told(nnx.merge(graph, params, rest)), inputs()))(params)

    def step(model):
        our_nnx.set_step(model, 3)

    def tokens(model):
        our_nnx.set_tokens(model, documents())

    for told in (step, tokens):
        with pytest.raises(ValueError, match=r"nnx\.merge\(…, copy=True\)"):
            jax.jit(run, static_argnums=1)(params, told)


def test_stacked_layers_give_what_layers_in_a_list_do():
    scanned, listed = Scanned(), Stack()
    for i, layer in enumerate(listed.layers):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], nnx.state(scanned.layers, nnx.Param))
        nnx.update(layer, own)
    for model in (scanned, listed):
        our_nnx.set_step(model, 4)
        our_nnx.set_tokens(model, documents())
    np.testing.assert_allclose(scanned(inputs()), listed(inputs()), **CLOSE)


def test_tree_mode():
    if "graph" not in nnx.jit.__kwdefaults__:
        pytest.skip("this Flax has the graph mode alone")
    model = Stack()
    our_nnx.set_step(model, 4)
    our_nnx.set_tokens(model, documents())
    expected = model(inputs())
    np.testing.assert_allclose(
        nnx.jit(lambda model, x: model(x), graph=False)(model, inputs()), expected, **CLOSE
    )


def test_a_whole_state_is_saved_once_the_tokens_are_forgotten(tmp_path):
    trained, fresh = Stack(), Stack()
    our_nnx.set_step(trained, 4)
    our_nnx.set_tokens(trained, documents())
    expected = trained(inputs())
    our_nnx.set_tokens(trained, None)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.to_pure_dict(nnx.state(trained)))
        checkpointer.wait_until_finished()
        state = nnx.state(fresh)
        nnx.replace_by_pure_dict(
            state, checkpointer.restore(tmp_path / "state", nnx.to_pure_dict(nnx.state(fresh)))
        )
    nnx.update(fresh, state)
    our_nnx.set_tokens(fresh, documents())
    np.testing.assert_array_equal(fresh(inputs()), expected)


def layer_of(api, mask, **options):
    """`call(x, **options)` of one of Flax's layers, with the same weights in both."""
    ours = nnx.MultiHeadAttention(
        HEADS, WIDTH, decode=False, rngs=nnx.Rngs(0), attention_fn=our_nnx.attention_fn(mask, **options)
    )
    if api == "nnx":
        return ours
    layer = nn.MultiHeadDotProductAttention(HEADS, attention_fn=our_linen.attention_fn(mask, **options))
    weights = nnx.to_pure_dict(nnx.state(ours, nnx.Param))
    return functools.partial(layer.apply, {"params": weights})


def theirs(x, mask):
    return nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=nnx.Rngs(0))(x, mask=mask)


@pytest.mark.parametrize("api", ["nnx", "linen"])
@pytest.mark.parametrize("mask", [Everything(), Causal(), Causal() & Window(5)])
@pytest.mark.parametrize("dtype", [bool, jnp.float32])
def test_a_padding_mask_hides_keys_alone(api, mask, dtype):
    """So queries of padding that see any give what they give in Flax."""
    padding = PADDING[:, None, None, :].astype(dtype)
    pairs = PADDING[:, None, None, :] & mask_tensor(mask, Tokens.sequence(LENGTH))[None, None]
    expected = theirs(inputs(), pairs)
    shown = pairs[:, 0].any(axis=-1)  # Flax gives the mean of all values to who sees nothing, we give zeros
    out = layer_of(api, mask)(inputs(), mask=padding)
    np.testing.assert_allclose(out[shown], expected[shown], **CLOSE)
    one_row = layer_of(api, mask)(inputs(), mask=padding[1:])
    np.testing.assert_allclose(one_row[1][shown[1]], expected[1][shown[1]], **CLOSE)


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_a_padding_mask_makes_segments_for_a_mask_that_reads_them(api):
    padded = layer_of(api, Causal() & SameSegment())(inputs(), mask=PADDING[:, None, None, :])
    expected = theirs(
        inputs(), PADDING[:, None, None, :] & mask_tensor(Causal(), Tokens.sequence(LENGTH))[None, None]
    )
    np.testing.assert_allclose(padded[PADDING], expected[PADDING], **CLOSE)


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_tokens_and_plans_as_the_mask_of_a_layer(api):
    local = Causal() & Window(5)
    expected = theirs(inputs(), mask_tensor(local & SameSegment(), documents())[:, None])
    shown = documents().segment > 0
    given = {
        "tokens": (local & SameSegment(), documents()),
        "plan": (local, plan(SameSegment(), documents(), block_q=8, block_k=8)),
    }
    for mask, value in given.values():
        out = layer_of(api, mask)(inputs(), mask=value)
        np.testing.assert_allclose(out[shown], expected[shown], **CLOSE)
    more = layer_of(api, local & SameSegment())(
        jnp.stack([inputs(), inputs(1)]), mask=jax.tree.map(lambda x: jnp.stack([x, x]), documents())
    )
    np.testing.assert_allclose(more[0][shown], expected[shown], **CLOSE)


def test_a_padding_mask_hides_keys_of_told_tokens_and_of_a_plan():
    tokens = documents()
    hidden = jnp.arange(LENGTH) != 6
    expected = theirs(inputs(), array(9, tokens) & hidden[None, None, None])
    layer = layer_of("nnx", PACKED)
    our_nnx.set_step(layer, 9)
    our_nnx.set_tokens(layer, tokens)
    linen_layer = layer_of("linen", Causal()).func.__self__.clone(
        attention_fn=our_linen.attention_fn(plan(PACKED(9), tokens, block_q=8, block_k=8))
    )
    weights = {"params": nnx.to_pure_dict(nnx.state(layer, nnx.Param))}
    shown = tokens.segment > 0
    for out in (
        layer(inputs(), mask=hidden[None, None, None]),
        linen_layer.apply(weights, inputs(), mask=hidden[None, None, None]),
    ):
        np.testing.assert_allclose(out[shown], expected[shown], **CLOSE)


def test_a_plan_becomes_causal():
    x = inputs().reshape(2, LENGTH, HEADS, -1)
    whole = our_linen.attention_fn(plan(SameSegment(), documents()))(x, x, x, is_causal=True)
    joined = our_linen.attention_fn(plan(Causal() & SameSegment(), documents()))(x, x, x)
    np.testing.assert_allclose(whole, joined, rtol=1e-5, atol=1e-6)


def test_cross_attention_is_told_of_its_own_tokens():
    class Decoder(nnx.Module):
        def __init__(self):
            def layer(mask):
                return nnx.MultiHeadAttention(
                    HEADS, WIDTH, decode=False, rngs=nnx.Rngs(0), attention_fn=our_nnx.attention_fn(mask)
                )

            self.own, self.cross = layer(Causal() & SameSegment()), layer(SameSegment())

        def __call__(self, x, encoded):
            return self.cross(self.own(x), encoded)

    model, target, source = Decoder(), documents(), Tokens.packed([9, 7])
    our_nnx.set_tokens(model, target)
    our_nnx.set_tokens(model.cross, target, source)
    encoded = inputs(1)[:, :16]
    out = model(inputs(), encoded)
    flax_layer = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=nnx.Rngs(0))
    mask = mask_tensor(SameSegment(), target, source)
    np.testing.assert_allclose(
        out[0], flax_layer(model.own(inputs()), encoded, mask=mask[:, None])[0], **CLOSE
    )


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_what_computes_attention_and_in_which_blocks(api):
    seen = []

    def spy(q, k, v, the_plan, **options):
        seen.append((the_plan.block_q, the_plan.block_k, options))
        return attention(q, k, v, the_plan, **options)

    layer_of(api, Causal(), attention=spy, backend="dense", block_q=8, block_k=6)(inputs())
    assert seen == [(8, 6, {"backend": "dense"})]
    capped = layer_of(api, Causal(), attention=functools.partial(attention, soft_cap=0.3))(inputs())
    assert not np.allclose(capped, layer_of(api, Causal())(inputs()), atol=1e-3)


def test_a_context_parallel_computes_it():
    mesh = jax.make_mesh((4,), ("context",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    model = Stack(lambda: our_nnx.attention_fn(PACKED, attention=context_parallel(mesh=mesh)))
    alone = Stack()
    for each in (model, alone):
        our_nnx.set_step(each, 6)
        our_nnx.set_tokens(each, documents())
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(model, inputs()), alone(inputs()), **CLOSE)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_a_batch_over_devices(kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    tokens, x = jax.tree.map(lambda x: jnp.tile(x, (4, 1)), documents()), inputs(batch=8)

    def run(tokens, x):
        model = Stack()
        our_nnx.set_step(model, 6)
        our_nnx.set_tokens(model, tokens)
        attend = model.layers[0].attention_fn
        heads = x.reshape(*x.shape[:2], HEADS, -1)
        padded = layer_of("nnx", Causal()).attention_fn
        shown = (tokens.segment > 0)[:, None, None, :]
        return attend(heads, heads, heads), padded(heads, heads, heads, mask=shown)

    expected = run(tokens, x)
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P("data"))
        actual = jax.jit(run)(jax.device_put(tokens, rows), jax.device_put(x, rows))
        chex.assert_trees_all_close(actual, expected, **CLOSE)


def test_decoding_forgets_the_tokens_of_the_batch():
    model = Stack(lambda: our_nnx.attention_fn(Causal() & SameSegment()), decode=True)
    our_nnx.set_tokens(model, documents())
    for layer in model.layers:
        layer.init_cache((2, LENGTH, WIDTH))
    with pytest.raises(
        ValueError, match=r"told of 24 queries and 24 keys, got 1 and 24: .*set_tokens\(model, N"
    ):
        model(inputs()[:, :1])
    our_nnx.set_tokens(model, None)
    for layer in model.layers:
        layer.init_cache((2, LENGTH, WIDTH))
    together = Stack(lambda: our_nnx.attention_fn(Causal()))(inputs())
    for t in range(3):
        np.testing.assert_allclose(model(inputs()[:, t : t + 1])[:, 0], together[:, t], **CLOSE)


def linen_call(mask_or_plan, **options):
    return our_linen.attention_fn(mask_or_plan)(*[inputs().reshape(2, LENGTH, HEADS, -1)] * 3, **options)


def told_layer():
    layer = layer_of("nnx", SameSegment())
    our_nnx.set_tokens(layer, documents())
    return layer


def test_one_more_mask_as_the_mask_of_a_layer():
    both = layer_of("nnx", Causal())(inputs(), mask=Window(5))
    np.testing.assert_allclose(both, layer_of("nnx", Causal() & Window(5))(inputs()), **CLOSE)


def test_a_model_may_be_donated_with_the_callers_step():
    model, step = Stack(), jnp.int32(3)
    our_nnx.set_step(model, step)
    our_nnx.set_tokens(model, documents())
    nnx.jit(lambda model: model(inputs()), donate_argnums=0)(model)
    assert int(step) == 3


def test_a_curriculum_whose_mask_differs_by_pythons_step_can_be_told():
    layer = layer_of("nnx", lambda step: Causal() if step < 5 else Causal() & SameSegment())
    our_nnx.set_tokens(layer, documents())
    outs = []
    for step in (0, 7):
        our_nnx.set_step(layer, step)
        outs.append(layer(inputs()))
    assert not np.allclose(*outs)


SQUARE = jnp.ones((2, 1, LENGTH, LENGTH))
REFUSED = {
    "untold": (lambda: layer_of("nnx", SameSegment())(inputs()), ValueError, r"set_tokens\(model, Tokens\("),
    "untold_linen": (lambda: layer_of("linen", SameSegment())(inputs()), ValueError, "or a plan"),
    "pairs": (
        lambda: layer_of("nnx", Causal())(inputs(), mask=SQUARE),
        Unsupported,
        r"over keys alone, \[batch, 1, 1, 24\], as of padding, got \(2, 1, 24, 24\): .*make_causal_mask is",
    ),
    "heads": (
        lambda: layer_of("nnx", Causal())(inputs(), mask=jnp.ones((2, HEADS, 1, LENGTH))),
        Unsupported,
        "over keys alone",
    ),
    "rows": (
        lambda: layer_of("linen", SameSegment())(inputs(batch=3), mask=documents()),
        ValueError,
        r"of queries and keys alike, \(3, 24\) or \(24,\), got \(2, 24\) for 24 queries and 24 keys",
    ),
    "length": (
        lambda: layer_of("linen", SameSegment())(inputs()[:, :8], mask=documents()),
        ValueError,
        r"alike, \(2, 8\) or \(8,\), got \(2, 24\) for 8 queries and 8 keys",
    ),
    "two_plans": (
        lambda: linen_call(plan(Causal(), documents()), mask=plan(Causal(), documents())),
        ValueError,
        "attention_fn has a plan, which has its tokens, and was given Plan as the layer's mask too",
    ),
    "plan_and_tokens": (
        lambda: linen_call(plan(Causal(), documents()), mask=documents()),
        ValueError,
        "was given Tokens as the layer's mask too",
    ),
    "told_twice": (lambda: told_layer()(inputs(), mask=documents()), ValueError, "has tokens, by set_tokens"),
    "told_other_rows": (lambda: told_layer()(inputs(batch=3)), ValueError, r"told of 2 rows, got \(3,\)"),
    "mask_of_other_rows": (
        lambda: linen_call(Causal(), mask=jnp.ones((3, 1, 1, LENGTH))),
        ValueError,
        r"must be of \(2,\) rows, or 1, got \(3, 1, 1, 24\)",
    ),
    "mask_of_more_axes": (
        lambda: linen_call(Causal(), mask=jnp.ones((1, 2, 1, 1, LENGTH))),
        ValueError,
        r"must be of \(2,\) rows, or 1",
    ),
    "mask_of_words": (
        lambda: linen_call(Causal(), mask="causal"),
        TypeError,
        "Tokens, a Plan or a Mask, got str",
    ),
    "backend": (lambda: our_nnx.attention_fn(Causal(), backend="foo"), ValueError, "backend must be one of"),
    "blocks": (lambda: our_linen.attention_fn(Causal(), block_q=0), ValueError, "block_q must be at least 1"),
    "no_listener": (
        lambda: our_nnx.set_tokens(Stack(lambda: our_nnx.attention_fn(Causal())), documents()),
        ValueError,
        "whose mask reads segments: make it with & SameSegment",
    ),
    "no_tokens": (lambda: our_nnx.set_tokens(Stack(), PADDING), TypeError, "q_tokens must be Tokens"),
    "unequal": (
        lambda: our_nnx.set_tokens(Stack(), documents(), Tokens(jnp.zeros((3, LENGTH), int))),
        ValueError,
        "one batch size",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_with_the_remedy(name):
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()


def test_the_mask_of_keys_that_are_shown_reads_over_blocks():
    tokens = Tokens(jnp.arange(LENGTH)[None, :] + jnp.zeros((2, 1), int), PADDING.astype(int))
    the_plan = plan(Prefix(LENGTH) & Shown(), tokens, block_q=8, block_k=8)
    assert the_plan.codes[1].tolist() == [[2, 2, 1]] * 3
