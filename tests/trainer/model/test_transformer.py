"""The Transformer: what one token may change, what layers share, and decoding with a cache."""

import zlib
from dataclasses import replace

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MASKS
from slow import mostly
from train_cases import MODEL

from dynmask_jax import ALiBi, Causal, Chunks, SameSegment, Tokens, Window, plan
from train.config.model import RopeScaling
from train.model.transformer import Transformer

LENGTH = 16
TOKENS = jax.random.randint(jax.random.key(0), (1, LENGTH), 0, 256)
PATTERN = ("local", "global")
EVERY_OPTION = {
    "head_dim": 4,
    "activation": "gelu_tanh",
    "embedding_scale": 2.0,
    "qkv_bias": True,
    "out_bias": True,
    "qk_norm": True,
    "post_norms": True,
    "norm_unit_offset": True,
    "norm_eps": 1e-1,
    "query_scale": 0.7,
    "attention_soft_cap": 2.0,
    "logits_soft_cap": 3.0,
    "rope_local_theta": 100.0,
    "rope_scaling": RopeScaling("yarn", 4.0, 8),
}
"""Options of checkpoints of other families, away from their defaults, but for tied embeddings."""


def transformer(**options) -> Transformer:
    """With a last projection that is not zero, so that logits tell tokens apart."""
    model = Transformer(replace(MODEL, **{"layers": 2, **options}), 256, rngs=nnx.Rngs(0))
    model.logits.kernel[...] = jax.random.normal(jax.random.key(1), model.logits.kernel.shape)
    return model


@pytest.fixture(scope="module")
def model():
    return transformer()


def plans(mask, q=Tokens.sequence(LENGTH), k=None, local=4):
    """The mask in global layers, and the last few tokens of what it shows in local ones."""
    masks = {"global": mask, "local": mask & Window(local)}
    return {reach: plan(seen, q, k, block_q=4, block_k=4) for reach, seen in masks.items()}


@nnx.jit
def features(model, tokens, seen, key=None):
    return model(tokens, seen, key)


def changed(model, mask, at):
    """Which positions' hidden features change with the token at one position."""
    before, after = (features(model, tokens, plans(mask)) for tokens in (TOKENS, TOKENS.at[0, at].add(1)))
    return np.flatnonzero(jnp.abs(before - after).max(axis=(0, 2)) > 1e-6).tolist()


def test_a_token_reaches_itself_and_all_later_ones(model):
    assert changed(model, Causal(), 9) == list(range(9, 16))


def test_every_layer_follows_the_plan(model):
    assert changed(model, Causal() & Chunks(4), 9) == [9, 10, 11]


def test_each_layer_has_the_reach_of_the_pattern():
    local = transformer(pattern=("local",), layers=2)
    assert changed(local, Causal(), 2) == list(range(2, 9)), "two layers of 4 tokens, one after the other"
    mixed = transformer(pattern=PATTERN, layers=6)
    assert changed(mixed, Causal(), 2) == list(range(2, 16))


def test_shapes_and_grouped_heads():
    model = transformer(pattern=PATTERN, layers=6)
    hidden = features(model, TOKENS, plans(Causal()))
    assert hidden.shape == (1, LENGTH, 16)
    assert model.unembed(hidden).shape == (1, LENGTH, 256)
    for block in model.groups.layers:
        assert block.attention.query.kernel.shape == (3, 16, 2, 8)
        assert block.attention.key.kernel.shape == (3, 16, 1, 8)


