"""The Flax layers: NNX and Linen alike, inside Flax's own modules, one compilation over a curriculum."""

import functools

import chex
import flax.linen as nn
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import MASKS, UNREADABLE
from slow import mostly

from dynmask_jax import (
    ALiBi,
    BiasFunction,
    Causal,
    Dropout,
    Everything,
    Prefix,
    RelativeBuckets,
    SameSegment,
    Tokens,
    Unsupported,
    Window,
    attention,
    bias_tensor,
    context_parallel,
    dropout_mask,
    growing_window,
    linear,
    mask_tensor,
    plan,
    reveal,
)
from dynmask_jax import linen as our_linen
from dynmask_jax import nnx as our_nnx

LENGTH, WIDTH, HEADS = 24, 32, 4
CURRICULUM = growing_window(linear(2, LENGTH, steps=8))
OPTIONS = {"num_heads": HEADS, "num_kv_heads": 2, "rope_theta": 100.0}


def inputs(seed=0):
    return jax.random.normal(jax.random.key(seed), (2, LENGTH, WIDTH))


def dense_mask(step):
    return mask_tensor(CURRICULUM(step), Tokens.sequence(LENGTH))[None, None]


def twins(**options):
    layer = our_nnx.Attention(WIDTH, rngs=nnx.Rngs(0), **options)
    weights = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    return layer, functools.partial(our_linen.Attention(WIDTH, **options).apply, {"params": weights})


READABLE = [name for name in MASKS if name != "unreadable"]
READABLE_BY_DEFAULT = ["causal", "same_segment", "random_chunks", "per_head_select"]


@pytest.mark.parametrize("name", mostly(READABLE, READABLE_BY_DEFAULT))
def test_nnx_and_linen_give_the_same_numbers(name):
    layer, linen_layer = twins(**OPTIONS)
    tokens = Tokens.packed([10, 12], length=LENGTH)
    the_plan = plan(MASKS[name], tokens, block_q=8, block_k=8)
    np.testing.assert_array_equal(layer(inputs(), the_plan), linen_layer(inputs(), the_plan))


def test_the_layer_is_projections_rotation_and_attention():
    """Against jax.nn on the layer's own weights, with rotary positions written as complex numbers."""
    layer, _ = twins(**OPTIONS)
    x, start = inputs(), 7
    the_plan = plan(Causal(), Tokens.sequence(LENGTH, start=start))

    def turned(y):
        half = y.shape[-1] // 2
        angle = (start + np.arange(LENGTH))[:, None] * 100.0 ** (-np.arange(half) / half)
        y = (y[..., :half] + 1j * y[..., half:]) * np.exp(1j * angle)[None, :, None, :]
        return jnp.asarray(np.concatenate([y.real, y.imag], axis=-1), jnp.float32)

    q, k, v = (
        np.einsum("btd,dnh->btnh", x, getattr(layer, name).kernel[...]) for name in ("query", "key", "value")
    )
    mixed = jax.nn.dot_product_attention(turned(q), turned(k), jnp.asarray(v), is_causal=True)
    expected = np.einsum("btnh,nhd->btd", mixed, layer.out.kernel[...])
    np.testing.assert_allclose(layer(x, the_plan), expected, rtol=1e-4, atol=2e-5)


def test_rotary_attention_depends_on_distance_alone():
    layer, _ = twins(**OPTIONS)
    here, there = (
        layer(inputs(), plan(Causal(), Tokens.sequence(LENGTH, start=start))) for start in (0, 1_000)
    )
    np.testing.assert_allclose(here, there, rtol=1e-3, atol=1e-4)


def test_cross_attention_and_a_given_attention():
    capped = functools.partial(attention, soft_cap=0.01)
    layer, linen_layer = twins(num_heads=HEADS, attention=capped)
    context = inputs(1)[:, :10]
    the_plan = plan(Prefix(6), Tokens.sequence(LENGTH), Tokens.sequence(10))
    out = layer(inputs(), the_plan, context)
    np.testing.assert_array_equal(out, linen_layer(inputs(), the_plan, context))
    # Capped to nearly nothing, every visible key weighs the same.
    values = np.einsum("bsd,dnh->bsnh", context[:, :6], layer.value.kernel[...]).mean(axis=1)
    expected = np.einsum("bnh,nhd->bd", values, layer.out.kernel[...])
    np.testing.assert_allclose(out[:, 3], expected, rtol=0.05, atol=0.02)


