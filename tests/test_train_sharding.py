"""A run on a mesh: the loss, gradient and update of one device, from arrays that are really spread."""

from dataclasses import dataclass, field, replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import TOLERANCE

from dynmask_jax.layouts import layout_order
from train.batch import Batch
from train.config import Run
from train.sections import Curriculum, Data, Loss, Mesh, Model, Optimizer
from train.sharding import Placement
from train.step import begin, state_like

LENGTH, VOCABULARY = 64, 32
GROUPED = Model(
    layers=2, width=32, heads=4, kv_heads=2, hidden=32, pattern=("local", "global"), local_window=9
)
ALIKE = replace(GROUPED, layers=1, kv_heads=4, pattern=("global",))
FLOAT32 = TOLERANCE[jnp.dtype("float32")]


def run_of(mesh=Mesh(), *, model=GROUPED, rows="packed", batch=4, accumulate=1, **options) -> Run:
    """A run in blocks of 8, with chunks of the loss that cut each device's part of a row."""
    defaults = {
        "steps": 12,
        "block": 8,
        "loss": Loss(chunk=8, z=1e-3),
        "curriculum": Curriculum(kind="window", start=8),
        "optimizer": Optimizer(accumulate=accumulate, ema=0.9, warmup=0.0, clip=1e9),
    }
    data = Data(length=LENGTH, batch=batch, rows=rows)
    return Run(mesh=mesh, model=model, data=data, **(defaults | options))


def batch_of(run: Run, seed=0) -> Batch:
    """Rows of one document, or of two and padding, each cut elsewhere."""
    random, shape = np.random.default_rng(seed), (run.data.batch, LENGTH)
    place = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape)
    positions, segments = place, np.ones(shape, np.int32)
    if run.data.rows == "packed":
        cut = 13 + 9 * np.arange(run.data.batch, dtype=np.int32)[:, None]
        positions = np.where(place < cut, place, place - cut)
        segments = np.where(place < cut, 1, np.where(place < LENGTH - cut // 8, 2, 0)).astype(np.int32)
    words = random.integers(0, VOCABULARY, (2, *shape), dtype=np.int32)
    return Batch(*words, (segments > 0).astype(np.float32), positions, segments, positions)


def first_state(run: Run):
    """The program and state of one device, with a last projection that is not zero."""
    program, state = begin(replace(run, mesh=Mesh()), VOCABULARY)
    kernel = state.params["logits"]["kernel"]
    state.params["logits"]["kernel"] = 0.1 * jax.random.normal(jax.random.key(5), kernel.shape)
    return program, state


@dataclass(frozen=True)
class Case:
    """A mesh, and what goes over it."""

    mesh: Mesh
    order: str = "contiguous"
    options: dict = field(default_factory=dict)


CASES = {
    "context 8": Case(Mesh(context=8), "zigzag"),
    "data 4, context 2": Case(Mesh(data=4, context=2), "striped", {"rows": "chunked", "model": ALIKE}),
    "fsdp 2, context 4, in parts": Case(
        Mesh(fsdp=2, context=4, strategy="all_gather"), "striped", {"accumulate": 2}
    ),
    "data 2, fsdp 2, context 2, in parts": Case(
        Mesh(data=2, fsdp=2, context=2), "zigzag", {"accumulate": 2, "batch": 8, "rows": "chunked"}
    ),
    "fsdp 2, context 2, tensor 2": Case(Mesh(fsdp=2, context=2, tensor=2), "zigzag"),
    "ulysses: context 2, tensor 2": Case(
        Mesh(context=2, tensor=2, strategy="ulysses"), "contiguous", {"model": ALIKE, "rows": "chunked"}
    ),
    "tpu": Case(Mesh(context=2), "zigzag", {"model": replace(ALIKE, backend="tpu"), "batch": 1, "block": 16}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_train_step_is_that_of_one_device(name):
    case = CASES[name]
    run = run_of(case.mesh, **case.options)
    batch = batch_of(run)
    program, state = first_state(run)
    placement = Placement.of(run.mesh)
    on_mesh, like = begin_shapes(run, placement)
    spread = jax.device_put(state, placement.shardings(state))
    after, measured = jax.jit(program.train_step)(state, batch)
    order = layout_order(case.order, LENGTH, run.mesh.context)
    there, found = jax.jit(on_mesh.train_step)(spread, placement.place(batch, order))
    travelled = ("hops", "bytes_moved")
    for name in set(vars(measured)) - set(travelled):
        chex.assert_trees_all_close(getattr(found, name), getattr(measured, name), **FLOAT32)
    assert int(found.hops) > 0
    assert float(found.bytes_moved) > 0
    for moment, rtol in (("mu", 1e-4), ("nu", 2e-4)):
        for a, b in zip(moments(there, moment), moments(after, moment), strict=True):
            np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-5 * np.abs(b).max())
            assert (np.asarray(b) != 0).any()
    # Adam divides by the gradient's size: of one near 0 the sign is chance.
    sure = [np.abs(b) > 1e-3 * np.abs(b).max() for b in moments(after, "mu")]
    for a, b, at in zip(*map(jax.tree.leaves, (there.params, after.params)), sure, strict=True):
        np.testing.assert_allclose(np.asarray(a)[at], np.asarray(b)[at], **FLOAT32)
    assert jax.tree.map(lambda leaf: leaf.sharding, there) == jax.tree.map(lambda leaf: leaf.sharding, like)


def begin_shapes(run, placement):
    from train.step import program_of

    program = program_of(run, VOCABULARY, placement)
    return program, state_like(program, VOCABULARY)


def moments(state, name):
    return jax.tree.leaves(optax.tree.get(state.optimizer, name))