@pytest.mark.parametrize(
    ("key", "layers", "options"),
    [(None, 6, {}), (jax.random.key(7), 7, {}), (None, 7, EVERY_OPTION)],
    ids=["plain", "dropout and a rest", "every option"],
)
def test_many_layers_in_a_loop_are_the_same_layers_one_after_the_other(key, layers, options):
    model = transformer(layers=layers, pattern=PATTERN, attention_dropout=0.3, **options)
    x, seen = model.embed(TOKENS) * options.get("embedding_scale", 1.0), plans(Causal())
    for group in range(3):
        for i, (reach, block) in enumerate(zip(PATTERN, model.groups.layers, strict=True)):
            graph, stacked = nnx.split(block)
            one = nnx.merge(graph, jax.tree.map(lambda w, n=group: w[n], stacked))
            x, _ = one(x, seen[reach], 2 * group + i, None, key)
    if layers == 7:
        x, _ = model.rest.layers[0](x, seen["local"], 6, None, key)
    np.testing.assert_allclose(features(model, TOKENS, seen, key), model.norm(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("option", EVERY_OPTION)
def test_every_option_has_an_effect(option):
    """With all of them on, each alone put back to its default changes the logits."""
    outs = []
    for left_out in (None, option):
        options = {name: value for name, value in EVERY_OPTION.items() if name != left_out}
        model = transformer(layers=3, pattern=PATTERN, **options)
        graph, state = nnx.split(model)
        drawn = jax.tree.map_with_path(drawn_by_name, nnx.to_pure_dict(state))
        model = nnx.merge(graph, drawn)
        outs.append(model.unembed(features(model, TOKENS, plans(Causal()))))
    assert jnp.abs(outs[0] - outs[1]).max() > 1e-3


def drawn_by_name(path, leaf):
    """Random weights, the same for the same name and shape, with no norm or bias at its first value."""
    name = jax.tree_util.keystr(path)
    return 0.5 * jax.random.normal(jax.random.key(zlib.crc32(name.encode())), leaf.shape)


def first_block(model):
    graph, stacked = nnx.split(model.groups.layers[0])
    return nnx.merge(graph, jax.tree.map(lambda w: w[0], stacked))


def test_layers_and_keys_drop_otherwise_and_without_a_key_nothing_is_dropped(model):
    x, seen = model.embed(TOKENS), plans(Causal())["global"]
    block = first_block(transformer(attention_dropout=0.3))
    drawn = [(0, jax.random.key(0)), (1, jax.random.key(0)), (0, jax.random.key(1))]
    outs = [block(x, seen, layer, None, key)[0] for layer, key in drawn]
    plain = first_block(model)(x, seen)[0]
    for i, out in enumerate(outs):
        assert all(jnp.abs(out - other).max() > 1e-2 for other in [plain, *outs[:i]])
    np.testing.assert_array_equal(block(x, seen)[0], plain)


def test_alibi_is_added_to_the_scores_and_rotary_positions_stay():
    x, seen = transformer().embed(TOKENS), plans(Causal())["global"]
    biased, plain = (first_block(transformer(bias=bias)).attention for bias in ("alibi", "none"))
    k, v = plain.keys_values(x, seen.q_tokens)
    expected = plain.attend(x, k, v, seen, bias=ALiBi.for_heads(MODEL.heads))
    np.testing.assert_array_equal(biased.attend(x, k, v, seen), expected)
    assert jnp.abs(expected - plain.attend(x, k, v, seen)).max() > 1e-2


def test_layers_begin_with_weights_of_their_own():
    kernels = [
        block.attention.query.kernel[...] for block in transformer(pattern=PATTERN, layers=4).groups.layers
    ]
    layers = np.concatenate(kernels).reshape(4, -1)
    assert len({tuple(layer) for layer in layers.tolist()}) == 4


def gradient(model, tokens=TOKENS, key=None):
    graph, weights = nnx.split(model)
    seen = plans(Causal())
    return jax.jit(jax.grad(lambda w: jnp.square(nnx.merge(graph, w)(tokens, seen, key)[:, :, 0]).sum()))(
        weights
    )


REMAT = [("full", 2), ("dots", 5), ("dots_no_batch", 5)]


@pytest.mark.parametrize(("remat", "layers"), mostly(REMAT, REMAT[1:]))  # `full` below
def test_remat_changes_no_gradient(remat, layers):
    expected, actual = (gradient(transformer(remat=name, layers=layers)) for name in ("none", remat))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", mostly([2, 5], [5]))
def test_remat_drops_the_same_again(layers):
    key = jax.random.key(3)
    expected, actual = (
        jax.tree.leaves(gradient(transformer(remat=name, layers=layers, attention_dropout=0.3), key=key))
        for name in ("none", "full")
    )
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", mostly([6, 8], [6]))
def test_remat_keeps_less(layers):
    """The lesser the policy, the fewer bytes the backward pass waits with.

    Of layers in a loop: those of few XLA for CPU computes anew right away, and keeps them.
    """
    seen, tokens = plans(Causal()), jnp.tile(TOKENS, (64, 1))

    def temporary(remat):
        graph, weights = nnx.split(transformer(remat=remat, layers=layers))
        loss = lambda w: nnx.merge(graph, w)(tokens, seen).sum()  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(weights).compile().memory_analysis().temp_size_in_bytes

    full, dots, none = map(temporary, ("full", "dots", "none"))
    assert full < dots < none


def test_a_programs_size_does_not_depend_on_the_layers():
    def lines(layers, **options):
        graph, weights = nnx.split(transformer(layers=layers, **options))
        seen = plans(Causal())
        loss = lambda w: nnx.merge(graph, w)(TOKENS, seen).sum()  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(weights).as_text().count("\n")

    assert lines(5) == lines(12)
    assert lines(6, pattern=PATTERN) == lines(12, pattern=PATTERN) > lines(5)


@pytest.mark.parametrize("remat", mostly(["none", "dots"], ["dots"]))
def test_bfloat16_computes_in_it_and_keeps_weights_and_logits_in_float32(remat):
    model = transformer(dtype="bfloat16", remat=remat)
    hidden = features(model, TOKENS, plans(Causal()))
    assert hidden.dtype == jnp.bfloat16
    assert model.unembed(hidden).dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient(model))} == {jnp.dtype("float32")}
    exact = features(transformer(), TOKENS, plans(Causal()))
    np.testing.assert_allclose(hidden.astype(jnp.float32), exact, atol=0.06)
    assert model.begin_cache(1, 4).keys["global"].dtype == jnp.bfloat16