def test_keys_and_values_can_be_kept_between_calls():
    """Made in two parts, at positions of their own, they are those of the whole sequence."""
    layer, _ = twins(**OPTIONS)
    tokens = Tokens.sequence(LENGTH, start=3)[None]
    the_plan = plan(Causal() & Window(9), tokens)
    expected = layer(inputs(), the_plan)
    parts = [layer.keys_values(inputs()[:, cut], tokens[:, cut]) for cut in (slice(10), slice(10, None))]
    k, v = (jnp.concatenate(both, axis=1) for both in zip(*parts, strict=True))
    np.testing.assert_allclose(layer.attend(inputs(), k, v, the_plan), expected, rtol=1e-5, atol=1e-6)
    last = plan(Causal() & Window(9), tokens[:, 20:], tokens)
    np.testing.assert_allclose(
        layer.attend(inputs()[:, 20:], k, v, last), expected[:, 20:], rtol=1e-5, atol=1e-6
    )


def test_bfloat16_computation_keeps_float32_weights():
    layer, linen_layer = twins(**OPTIONS, dtype=jnp.bfloat16)
    out = layer(inputs(), Causal())
    assert out.dtype == linen_layer(inputs(), Causal()).dtype == jnp.bfloat16
    assert layer.query.kernel[...].dtype == jnp.float32


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_our_layers_compile_once_over_a_curriculum(api):
    layer, linen_layer = twins(**OPTIONS)
    graph, state = nnx.split(layer)
    apply = {"nnx": lambda x, p: nnx.merge(graph, state)(x, p), "linen": linen_layer}[api]
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(step, x):
        the_plan = plan(CURRICULUM(step), Tokens.sequence(LENGTH), block_q=8, block_k=8)
        return apply(x, the_plan)

    seen = {round(float(run(step, inputs()).sum()), 4) for step in range(9)}
    assert len(seen) == 9, "each step's mask tells"


class Stack(nnx.Module):
    """Two of Flax's own layers."""

    def __init__(self, make_attention_fn, **options):
        self.layers = nnx.List(
            nnx.MultiHeadAttention(
                HEADS,
                WIDTH,
                rngs=nnx.Rngs(i),
                attention_fn=make_attention_fn(),
                **{"decode": False, **options},
            )
            for i in range(2)
        )

    def __call__(self, x, **options):
        for layer in self.layers:
            x = x + layer(x, **options)
        return x


def test_flax_nnx_layers_follow_the_step_in_one_compilation():
    ours = Stack(lambda: our_nnx.attention_fn(CURRICULUM))
    theirs = Stack(lambda: nnx.dot_product_attention)
    chex.clear_trace_counter()

    @nnx.jit
    @chex.assert_max_traces(n=1)
    def run(model, step, x):
        our_nnx.set_step(model, step)
        return model(x)

    for step in (0, 3, 8):
        expected = theirs(inputs(), mask=dense_mask(step))
        np.testing.assert_allclose(run(ours, step, inputs()), expected, rtol=2e-5, atol=5e-6)


def test_gradients_flow_through_flax_nnx_layers():
    ours, theirs = Stack(lambda: our_nnx.attention_fn(CURRICULUM)), Stack(lambda: nnx.dot_product_attention)
    our_nnx.set_step(ours, 4)
    actual = nnx.grad(lambda m: jnp.square(m(inputs())).mean())(ours)
    expected = nnx.grad(lambda m: jnp.square(m(inputs(), mask=dense_mask(4))).mean())(theirs)
    leaves = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for a, b in leaves:
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)


def test_flax_nnx_decodes_with_its_cache():
    mask = Causal() & Window(5)
    decoding = Stack(lambda: our_nnx.attention_fn(mask), decode=True)
    for layer in decoding.layers:
        layer.init_cache((2, LENGTH, WIDTH))
    together = Stack(lambda: our_nnx.attention_fn(mask))(inputs())
    for t in range(LENGTH):
        one = decoding(inputs()[:, t : t + 1])
        np.testing.assert_allclose(one[:, 0], together[:, t], rtol=2e-5, atol=5e-6)


def test_decoding_keeps_hidden_what_flax_hides():
    """A hole before the cursor: padding at the start of a cached prompt."""
    attend = our_linen.attention_fn(Causal())
    x = inputs().reshape(2, LENGTH, HEADS, -1)
    shown = (jnp.arange(LENGTH) <= 9) & (jnp.arange(LENGTH) != 4)
    actual = attend(x[:, :1], x, x, mask=shown[None, None, None].astype(jnp.float32))
    expected = nn.dot_product_attention(x[:, :1], x, x, mask=shown[None, None, None])
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_flax_linen_layers_take_the_step_as_an_argument():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, step):
            attend = our_linen.attention_fn(CURRICULUM(step))
            return nn.MultiHeadDotProductAttention(HEADS, attention_fn=attend, name="layer")(x)

    theirs = nn.MultiHeadDotProductAttention(HEADS)
    weights = theirs.init(jax.random.key(0), inputs())
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(weights, x, step):
        return Model().apply(weights, x, step)

    for step in (0, 3, 8):
        expected = theirs.apply(weights, inputs(), mask=dense_mask(step))
        actual = run({"params": {"layer": weights["params"]}}, inputs(), step)
        np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=5e-6)


