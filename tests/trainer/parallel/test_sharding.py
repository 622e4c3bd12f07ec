"""A run on a mesh: the loss, gradient and update of one device, from arrays that are really sharded."""

from dataclasses import dataclass, field, replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import TOLERANCE
from flax.traverse_util import flatten_dict, unflatten_dict
from slow import mostly
from train_cases import small_run, write_text

from dynmask_jax import attention
from dynmask_jax.context.layouts import layout_order
from train.config.operation import Evaluation, Mesh
from train.config.run import Run
from train.config.sections import Curriculum, Data, Lora, Loss, Model, Optimizer
from train.data.batch import Batch
from train.data.corpus import read_corpus
from train.evaluate.needle import by_depth
from train.evaluate.validation import Validator
from train.parallel.feed import place_batch
from train.parallel.mesh import to_one_device
from train.parallel.sharding import Placement
from train.parallel.weights import shardings_of
from train.step.layouts import Layouts
from train.step.program import begin, program_of, state_like

LENGTH, VOCABULARY = 64, 32
GROUPED = Model(
    layers=2, width=32, heads=4, kv_heads=2, hidden=32, pattern=("local", "global"), local_window=9
)
FLOAT32 = TOLERANCE[jnp.dtype("float32")]


def run_of(
    mesh=Mesh(), *, model=GROUPED, rows="packed", batch=4, accumulate=1, length=LENGTH, **options
) -> Run:
    """A run in blocks of 8, with chunks of the loss that cut each device's part of a row."""
    defaults = {
        "steps": 12,
        "block": 8,
        "loss": Loss(chunk=8, z=1e-3),
        "curriculum": Curriculum(kind="window", start=8),
        "optimizer": Optimizer(accumulate=accumulate, ema=0.9, warmup=0.0, clip=1e9),
    }
    data = Data(length=length, batch=batch, rows=rows)
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
    return Batch(
        *words, (segments > 0).astype(np.float32), positions, segments, positions, np.ones_like(positions)
    )


def first_state(run: Run, vocabulary: int = VOCABULARY):
    """The program and state of one device, with a last projection that is not zero."""
    program, state = begin(replace(run, mesh=Mesh()), vocabulary)
    if run.lora.rank:  # else the first matrices have no gradient
        params, key = flatten_dict(state.params), jax.random.key(6)
        random = {
            path: 0.1 * jax.random.normal(key, leaf.shape)
            for path, leaf in params.items()
            if path[-1] == "lora_b"
        }
        state = replace(state, params=unflatten_dict(params | random))
    if not run.model.tied_embeddings:
        kernel = state.params["logits"]["kernel"]
        state.params["logits"]["kernel"] = 0.1 * jax.random.normal(jax.random.key(5), kernel.shape)
    return program, state


@dataclass(frozen=True)
class Case:
    """A mesh, and what goes over it."""

    mesh: Mesh
    order: str = "contiguous"
    options: dict = field(default_factory=dict)


ONE_LAYER = replace(GROUPED, layers=1, pattern=("global",), backend="dense")
ALIKE = replace(ONE_LAYER, kv_heads=4)
TIED = replace(
    GROUPED,
    layers=3,
    head_dim=6,
    tied_embeddings=True,
    embedding_scale=32**0.5,
    qkv_bias=True,
    out_bias=True,
    qk_norm=True,
    post_norms=True,
    norm_unit_offset=True,
    attention_soft_cap=2.0,
    logits_soft_cap=3.0,
    rope_local_theta=100.0,
)
DROPPING = replace(ONE_LAYER, attention_dropout=0.3, bias="alibi")
CASES = {
    "data 8": Case(Mesh(data=8), options={"batch": 8, "model": ONE_LAYER}),
    "data 4, context 2": Case(Mesh(data=4, context=2), "striped", {"rows": "chunked", "model": ALIKE}),
    "fsdp 2, context 4, in parts, all_gather": Case(
        Mesh(fsdp=2, context=4, strategy="all_gather"), "striped", {"accumulate": 2}
    ),
    "fsdp 2, context 2, tensor 2": Case(Mesh(fsdp=2, context=2, tensor=2), "zigzag", {"model": ONE_LAYER}),
    "data 2, context 2, tensor 2, in parts, dropout": Case(
        Mesh(data=2, context=2, tensor=2), "striped", {"model": DROPPING, "accumulate": 2}
    ),
    "fsdp 2, context 2, tied embeddings, tensor 2": Case(
        Mesh(fsdp=2, context=2, tensor=2), "contiguous", {"model": TIED}
    ),
    "fsdp 2, context 2, tensor 2, LoRA and norms": Case(
        Mesh(fsdp=2, context=2, tensor=2),
        "zigzag",
        {"model": TIED, "lora": Lora(rank=3), "optimizer": Optimizer(ema=0.9, train=("norms",), clip=1e9)},
    ),
    "context 2, tensor 2, ulysses": Case(
        Mesh(context=2, tensor=2, strategy="ulysses"), "contiguous", {"model": ALIKE, "rows": "chunked"}
    ),
}
"""Beside the ring over eight devices, which goes through a whole curriculum below."""


