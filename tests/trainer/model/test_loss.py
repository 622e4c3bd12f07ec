"""The chunked cross-entropy: the same numbers and gradients as all logits at once, in linear memory."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow import mostly

from train.config.sections import Loss
from train.model.loss import token_losses

WIDTH, VOCABULARY = 8, 37


def case(batch=2, length=13):
    """Hidden features, a projection, targets, and weights of which a few are 0."""
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (batch, length, WIDTH))
    kernel = jax.random.normal(keys[1], (WIDTH, VOCABULARY))
    targets = jax.random.randint(keys[2], (batch, length), 0, VOCABULARY)
    weights = jnp.where(jnp.arange(length)[None] % 5 > 0, jax.random.uniform(keys[3], (batch, length)), 0.0)
    return hidden, kernel, targets, weights


def chunked(hidden, kernel, targets, weights, few=False, **options):
    losses = token_losses(hidden, lambda x: x @ kernel, targets, weights, Loss(**options), few=few)
    return losses.nats, losses.penalty


def plain(hidden, kernel, targets, weights, z):
    logits = hidden @ kernel
    normaliser = jnp.log(jnp.exp(logits).sum(axis=-1))
    nats = normaliser - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.where(weights != 0, nats, 0), jnp.where(weights != 0, z * normaliser**2, 0)


CHUNKS = [(chunk, z) for chunk in (1, 2, 6, 8, 26, None) for z in (0.0, 0.1)]


@pytest.mark.parametrize(("chunk", "z"), mostly(CHUNKS, [(1, 0.0), (6, 0.1), (8, 0.1), (None, 0.1)]))
def test_any_chunk_gives_each_tokens_loss(chunk, z):
    for a, b in zip(chunked(*case(), chunk=chunk, z=z), plain(*case(), z), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", mostly([1, 6, 1024], [6]))
def test_any_chunk_gives_the_gradient(chunk):
    hidden, kernel, targets, weights = case()

    def total(losses):
        return (weights * (losses[0] + losses[1])).sum()

    actual = jax.grad(lambda h, k: total(chunked(h, k, targets, weights, chunk=chunk, z=0.1)), (0, 1))
    expected = jax.grad(lambda h, k: total(plain(h, k, targets, weights, 0.1)), (0, 1))
    for a, b in zip(actual(hidden, kernel), expected(hidden, kernel), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_what_has_no_weight_has_no_loss_even_where_it_is_not_finite():
    hidden, kernel, targets, weights = case()
    broken = jnp.where(weights[..., None] == 0, jnp.nan, hidden)
    for chunk in (4, 1024):
        np.testing.assert_array_equal(
            chunked(broken, kernel, targets, weights, chunk=chunk)[0],
            chunked(hidden, kernel, targets, weights, chunk=chunk)[0],
        )


def test_a_chunk_without_a_weight_makes_no_logits():
    """A document before its summary: the logits of its chunks are not computed."""
    hidden, kernel, targets, _ = case(batch=1, length=16)
    weights = (jnp.arange(16)[None] >= 12).astype(jnp.float32)
    made = []

    def logits(x):
        jax.debug.callback(lambda: made.append(1))
        return x @ kernel

    jax.block_until_ready(token_losses(hidden, logits, targets, weights, Loss(chunk=4)))
    jax.effects_barrier()
    assert len(made) == 1


def summaries(batch=3, length=29):
    """A case in which few tokens have a weight: none in the first row, and most in the last."""
    hidden, kernel, targets, weights = case(batch, length)
    few = (jnp.arange(length)[None] * jnp.arange(batch)[:, None]) % 7 > 4
    return hidden, kernel, targets, jnp.where(few, weights, 0.0)


@pytest.mark.parametrize("chunk", mostly([3, 12, 1024], [12]))
def test_few_tokens_that_are_gathered_have_the_losses_and_gradients_that_they_have(chunk):
    hidden, kernel, targets, some = summaries()
    for weights in (some, jnp.zeros_like(some)):

        @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
        def gathered(hidden, kernel, weights=weights):
            losses = chunked(hidden, kernel, targets, weights, few=True, chunk=chunk, z=0.1)
            return (weights * (losses[0] + losses[1])).sum(), losses

        def expected(hidden, kernel, weights=weights):
            losses = plain(hidden, kernel, targets, weights, 0.1)
            return (weights * (losses[0] + losses[1])).sum()

        (_, losses), gradients = gathered(hidden, kernel)
        for a, b in zip(losses, plain(hidden, kernel, targets, weights, 0.1), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        for a, b in zip(gradients, jax.grad(expected, (0, 1))(hidden, kernel), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_logits_of_few_tokens_are_made_in_as_few_chunks_as_hold_them():
    """The same program: how many tokens have a loss is data."""
    hidden, kernel, targets, _ = case(batch=2, length=32)
    made = []

    def logits(x):
        jax.debug.callback(lambda: made.append(x.shape))
        return x @ kernel

    @jax.jit
    @chex.assert_max_traces(1)
    def losses(weights):
        return token_losses(hidden, logits, targets, weights, Loss(chunk=8), few=True)

    for count, chunks in ((0, 0), (1, 1), (4, 1), (5, 2), (32, 8)):
        made.clear()
        # Spread over the row, and in one of the rows alone.
        weights = jnp.zeros((2, 32)).at[1, jnp.arange(count) * 32 // max(count, 1)].set(1.0)
        jax.block_until_ready(losses(weights))
        jax.effects_barrier()
        assert made == [(2, 4, WIDTH)] * chunks


def memory(length, vocabulary=32_768, width=32, chunk=64):
    """Bytes that loss and gradient need beside their arguments and results."""
    shapes = (1, length, width), (width, vocabulary), (1, length), (1, length)
    dtypes = jnp.float32, jnp.float32, jnp.int32, jnp.float32
    arrays = [jax.ShapeDtypeStruct(*both) for both in zip(shapes, dtypes, strict=True)]

    def loss(hidden, kernel, targets, weights):
        return (weights * chunked(hidden, kernel, targets, weights, chunk=chunk)[0]).sum()

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arrays).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_is_linear_in_the_length_with_a_vocabulary_of_32k():
    lengths = np.array([2_048, 4_096, 8_192, 16_384])
    used = np.array([memory(int(length)) for length in lengths])
    logits = 4 * lengths * 32_768
    assert (used[1:] < 0.1 * logits[1:]).all(), "far below all logits at once"
    growth = np.diff(used) / np.diff(lengths)
    assert growth.max() < 1.2 * growth.min(), "each token costs the same"
    assert growth.max() < 20 * 4 * 32, "a few copies of its features, and not its 32,768 logits"
    assert memory(4_096, chunk=4_096) > logits[1], "which one chunk does make"


@pytest.mark.parametrize(("vocabulary", "chunk"), [(256, 16_384), (4_096, 1_024), (32_768, 1_024)])
def test_without_a_chunk_small_vocabularies_have_larger_ones(vocabulary, chunk):
    shapes = []

    def logits(x):
        shapes.append(x.shape)
        return jnp.zeros((*x.shape[:-1], vocabulary))

    length = 2 * chunk
    hidden, whole = jnp.zeros((1, length, 2)), jnp.zeros((1, length), jnp.int32)
    jax.eval_shape(lambda: token_losses(hidden, logits, whole, jnp.ones((1, length)), Loss()))
    assert shapes[-1] == (1, chunk, 2)