def test_flax_linen_takes_a_plan_and_decodes_with_its_cache():
    the_plan = plan(Causal() & SameSegment(), Tokens.packed([10, 14]), block_q=8, block_k=8)
    layer = nn.MultiHeadDotProductAttention(HEADS, attention_fn=our_linen.attention_fn(the_plan))
    weights = layer.init(jax.random.key(0), inputs())
    theirs = nn.MultiHeadDotProductAttention(HEADS)
    expected = theirs.apply(
        weights, inputs(), mask=mask_tensor(the_plan.mask, Tokens.packed([10, 14]))[None, None]
    )
    np.testing.assert_allclose(layer.apply(weights, inputs()), expected, rtol=2e-5, atol=5e-6)

    cached = layer.clone(decode=True, attention_fn=our_linen.attention_fn(Causal()))
    variables = {**weights, "cache": cached.init(jax.random.key(0), inputs())["cache"]}
    together = theirs.apply(weights, inputs(), mask=nn.make_causal_mask(jnp.ones((2, LENGTH))))
    for t in range(4):
        one, change = cached.apply(variables, inputs()[:, t : t + 1], mutable=["cache"])
        variables = {**variables, **change}
        np.testing.assert_allclose(one[:, 0], together[:, t], rtol=2e-5, atol=5e-6)