@pytest.mark.parametrize(
    "name",
    mostly(CASES, [name for name in CASES if "dropout" in name or "tied" in name or "LoRA" in name]),
)
def test_a_train_step_is_that_of_one_device(name):
    case = CASES[name]
    run = run_of(case.mesh, **case.options)
    batch, (program, state) = batch_of(run), first_state(run)
    on_mesh = program_of(run, VOCABULARY, Placement.of(run.mesh))
    mesh, like = on_mesh.placement.mesh, state_like(on_mesh, VOCABULARY)
    order = layout_order(case.order, LENGTH, run.mesh.context)
    expected, single = jax.jit(program.train_step)(state, batch)
    sharded = jax.device_put(state, shardings_of(mesh, state))
    after, measured = jax.jit(on_mesh.train_step)(sharded, place_batch(mesh, batch, order))
    assert_same_step((after, measured), (expected, single))
    assert (int(measured.hops) > 0) == (float(measured.bytes_moved) > 0) == (run.mesh.context > 1)
    # So the next step is the same program, and nothing is whole that has a part to be.
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(like), strict=True):
        assert (a.sharding, a.shape, a.dtype) == (b.sharding, b.shape, b.dtype)


def assert_same_step(actual, expected):
    """One step's state and metrics, from the same weights."""
    (after, measured), (expected, single) = actual, expected
    for name in set(vars(single)) - {"hops", "bytes_moved"}:
        chex.assert_trees_all_close(getattr(measured, name), getattr(single, name), **FLOAT32)
    gradients = moments(expected, "mu")
    for moment in ("mu", "nu"):
        for a, b in zip(moments(after, moment), moments(expected, moment), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())
            assert (np.asarray(b) != 0).any()
    # Adam divides by the gradient's size: where that is near 0, rounding decides where the weight goes.
    sure = [np.abs(b) > 1e-3 * np.abs(b).max() for b in gradients]
    for which in ("params", "ema"):
        found, right = (jax.tree.leaves(getattr(state, which)) for state in (after, expected))
        for a, b, at in zip(found, right, sure, strict=True):
            np.testing.assert_allclose(np.asarray(a)[at], np.asarray(b)[at], **FLOAT32)


def moments(state, name):
    return jax.tree.leaves(optax.tree.get(state.optimizer, name))


def test_a_state_is_born_in_parts_with_the_numbers_of_one_device():
    run = run_of(Mesh(fsdp=2, context=2, tensor=2))
    _, expected = begin(replace(run, mesh=Mesh()), VOCABULARY)
    _, state = begin(run, VOCABULARY, Placement.of(run.mesh))
    chex.assert_trees_all_close(state, expected, rtol=1e-6)
    parts = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf.size / leaf.addressable_data(0).size
        for path, leaf in jax.tree.leaves_with_path(state)
    }
    whole = {name for name, count in parts.items() if count == 1}
    assert {count for name, count in parts.items() if name not in whole} == {8}
    assert {name.rpartition(".")[2] for name in whole} == {
        *("scale", "step", "key", "stage", "best", "waited", "count"),
        *("notfinite_count", "last_finite", "total_notfinite"),
    }
    assert sum(name.endswith("query.kernel") for name in parts) == 2 * 4  # layers; weight, mean, two moments
    query = state.params["groups"]["layers"][0]["attention"]["query"]["kernel"]
    assert (query.shape, query.addressable_data(0).shape) == ((1, 32, 4, 8), (1, 8, 2, 8))