@nnx.jit
def decode(model, piece, q, k, mask, cache, slot):
    return model.decode(piece, plans(mask, q, k), cache, slot)


def decoded(model, tokens, mask, at: Tokens, cuts):
    """Hidden features of the tokens, given in pieces that end at the cuts, with two slots to spare."""
    batch, length = tokens.shape
    cache, pieces = model.begin_cache(batch, length + 2), []
    position, segment = (jnp.pad(x, ((0, 0), (0, 2))) for x in (at.position, at.segment))
    for start, end in zip([0, *cuts[:-1]], cuts, strict=True):
        slots = Tokens(position, jnp.where(jnp.arange(length + 2)[None] < end, segment, 0))
        piece, q = tokens[:, start:end], at[:, start:end]
        hidden, cache = decode(model, piece, q, slots, mask, cache, jnp.int32(start))
        pieces.append(hidden)
    return jnp.concatenate(pieces, axis=1)


@pytest.mark.parametrize(
    ("name", "layers", "options"),
    [
        ("window", 6, {}),
        pytest.param("sinks", 6, {}, marks=pytest.mark.slow),
        pytest.param("strided", 2, {}, marks=pytest.mark.slow),
        ("sinks", 2, {"bias": "alibi", "attention_dropout": 0.5}),
        ("window", 5, EVERY_OPTION),
    ],
)
def test_decoding_in_steps_is_one_pass(name, layers, options):
    deep = transformer(pattern=PATTERN, layers=layers, **options)
    tokens = jax.random.randint(jax.random.key(3), (2, LENGTH), 0, 256)
    # Two documents in a row, and beside it a row that begins with padding.
    place = jnp.arange(LENGTH)
    at = Tokens(
        jnp.stack([place % 10, place + 3]), jnp.stack([1 + place // 10, (place >= 2).astype(jnp.int32)])
    )
    mask = MASKS[name] & Causal() & SameSegment()
    together = features(deep, tokens, plans(mask, at))
    apart = decoded(deep, tokens, mask, at, [8, *range(9, LENGTH + 1)])
    np.testing.assert_allclose(apart, together, rtol=2e-5, atol=1e-5)


def test_decoding_reads_the_cache(model):
    """Another token in the first piece must change the features of the second."""
    at = Tokens.sequence(LENGTH)[None]
    outs = [
        decoded(model, tokens, Causal() & SameSegment(), at, [8, LENGTH])
        for tokens in (TOKENS, TOKENS.at[0, 3].add(1))
    ]
    assert jnp.abs(outs[0] - outs[1])[:, 8:].max() > 1e-3