def test_is_causal_and_more_batch_axes():
    x = jnp.stack([inputs(0), inputs(1)])
    mask = Causal() & Window(5)
    layer = nnx.MultiHeadAttention(
        HEADS, WIDTH, decode=False, rngs=nnx.Rngs(0), attention_fn=our_nnx.attention_fn(Window(5))
    )
    causal = nnx.MultiHeadAttention(
        HEADS, WIDTH, decode=False, rngs=nnx.Rngs(0), attention_fn=our_nnx.attention_fn(mask)
    )
    np.testing.assert_allclose(layer(x, is_causal=True), causal(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(causal(x)[1], causal(inputs(1)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "call", "words"),
    [
        ({}, {"mask": jnp.ones((2, 1, LENGTH, LENGTH))}, "takes a mask array over keys alone"),
        ({}, {"sow_weights": True}, "sow_weights must be False"),
        ({"precision": "highest"}, {}, "does not support precision='highest'"),
    ],
)
def test_what_flax_asks_and_we_have_not_is_refused(options, call, words):
    model = Stack(lambda: our_nnx.attention_fn(Causal()), **options)
    with pytest.raises(Unsupported, match=words):
        model(inputs(), **call)


def test_linen_does_not_keep_the_mask_to_itself():
    layer = nn.MultiHeadDotProductAttention(HEADS, attention_fn=our_linen.attention_fn(Causal()))
    with pytest.raises(Unsupported, match="takes a mask array over keys alone"):
        layer.init(jax.random.key(0), inputs(), mask=jnp.ones((2, 1, LENGTH, LENGTH)))
    with pytest.raises(Unsupported, match="sow_weights"):
        layer.init(jax.random.key(0), inputs(), sow_weights=True)


def heads_of(seed=0, batch=(2,)):
    """Queries, keys and values as a Flax layer passes them to its `attention_fn`."""
    return jax.random.normal(jax.random.key(seed), (3, *batch, LENGTH, HEADS, WIDTH // HEADS))


ATTENTION_FN = {"nnx": our_nnx.attention_fn, "linen": our_linen.attention_fn}
BROADCAST = pytest.mark.parametrize("broadcast", [True, False], ids=["broadcast", "each"])


@pytest.mark.parametrize("api", ATTENTION_FN)
def test_dropout_that_is_off_leaves_the_program_as_it_is(api):
    """Nothing is given to an attention that knows neither dropout nor bias."""

    def program(**options):
        bare = lambda q, k, v, mask_or_plan: attention(q, k, v, mask_or_plan)  # noqa: E731
        return str(
            jax.make_jaxpr(functools.partial(ATTENTION_FN[api](Causal(), attention=bare), **options))(
                *heads_of()
            )
        )

    without = program()
    assert program(dropout_rate=0.5, dropout_rng=jax.random.key(0), deterministic=True) == without
    assert program(dropout_rate=0.0, dropout_rng=jax.random.key(0), deterministic=False, bias=None) == without


@BROADCAST
@pytest.mark.parametrize("api", ATTENTION_FN)
@pytest.mark.parametrize("batch", [(2,), (3, 2)], ids=str)
def test_dropout_drops_flaxs_weights_by_our_draws(api, batch, broadcast):
    """Flax's own weights; where it broadcasts, one draw for all heads and all rows, of any batch axes."""
    q, k, v = heads_of(batch=batch)
    key = jax.random.key(7)
    options = {"dropout_rate": 0.4, "dropout_rng": key, "broadcast_dropout": broadcast}
    actual = ATTENTION_FN[api](Causal())(q, k, v, **options)
    rows = int(np.prod(batch))
    kept = dropout_mask(Dropout(0.4, key, broadcast), Tokens.sequence(LENGTH), batch=rows, heads=HEADS)
    alike = (kept == kept[:1, :1]).all(axis=(1, 2, 3))
    assert alike.all() == broadcast
    causal = nn.make_causal_mask(jnp.ones((*batch, LENGTH)))
    weights = nn.dot_product_attention_weights(q, k, mask=causal)
    weights = jnp.where(kept.reshape(*batch, *kept.shape[1:]), weights / 0.6, 0.0)
    np.testing.assert_allclose(actual, jnp.einsum("...hqk,...khd->...qhd", weights, v), rtol=2e-5, atol=5e-6)


def by_hand(query, key, value, *, dropout_rate, dropout_rng, broadcast_dropout, **others):
    """An `attention_fn` without an adapter."""
    dropout = Dropout(dropout_rate, dropout_rng, broadcast_dropout)
    return attention(query, key, value, Causal(), dropout=dropout)


@BROADCAST
def test_dropout_in_flax_nnx_layers_is_that_of_attention_and_draws_anew(broadcast):
    options = {"dropout_rate": 0.3, "broadcast_dropout": broadcast, "deterministic": False}
    ours = Stack(lambda: our_nnx.attention_fn(Causal()), **options)
    theirs = Stack(lambda: by_hand, **options)

    def value_and_grad(model):
        return nnx.value_and_grad(lambda m: jnp.square(m(inputs())).mean())(model)

    first, second = ((value_and_grad(model) for model in (ours, theirs)) for _ in range(2))
    losses = []
    for actual, expected in (first, second):
        losses.append(float(actual[0]))
        leaves = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
        for a, b in leaves:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    assert losses[0] != losses[1]
    without = Stack(lambda: our_nnx.attention_fn(Causal()))
    np.testing.assert_array_equal(ours(inputs(), deterministic=True), without(inputs()))
    assert not np.allclose(ours(inputs()), without(inputs()))


@BROADCAST
def test_dropout_in_flax_linen_layers_is_that_of_attention_at_the_key(broadcast):
    options = {"dropout_rate": 0.3, "broadcast_dropout": broadcast}
    ours = nn.MultiHeadDotProductAttention(HEADS, attention_fn=our_linen.attention_fn(Causal()), **options)
    theirs = nn.MultiHeadDotProductAttention(HEADS, attention_fn=by_hand, **options)
    weights = ours.init(jax.random.key(0), inputs(), deterministic=True)

    def run(layer, key):
        call = lambda weights: layer.apply(  # noqa: E731
            weights, inputs(), deterministic=False, rngs={"dropout": key}
        )
        return jax.value_and_grad(lambda weights: jnp.square(call(weights)).mean())(weights)

    # Keys of both kinds: typed, and the older uint32.
    actual, other = (run(ours, key) for key in (jax.random.key(1), jax.random.PRNGKey(2)))
    chex.assert_trees_all_close(actual, run(theirs, jax.random.key(1)), rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_equal(actual, run(ours, jax.random.key(1)))
    assert float(actual[0]) != float(other[0])
    without = ours.clone(dropout_rate=0.0).apply(weights, inputs())
    np.testing.assert_array_equal(ours.apply(weights, inputs(), deterministic=True), without)


def falls(losses):
    losses = np.array(losses)
    return np.isfinite(losses).all() and losses[-4:].mean() < 0.8 * losses[:4].mean()


@pytest.mark.parametrize("broadcast", mostly([True, False], [False]), ids=["broadcast", "each"])
def test_flax_nnx_layers_train_with_dropout_in_one_compilation(broadcast):
    model = Stack(
        lambda: our_nnx.attention_fn(CURRICULUM),
        dropout_rate=0.1,
        broadcast_dropout=broadcast,
        deterministic=False,
    )
    optimizer = nnx.Optimizer(model, optax.sgd(0.5, momentum=0.5), wrt=nnx.Param)
    chex.clear_trace_counter()

    @nnx.jit
    @chex.assert_max_traces(n=1)
    def train(model, optimizer, step):
        our_nnx.set_step(model, step)
        loss, grads = nnx.value_and_grad(lambda m: jnp.square(m(inputs()) - inputs(1)).mean())(model)
        optimizer.update(model, grads)
        return loss

    assert falls([train(model, optimizer, jnp.int32(step)) for step in range(16)])


@pytest.mark.parametrize("broadcast", mostly([True, False], [True]), ids=["broadcast", "each"])
def test_flax_linen_layers_train_with_dropout_in_one_compilation(broadcast):
    """As lm1b's blocks call theirs."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, step):
            attend = our_linen.attention_fn(CURRICULUM(step))
            for _ in range(2):
                x = x + nn.MultiHeadDotProductAttention(
                    HEADS,
                    use_bias=False,
                    dropout_rate=0.1,
                    broadcast_dropout=broadcast,
                    deterministic=False,
                    attention_fn=attend,
                )(x)
            return x

    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    weights, optimizer = Model().init(keys, inputs(), 0), optax.sgd(0.5, momentum=0.5)
    state = optimizer.init(weights)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def train(weights, state, step):
        def loss(weights):
            rngs = {"dropout": jax.random.fold_in(jax.random.key(1), step)}
            return jnp.square(Model().apply(weights, inputs(), step, rngs=rngs) - inputs(1)).mean()

        value, grads = jax.value_and_grad(loss)(weights)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(weights, updates), state, value

    losses = []
    for step in range(16):
        weights, state, value = train(weights, state, jnp.int32(step))
        losses.append(float(value))
    assert falls(losses)


@pytest.mark.parametrize("api", ATTENTION_FN)
def test_a_bias_of_attention_or_of_the_call_is_what_flax_adds(api):
    q, k, v = heads_of()
    bias = ALiBi.for_heads(HEADS)
    expected = nn.dot_product_attention(
        q,
        k,
        v,
        bias=bias_tensor(bias, Tokens.sequence(LENGTH), heads=HEADS)[None],
        mask=nn.make_causal_mask(jnp.ones((2, LENGTH))),
    )
    with_bias = ATTENTION_FN[api](Causal(), attention=functools.partial(attention, bias=bias))
    np.testing.assert_allclose(with_bias(q, k, v), expected, rtol=2e-5, atol=5e-6)
    np.testing.assert_allclose(
        ATTENTION_FN[api](Causal())(q, k, v, bias=bias), expected, rtol=2e-5, atol=5e-6
    )


def test_a_bias_of_attention_reaches_flaxs_layers_over_a_curriculum():
    bias = ALiBi.for_heads(HEADS)
    model = Stack(lambda: our_nnx.attention_fn(CURRICULUM, attention=functools.partial(attention, bias=bias)))
    array = bias_tensor(bias, Tokens.sequence(LENGTH), heads=HEADS)[None]
    theirs = Stack(lambda: functools.partial(nnx.dot_product_attention, bias=array))

    @nnx.jit
    def run(model, step):
        our_nnx.set_step(model, step)
        return model(inputs())

    for step in (0, 8):
        expected = theirs(inputs(), mask=dense_mask(step))
        np.testing.assert_allclose(run(model, step), expected, rtol=2e-5, atol=5e-6)


class Learned(nnx.Module):
    """An `attention_fn` with T5's table, given as an expression, or as the array that it stands for."""

    def __init__(self, as_array):
        self.table = nnx.Param(jax.random.normal(jax.random.key(3), (HEADS, 32)))
        self.as_array = as_array
        self.attend = our_nnx.attention_fn(Everything())

    def __call__(self, query, key, value, **options):
        bias = RelativeBuckets(self.table[...])
        if self.as_array:
            array = bias_tensor(bias, Tokens.sequence(LENGTH), heads=HEADS)[None]
            return nnx.dot_product_attention(query, key, value, bias=array, **options)
        return self.attend(query, key, value, bias=bias, **options)


def test_a_learned_bias_of_a_module_around_attention_fn_has_its_gradient():
    ours, theirs = (Stack(lambda as_array=as_array: Learned(as_array)) for as_array in (False, True))
    actual, expected = (nnx.grad(lambda m: jnp.square(m(inputs())).mean())(model) for model in (ours, theirs))
    chex.assert_trees_all_close(nnx.to_pure_dict(actual), nnx.to_pure_dict(expected), rtol=2e-4, atol=1e-6)
    assert np.abs(actual["layers"][0]["attention_fn"]["table"][...]).max() > 1e-4


def test_a_learned_bias_of_a_linen_module_has_its_gradient():
    class Model(nn.Module):
        as_array: bool

        @nn.compact
        def __call__(self, x):
            bias = RelativeBuckets(self.param("table", nn.initializers.normal(1.0), (HEADS, 32)))
            attend = our_linen.attention_fn(Everything(), attention=functools.partial(attention, bias=bias))
            if self.as_array:
                array = bias_tensor(bias, Tokens.sequence(LENGTH), heads=HEADS)[None]
                attend = functools.partial(nn.dot_product_attention, bias=array)
            return nn.MultiHeadDotProductAttention(HEADS, attention_fn=attend)(x)

    weights = Model(False).init(jax.random.key(0), inputs())
    actual, expected = (
        jax.grad(lambda weights, model: jnp.square(model.apply(weights, inputs())).mean())(weights, model)
        for model in (Model(False), Model(True))
    )
    chex.assert_trees_all_close(actual, expected, rtol=2e-4, atol=1e-6)
    assert np.abs(actual["params"]["table"]).max() > 1e-4


ALIBI = ALiBi.for_heads(HEADS)
SAME_TEXT = BiasFunction(lambda q, k: jnp.where(q.segment == k.segment, 0.5, 0.0))


def test_options_of_one_call_of_a_layer_of_our_own():
    layer, linen_layer = twins(**OPTIONS)
    x, dropout = inputs(), Dropout(0.3, jax.random.key(1))
    found = layer(x, Causal(), dropout=dropout)
    np.testing.assert_array_equal(found, linen_layer(x, Causal(), dropout=dropout))
    assert not np.allclose(found, layer(x, Causal()), atol=1e-3)
    for each in (layer, linen_layer):
        with pytest.raises(ValueError, match="reads the segments of tokens"):
            each(x, Causal(), bias=SAME_TEXT)
        with pytest.raises(ValueError, match=r"ALiBi.* reads positions"):
            each(x, Everything(), x[:, :9], bias=ALIBI)


def test_a_bias_that_reads_segments_is_told_of_them():
    attend = our_nnx.attention_fn(Causal(), attention=functools.partial(attention, bias=SAME_TEXT))
    tokens = Tokens.packed([10, 14])
    our_nnx.set_tokens(attend, tokens)
    expected = attention(*heads_of(), plan(Causal(), tokens), bias=SAME_TEXT)
    np.testing.assert_allclose(attend(*heads_of()), expected, rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("api", ATTENTION_FN)
def test_a_bias_of_the_layer_beside_that_of_a_context_parallel_is_refused(api):
    mesh = jax.make_mesh(
        (2,), ("context",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2]
    )
    spread = context_parallel(functools.partial(attention, bias=ALIBI), mesh=mesh)
    with pytest.raises(ValueError, match="was made with bias, and got bias of its layer too"):
        ATTENTION_FN[api](Causal(), attention=spread, backend="xla")(*heads_of(), bias=ALIBI)


@pytest.mark.parametrize("api", ATTENTION_FN)
@pytest.mark.parametrize(
    ("made", "options", "error", "words"),
    [
        (
            {},
            {"dropout_rate": 0.1},
            ValueError,
            "got dropout_rate=0.1 and no dropout_rng, a key of jax.random",
        ),
        (
            {},
            {"dropout_rate": 1.0, "dropout_rng": jax.random.key(0)},
            ValueError,
            r"rate must lie in 0…1 \(1 excluded\), got 1.0",
        ),
        ({}, {"bias": jnp.zeros((1, HEADS, 1, 1))}, TypeError, r"got an array \(1, 4, 1, 1\): .* ALiBi"),
        ({"bias": ALIBI}, {"bias": ALIBI}, ValueError, "was made with bias, and got bias of its layer too"),
        ({"bias": SAME_TEXT}, {}, ValueError, "reads segments, and none were told"),
        ({}, {"bias": SAME_TEXT}, ValueError, "reads segments, and none were told"),
        (
            {"dropout": Dropout(0.1, jax.random.key(0))},
            {"dropout_rate": 0.1, "dropout_rng": jax.random.key(0)},
            ValueError,
            "was made with dropout, and got dropout of its layer too",
        ),
    ],
)
def test_a_wrong_bias_or_dropout_is_refused(api, made, options, error, words):
    attend = ATTENTION_FN[api](Causal(), attention=functools.partial(attention, **made))
    with pytest.raises(error, match=words):
        attend(*heads_of(), **options)


def test_an_unreadable_mask_warns_inside_a_layer_too():
    layer, _ = twins(**OPTIONS)
    with pytest.warns(UserWarning, match=UNREADABLE):
        layer(inputs(), MASKS["unreadable"])


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (
            lambda: twins(num_heads=4, num_kv_heads=3),
            ValueError,
            r"num_kv_heads must divide num_heads \(4\), got 3",
        ),
        (
            lambda: twins(num_heads=5),
            ValueError,
            r"num_heads must divide features \(32\), got 5; or give head_dim",
        ),
        (lambda: our_nnx.attention_fn(Causal(), attention=3), TypeError, "attention must be a function like"),
        (
            lambda: our_linen.attention_fn(Causal(), attention=3),
            TypeError,
            "attention must be a function like",
        ),
        (
            lambda: our_linen.attention_fn(plan(Causal(), Tokens.sequence(8)), block_q=4),
            ValueError,
            "block_q and block_k are for a mask: the plan has blocks of 8 x 8",
        ),
        (lambda: our_nnx.attention_fn(3), TypeError, "needs a curriculum or a mask, got int"),
        (lambda: our_linen.attention_fn(CURRICULUM), TypeError, r"curriculum\(step\)"),
        (
            lambda: our_nnx.set_step(Stack(lambda: our_nnx.attention_fn(CURRICULUM)), 2.5),
            TypeError,
            "got 2.5",
        ),
        (
            lambda: our_nnx.set_step(Stack(lambda: our_nnx.attention_fn(CURRICULUM)), "3"),
            TypeError,
            "got '3'",
        ),
        (lambda: twins(num_heads=0), ValueError, "num_heads must be at least 1, got 0"),
        (
            lambda: twins(**OPTIONS)[0](inputs()[:, :8], plan(Causal(), Tokens.sequence(16))),
            ValueError,
            "plan is for 16 queries and 16 keys, got 8 and 8",
        ),
        (
            lambda: jax.eval_shape(lambda n: our_nnx.attention_fn(Window(n)).step[...], jnp.int32(3)),
            ValueError,
            "use Python or NumPy numbers",
        ),
        (
            lambda: our_nnx.set_step(twins(**OPTIONS)[0], 3),
            ValueError,
            r"the model has no attention_fn \(dynmask_jax.nnx\) that follows",
        ),
        (
            lambda: twins(num_heads=4, head_dim=7, rope_theta=1e4)[0](inputs(), Causal()),
            ValueError,
            "even head dim, got 7",
        ),
    ],
)
def test_wrong_layers_are_refused(build, error, words):
    with pytest.raises(error, match=words):
        build()


def test_per_head_curricula_reach_every_head():
    curriculum = reveal(
        4, linear(0.0, 1.0, steps=8), "random", base=Causal() & Window(jnp.array([1, 4, 8, 24]))
    )
    layer, linen_layer = twins(**OPTIONS)
    expected = linen_layer(inputs(), curriculum(3))
    np.testing.assert_array_equal(layer(inputs(), curriculum(3)), expected)
    assert (np.asarray(expected) != np.asarray(layer(inputs(), Causal()))).any()


def restored():
    """A model that follows a curriculum, with weights of another and no step."""
    trained, fresh = (Stack(lambda: our_nnx.attention_fn(CURRICULUM)) for _ in range(2))
    our_nnx.set_step(trained, 9)
    nnx.update(fresh, nnx.state(trained, nnx.Param))
    return fresh, trained


NO_STEP = r"no step was set: set_step\(model, step\) in training, set_final\(model\) for the full mask"


def gradient(run):
    return nnx.grad(lambda model, x: run(model, x).sum())


@pytest.mark.parametrize("call", [lambda run: run, nnx.jit, gradient])
def test_weights_without_their_step_do_not_run_at_the_curriculums_start(call):
    model, _ = restored()
    run = call(lambda model, x: model(x))
    with pytest.raises(ValueError, match=NO_STEP):
        run(model, inputs())
    our_nnx.set_step(model, 0)
    run(model, inputs())


@nnx.jit
def decode(model, x):
    return model(x)


def test_what_a_trace_cannot_refuse_is_nan():
    """One of several copies was set, so the structure says yes for all: the step's own number decides."""
    never, _ = restored()
    copy = nnx.clone(never)
    our_nnx.set_final(copy)
    assert np.isfinite(decode(copy, inputs())).all()
    assert np.isnan(decode(never, inputs())).all()
    fresh = nnx.state(restored()[0])
    nnx.update(copy, fresh)
    assert np.isnan(decode(copy, inputs())).all()
    graph, state = nnx.split(never)
    assert np.isnan(jax.jit(lambda state: nnx.merge(graph, state)(inputs()))(state)).all()


@pytest.mark.parametrize("step", [-1, 2**31, np.int64(2**40), np.uint32(3_000_000_000)])
def test_steps_beyond_int32_are_refused(step):
    with pytest.raises(ValueError, match="step must lie in 0 … 2³¹ − 1, got"):
        our_nnx.set_step(restored()[0], step)


def test_a_functional_call_without_a_step_is_refused_too():
    graph, state = nnx.split(restored()[0])
    with pytest.raises(ValueError, match=NO_STEP):
        jax.jit(lambda state: nnx.merge(graph, state)(inputs()))(state)


def test_the_end_of_the_curriculum_is_the_full_mask():
    model, _ = restored()
    our_nnx.set_final(model)
    full = Stack(lambda: our_nnx.attention_fn(CURRICULUM(10**6)))
    nnx.update(full, nnx.state(model, nnx.Param))
    np.testing.assert_array_equal(model(inputs()), full(inputs()))
    with pytest.raises(ValueError, match="the model has no attention_fn"):
        our_nnx.set_final(full)


def test_a_step_set_first_inside_jit_is_one_compilation():
    model, traces = Stack(lambda: our_nnx.attention_fn(CURRICULUM)), []

    @nnx.jit
    def train(model, step):
        traces.append(step)
        our_nnx.set_step(model, step)
        return model(inputs())

    outs = [train(model, jnp.int32(step)) for step in (0, 3, 9)]
    assert len(traces) == 1
    assert not np.allclose(outs[0], outs[2])
    np.testing.assert_allclose(model(inputs()), outs[2], rtol=1e-5, atol=1e-6)


def test_a_whole_state_restored_brings_its_step():
    fresh, trained = restored()
    nnx.update(fresh, nnx.state(trained))
    np.testing.assert_array_equal(fresh(inputs()), trained(inputs()))
    # What is traced cannot be read, so `jit` wants to be told; a copy was told.
    with pytest.raises(ValueError, match=NO_STEP):
        nnx.jit(lambda model: model(inputs()))(fresh)
    copy = nnx.clone(trained)
    np.testing.assert_array_equal(nnx.jit(lambda model: model(inputs()))(copy), trained(inputs()))


def test_a_state_from_before_attention_fn_is_restored_into_the_parameters():
    """As `attention_fn` documents it: such a state has no step."""
    before = Stack(lambda: nnx.dot_product_attention)
    state = nnx.state(before)
    after = Stack(lambda: our_nnx.attention_fn(CURRICULUM))
    nnx.update(after, state)
    our_nnx.set_final(after)
    expected = nnx.state(before, nnx.Param)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), nnx.state(after, nnx.Param), expected))


def test_one_mask_has_no_state_beside_the_parameters():
    model = Stack(lambda: our_nnx.attention_fn(Causal()))
    graph, params = nnx.split(model, nnx.Param)
    np.testing.assert_array_equal(nnx.merge(graph, params)(inputs()), model(inputs()))
    curriculum = Stack(lambda: our_nnx.attention_fn(CURRICULUM))
    graph, params, rest = nnx.split(curriculum, nnx.Param, ...)
    assert {type(leaf) for leaf in jax.tree.leaves(rest, is_leaf=lambda x: isinstance(x, nnx.Variable))} == {
        our_nnx.Step
    }


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (Causal, TypeError, r"needs a curriculum or a mask, got Causal: an instance, Causal\(…\)"),
        (
            linear(1, 8, 5),
            TypeError,
            r"this one gives a number: .* attention_fn\(growing_window\(schedule\)\)",
        ),
        (lambda step: (Causal(), step), TypeError, "this one gives tuple"),
        (None, TypeError, r"got NoneType; .* Everything\(\)"),
    ],
)
def test_what_attention_fn_cannot_follow_is_refused_where_it_is_made(value, error, words):
    with pytest.raises(error, match=words):
        our_nnx.attention_fn(value)


def test_a_curriculum_of_pythons_conditions_works_outside_jit():
    model = Stack(lambda: our_nnx.attention_fn(lambda step: Causal() & Window(2 if step < 5 else LENGTH)))
    outs = []
    for step in (0, 9):
        our_nnx.set_step(model, step)
        outs.append(model(inputs()))
    assert not np.allclose(*outs)


def test_a_query_whose_own_key_is_hidden_while_it_decodes_sees_the_others():
    """As padding in one row of a batch: no NaN, and under Causal() what the array shows."""
    x = inputs().reshape(2, LENGTH, HEADS, -1)
    shown = np.arange(LENGTH) <= 5
    hidden = np.stack([shown, shown & (np.arange(LENGTH) != 5)])[:, None, None]
    out = our_linen.attention_fn(Causal())(x[:, 5:6], x, x, mask=jnp.asarray(hidden))
    expected = nn.dot_product_attention(x[:, 5:6], x, x, mask=jnp.asarray(hidden))
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=5e-6)
    nothing = our_linen.attention_fn(Causal())(x[:, 5:6], x, x, mask=jnp.zeros_like(hidden))
    assert not np.asarray(nothing).any()