def test_a_vocabulary_that_tensor_does_not_divide_is_whole():
    run = run_of(Mesh(tensor=2))
    params = state_like(program_of(run, 33, Placement.of(run.mesh)), 33).params
    parts = {name: params[name][kind].sharding.shard_shape for name, kind in TABLES.items()}
    assert parts["embed"]((33, 32)) == (33, 32)
    assert parts["logits"]((32, 33)) == (32, 33)
    assert params["groups"]["layers"][0]["feed_forward"]["up"]["kernel"].sharding.spec[2] == "tensor"


TABLES = {"embed": "embedding", "logits": "kernel"}


@pytest.fixture(scope="module")
def growing():
    """A curriculum over eight devices, whose layouts the simulator picks."""
    run = run_of(Mesh(context=8), model=replace(ONE_LAYER, backend="xla"), rows="chunked", batch=1)
    program = program_of(run, VOCABULARY, Placement.of(run.mesh))
    return program, Layouts.of(program, batch_of(run))


def test_a_curriculum_in_changing_layouts_is_one_compilation(growing):
    program, layouts = growing
    run = program.run
    single, state = first_state(run)
    sharded = jax.device_put(state, shardings_of(program.placement.mesh, state))
    chex.clear_trace_counter()
    train_step = jax.jit(chex.assert_max_traces(program.train_step, n=1), donate_argnums=0)
    reference, hops, names = jax.jit(single.train_step), [], []
    for step in range(run.steps):
        batch = batch_of(run, seed=step)
        state, expected = reference(state, batch)
        sharded, measured = train_step(
            sharded, place_batch(program.placement.mesh, batch, layouts.order(step))
        )
        if step == 0:
            assert_same_step((sharded, measured), (state, expected))
        np.testing.assert_allclose(measured.loss, expected.loss, rtol=1e-4)
        np.testing.assert_allclose(measured.pairs["global"], expected.pairs["global"])
        hops.append(int(measured.hops))
        names.append(layouts.name(step))
    assert train_step._cache_size() == 1
    assert len(set(names)) > 1
    assert hops[0] == 1, "the first window reaches the device before and no farther"
    assert hops[-1] > 1
    assert measured.bytes_moved == hops[-1] * 2 * (LENGTH // 8) * run.model.kv_heads * 8 * 4


def test_layouts_are_of_the_stages_of_the_curriculum(growing):
    _, layouts = growing
    assert layouts.starts[0] == 0
    assert layouts.starts[-1] == layouts.steps
    assert layouts.order(0) is None, "a short window lies best as it is"
    assert sorted(layouts.full) == list(range(LENGTH))
    assert (layouts.order(layouts.steps) == layouts.full).all()
    assert (layouts.order(10**6) == layouts.full).all()
    curriculum = replace(layouts.run.curriculum, pace="loss", stages=2, patience=1)
    paced = replace(layouts.run, curriculum=curriculum, evaluation=Evaluation(every=1))
    paced = replace(layouts, run=paced, starts=(0, 3, 7), names=("a", "b", "c"), orders=(None,) * 3, steps=7)
    assert [paced.name(step, stage) for step, stage in [(0, 0), (9, 0), (9, 1), (0, 2)]] == list("aabc")


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_a_layout_that_is_asked_for_is_kept_throughout(layout):
    run = run_of(Mesh(context=4, layout=layout))
    layouts = Layouts.of(program_of(run, VOCABULARY, Placement.of(run.mesh)), batch_of(run))
    expected = None if layout == "contiguous" else layout_order(layout, LENGTH, 4)
    for order in (layouts.order(0), layouts.order(run.steps), layouts.full):
        np.testing.assert_array_equal(order, expected)


def test_validation_and_needles_on_a_mesh_find_what_one_device_does(tmp_path):
    evaluation = Evaluation(rows=3, needles=1)
    data = Data(paths=(str(write_text(tmp_path)),), length=128, batch=2)
    run = small_run(tmp_path, evaluation=evaluation, data=data, model=ALIKE, block=32)
    text = read_corpus(run)
    program, state = first_state(run, text.tokenizer.vocabulary)
    single = Validator(program, text)(state)
    run = replace(run, mesh=Mesh(data=2, context=4))
    program = program_of(run, text.tokenizer.vocabulary, Placement.of(run.mesh))
    state = jax.device_put(state, shardings_of(program.placement.mesh, state))
    sharded = Validator(program, text, layout_order("zigzag", 128, 4))(state)
    assert sharded.loss == pytest.approx(single.loss, rel=1e-5)
    assert sharded.positions == pytest.approx(single.positions, rel=1e-5)
    (sharded_needle, needle) = (each.evaluators["needle"] for each in (sharded, single))
    assert by_depth(sharded_needle, "found") == by_depth(needle, "found")
    assert by_depth(sharded_needle, "gain") == pytest.approx(by_depth(needle, "gain"), abs=1e-4)


def test_weights_come_back_to_one_device():
    run = run_of(Mesh(fsdp=2, context=4))
    _, state = first_state(run)
    mesh = Placement.of(run.mesh).mesh
    sharded = jax.device_put(state.params, shardings_of(mesh, state.params))
    single = to_one_device(mesh, sharded)
    chex.assert_trees_all_equal(single, state.params)
    assert {len(leaf.devices()) for leaf in jax.tree.leaves(single)} == {1}


def test_rows_go_to_their_devices_in_the_layouts_order():
    run = run_of(Mesh(data=2, context=4))
    order, batch = layout_order("zigzag", LENGTH, 4), batch_of(run)
    placed = place_batch(Placement.of(run.mesh).mesh, batch, order)
    assert {leaf.addressable_data(0).shape for leaf in jax.tree.leaves(placed)} == {(2, LENGTH // 4)}
    chex.assert_trees_all_equal(placed, jax.tree.map(lambda leaf: leaf[:, order], batch))


def test_a_mesh_of_one_device_leaves_everything_as_it_is():
    placement, batch = Placement.of(Mesh()), batch_of(run_of())
    assert placement == Placement()
    assert place_batch(placement.mesh, batch) is batch
    assert placement.attention() is attention
    assert placement.devices == jax.devices()[:1]


def test_too_few_devices_are_refused():
    with pytest.raises(ValueError, match=r"mesh: 2 × 1 × 8 × 1 \(data × fsdp × .*\) = 16 devices .*got 8"):
        Placement.of(Mesh(data=2, context=8))


@pytest.mark.parametrize(
    ("mesh", "options", "words"),
    [
        (Mesh(data=3), {}, r"mesh\.data \* mesh\.fsdp \(3\) must divide data\.batch.*got 4"),
        (Mesh(fsdp=4), {"accumulate": 2}, r"\(4\) must divide data\.batch / optimizer\.accumulate, got 2"),
        (Mesh(context=6), {}, r"mesh\.fsdp \* mesh\.context \(6\) must divide model\.width, got 32"),
        (Mesh(context=32, layout="zigzag"), {"length": 32}, r"2 \* mesh\.context \(64\) .*length, got 32"),
        (Mesh(context=16), {"length": 40}, r"mesh\.context \(16\) must divide data\.length, got 40"),
        (Mesh(tensor=4), {}, r"mesh\.tensor \(4\) must divide model\.kv_heads, got 2"),
        (Mesh(tensor=8), {}, r"mesh\.tensor \(8\) must divide model\.heads, got 4"),
        (Mesh(context=4, strategy="ulysses"), {}, r"mesh\.strategy ulysses: .* \(4\) .*kv_heads, got 2"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(mesh, options, words):
    with pytest.raises(ValueError, match=words):
        run_of(mesh, **options)
