"""The Transformer: what one token may change, and what layers share."""

from dataclasses import replace

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_cases import MODEL

from dynmask_jax import Causal, Chunks, Tokens, plan
from train.model import Transformer

TOKENS = jax.random.randint(jax.random.key(0), (1, 16), 0, 256)


@pytest.fixture(scope="module")
def model():
    """Two layers, with a last projection that is not zero, so that logits tell tokens apart."""
    model = Transformer(replace(MODEL, layers=2), 256, rngs=nnx.Rngs(0))
    model.logits.kernel[...] = jax.random.normal(jax.random.key(1), model.logits.kernel.shape)
    return model


def changed(model, mask, at):
    """Which positions' logits change with the token at one position."""
    seen = plan(mask, Tokens.sequence(16), block_q=4, block_k=4)
    before, after = (model(tokens, seen) for tokens in (TOKENS, TOKENS.at[0, at].add(1)))
    return np.flatnonzero(jnp.abs(before - after).max(axis=(0, 2)) > 1e-6).tolist()


def test_a_token_reaches_itself_and_all_later_ones(model):
    assert changed(model, Causal(), 9) == list(range(9, 16))


def test_every_layer_follows_the_plan(model):
    assert changed(model, Causal() & Chunks(4), 9) == [9, 10, 11]


def test_shapes_and_grouped_heads(model):
    logits = model(TOKENS, plan(Causal(), Tokens.sequence(16)))
    assert logits.shape == (1, 16, 256)
    attention = model.blocks.layers[0].attention
    assert attention.query.kernel.shape == (16, 2, 8)
    assert attention.key.kernel.shape == (16, 1, 8)
