"""The layers under jax.pmap: a batch over devices, gradients averaged, is the batch on one device."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import TOLERANCE
from slow import mostly

from dynmask_jax import SameSegment, Tokens, growing_window, linear, plan
from dynmask_jax import linen as our_linen
from dynmask_jax import nnx as our_nnx

DEVICES, LENGTH, WIDTH = 4, 24, 16
CURRICULUM = growing_window(linear(3, LENGTH, steps=4))
OPTIONS = {"num_heads": 4, "num_kv_heads": 2, "rope_theta": 100.0}
DOCUMENTS = [[24], [10, 9], [5, 5, 14], [20]]
EXAMPLE = Path(__file__).parents[2] / "docs" / "training.md"


def of_nnx():
    graph, weights = nnx.split(our_nnx.Attention(WIDTH, rngs=nnx.Rngs(0), **OPTIONS))
    return lambda weights, x, plan: nnx.merge(graph, weights)(x, plan), nnx.to_pure_dict(weights)


def of_linen():
    weights = of_nnx()[1]
    return lambda weights, x, plan: our_linen.Attention(WIDTH, **OPTIONS).apply(
        {"params": weights}, x, plan
    ), weights


def rows():
    """Two rows for each device, `[devices, 2, T]`, their features and what is to come out."""
    packed = [Tokens.packed(DOCUMENTS[row % 4], length=LENGTH) for row in range(2 * DEVICES)]
    tokens = jax.tree.map(lambda *leaves: jnp.stack(leaves).reshape(DEVICES, 2, LENGTH), *packed)
    x, y = jax.random.normal(jax.random.key(1), (2, DEVICES, 2, LENGTH, WIDTH))
    return tokens, x, y


def train_step(layer, optimizer, mean, weights, moments, step, tokens, x, y):
    """One step, whose gradients `mean` brings together."""
    the_plan = plan(CURRICULUM(step) & SameSegment(), tokens, block_q=8, block_k=8)

    def loss_of(weights):
        return jnp.square(layer(weights, x, the_plan) - y).mean()

    loss, gradients = mean(jax.value_and_grad(loss_of)(weights))
    updates, moments = optimizer.update(gradients, moments)
    return optax.apply_updates(weights, updates), moments, loss


@pytest.mark.parametrize("kind", mostly([of_nnx, of_linen], [of_nnx]))
def test_a_train_step_on_devices_is_one_on_all_rows(kind):
    layer, weights = kind()
    optimizer = optax.sgd(0.1, momentum=0.9)
    tokens, x, y = rows()
    step_of = functools.partial(train_step, layer, optimizer)
    averaged = functools.partial(jax.lax.pmean, axis_name="data")
    spread = jax.pmap(
        functools.partial(step_of, averaged),
        axis_name="data",
        in_axes=(None, None, None, 0, 0, 0),
        out_axes=None,
        devices=jax.devices()[:DEVICES],
    )
    alone = jax.jit(functools.partial(step_of, lambda found: found))
    whole = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (tokens, x, y))
    here = there = weights, optimizer.init(weights)
    for step in (0, 2):
        *here, loss = alone(*here, jnp.int32(step), *whole)
        *there, loss_there = spread(*there, jnp.int32(step), tokens, x, y)
        np.testing.assert_allclose(loss_there, loss, **TOLERANCE[jnp.dtype("float32")])
        for a, b in zip(jax.tree.leaves(there), jax.tree.leaves(here), strict=True):
            np.testing.assert_allclose(a, b, **TOLERANCE[jnp.dtype("float32")])
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), here[0], weights)
    assert min(jax.tree.leaves(moved)) > 1e-3


def test_the_example_in_the_docs_runs_as_printed(compiles_as_here):
    """In a process of its own, as a user's would be: warnings are errors there too."""
    (example,) = re.findall(r"```python\n(.*?jax\.pmap.*?)```", EXAMPLE.read_text(), re.DOTALL)
    command, environment = [sys.executable, "-W", "error", "-c", example], os.environ | compiles_as_here
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    (before, after) = (float(loss) for loss in re.findall(r"loss (\d\.\d+)", ran.stdout))
    assert after < before / 2
