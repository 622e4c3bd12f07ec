"""The train step: pure, compiled once for a whole curriculum, exact about rows and weights; and it learns."""

from dataclasses import replace

import chex
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from slow import mostly
from train_cases import MODEL, small_run

from dynmask_jax import Tokens, Window, mask_tensor
from train.config.sections import Curriculum, Loss, Optimizer, Summarize
from train.data.batch import Batch
from train.model.loss import token_losses
from train.step.pace import advance
from train.step.program import begin

LENGTH, VOCABULARY = 32, 17
LOCAL = replace(MODEL, layers=2, pattern=("local", "global"), local_window=5)


@pytest.fixture
def run(tmp_path):
    return small_run(tmp_path)


def of(run, rows="packed", **options):
    """The run with other rows and options, and a last projection that is not zero."""
    run = replace(run, data=replace(run.data, rows=rows), **options)
    program, state = begin(run, VOCABULARY)
    kernel = state.params["logits"]["kernel"]
    state.params["logits"]["kernel"] = jax.random.normal(jax.random.key(5), kernel.shape)
    return program, state


def batch_of(*rows, length=LENGTH, boundary=None, seed=0) -> Batch:
    """Rows of documents by their sizes, from 0; or, with a boundary, by (document, summary) sizes."""
    random = np.random.default_rng(seed)
    fields = [_row(sizes, length, boundary, random) for sizes in rows]
    return Batch(*(np.stack(field) for field in zip(*fields, strict=True)))


def _row(sizes, length, boundary, random):
    def laid(values, dtype=np.int32):
        whole = np.zeros(length, dtype)
        whole[: sum(map(np.sum, sizes))] = np.concatenate([np.zeros(0), *values])
        return whole

    start = [0 if boundary is None else boundary - size[0] for size in sizes]
    counts = [int(np.sum(size)) for size in sizes]
    asked = [
        np.arange(n) >= (0 if boundary is None else size[0]) for size, n in zip(sizes, counts, strict=True)
    ]
    words = lambda: laid([random.integers(0, VOCABULARY, n) for n in counts])  # noqa: E731
    context = laid([np.arange(n) for n in counts])
    return (
        words(),
        words(),
        laid(asked, np.float32),
        laid([np.arange(n) + at for n, at in zip(counts, start, strict=True)]),
        laid([np.full(n, i + 1) for i, n in enumerate(counts)]),
        context,
        laid([np.arange(n) % 3 for n in counts]),
    )


PACKED = batch_of([9, 14, 5], [20, 12])
CHUNKED = batch_of([LENGTH], [LENGTH], seed=1)
SUMMARIES = batch_of([(9, 4), (12, 3)], [(20, 2)], boundary=LENGTH)
TASKS = {
    "packed": (PACKED, {}),
    "chunked": (CHUNKED, {"rows": "chunked"}),
    "summarize": (SUMMARIES, {"task": "summarize"}),
    "summarize_causal": (SUMMARIES, {"task": "summarize", "summarize": Summarize(prefix="causal")}),
}


def trained(program, state, batch, steps):
    """The state, and the metrics of each step; the step may be traced once, and keeps its state."""
    chex.clear_trace_counter()
    train_step, history = jax.jit(chex.assert_max_traces(program.train_step, n=1), donate_argnums=0), []
    for _ in range(steps):
        state, metrics = train_step(state, batch)
        history.append(metrics)
    return state, history


def pairs_of(mask, batch, rows, window=None):
    tokens = Tokens(batch.positions, batch.segments)
    if rows == "chunked":
        tokens = Tokens(np.broadcast_to(np.arange(LENGTH), batch.positions.shape))
    local = Window(LENGTH if window is None else window, ahead=LENGTH if window is None else window - 1)
    return float(mask_tensor(mask & local, tokens).sum())


KINDS = ("full", "window", "chunks", "reveal")


@pytest.mark.parametrize(
    ("kind", "task"),
    mostly([(kind, task) for kind in KINDS for task in TASKS], list(zip(KINDS, TASKS, strict=True))),
)
def test_a_step_leaves_a_state_like_the_one_it_was_given(run, kind, task):
    """The same shapes and types: so the next step, and a whole curriculum, needs no other program."""
    batch, options = TASKS[task]
    optimizer = Optimizer(ema=0.9, accumulate=2)
    program, state = of(
        run, **options, optimizer=optimizer, curriculum=replace(run.curriculum, kind=kind, chunk=8)
    )
    before, (after, _) = (
        jax.eval_shape(f, state, batch) for f in (lambda state, _: state, program.train_step)
    )
    assert jax.tree.structure(before) == jax.tree.structure(after)
    types = [[(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)] for tree in (before, after)]
    assert types[0] == types[1]


@pytest.mark.parametrize(
    ("task", "kind", "options"),
    [
        ("packed", "window", {}),
        pytest.param("chunked", "chunks", {"optimizer": Optimizer(accumulate=2)}, marks=pytest.mark.slow),
        ("summarize", "reveal", {"model": LOCAL, "loss": Loss(chunk=16)}),
    ],
)
def test_a_whole_curriculum_is_one_compilation_and_its_exposure_is_the_masks(run, task, kind, options):
    batch, of_task = TASKS[task]
    program, state = of(run, **of_task, **options, curriculum=replace(run.curriculum, kind=kind, chunk=8))
    first = jax.jit(program.evaluate)(state.params, batch, program.masks.at(state))
    state, history = trained(program, state, batch, run.steps)
    assert float(history[0].loss) == pytest.approx(float(first.loss_sum.sum() / first.weight.sum()), rel=1e-5)
    windows = [int(metrics.window) for metrics in history]
    assert windows == sorted(windows)
    assert (windows[0], windows[-1], len(set(windows))) == (4, 32, 6)
    pattern, rows = program.run.model.pattern, program.run.data.rows
    local = {"global": LENGTH, "local": 5}
    full = sum(pairs_of(program.masks.full, batch, rows, local[reach]) for reach in pattern)
    for step, metrics in enumerate(history):
        mask = program.masks.growth.mask(step)
        seen = {reach: pairs_of(mask, batch, rows, local[reach]) for reach in pattern}
        assert {reach: float(count) for reach, count in metrics.pairs.items()} == seen
        assert float(metrics.exposure) == pytest.approx(sum(seen.values()) / full, rel=1e-6)
    assert float(history[-1].exposure) == 1.0
    assert float(history[0].exposure) < 0.8
    last = history[-1]
    assert (float(last.weight), int(last.tokens)) == (batch.weights.sum(), (batch.segments > 0).sum())
    assert (int(last.skipped), int(last.skipped_in_a_row), int(state.step)) == (0, 0, run.steps)


def test_a_curriculum_moved_by_the_loss_is_one_compilation_and_follows_the_pace(run):
    curriculum = Curriculum(kind="window", start=4, pace="loss", stages=4, patience=1)
    program, state = of(run, curriculum=curriculum, evaluation=replace(run.evaluation, every=1))
    chex.clear_trace_counter()
    train_step = jax.jit(chex.assert_max_traces(program.train_step, n=1))
    windows, exposures = [], []
    for step in range(10):
        state, metrics = train_step(state, PACKED)
        windows.append(int(metrics.window))
        exposures.append(float(metrics.exposure))
        if step % 2:
            state = replace(state, pace=advance(state.pace, 1.0, curriculum))
    # Five steps of growth, four stages: at its steps 0, 1, 2, 3 and 5, whatever the step of training.
    at = [int(program.masks.growth.window(step)) for step in (0, 1, 2, 3, 5)]
    assert windows[::2] == windows[1::2] == at
    assert exposures == sorted(exposures)
    assert exposures[7] < exposures[8] == 1.0


def test_the_loss_falls_from_a_uniform_guess_where_there_is_something_to_learn(run):
    """In bfloat16, with the penalty, two chunks and layers computed again; weights stay float32."""
    words = np.tile(np.arange(8, dtype=np.int32), (2, 5))[:, : LENGTH + 1]
    batch = replace(CHUNKED, inputs=words[:, :-1], targets=words[:, 1:])
    model = replace(MODEL, dtype="bfloat16", remat="dots")
    run = replace(run, steps=60, model=model, loss=Loss(chunk=16, z=1e-4))
    program, state = begin(run, VOCABULARY)
    state, history = trained(program, state, batch, 60)
    assert float(history[0].loss) == pytest.approx(np.log(VOCABULARY), rel=1e-5)
    assert float(history[-1].loss) < 0.1
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


def losses_of(program, params, batch, mask):
    """The loss of each token."""
    model = nnx.merge(program.graph, params)
    plans = program.masks.plans(mask, Tokens(batch.positions, batch.segments))
    hidden = model(batch.inputs, plans)
    return token_losses(hidden, model.unembed, batch.targets, batch.weights, Loss(chunk=16)).nats


WHEN = [
    (task, when) for task in ("lm", "summarize") for when in ("full mask", "in the middle of a curriculum")
]


@pytest.mark.parametrize(("task", "when"), mostly(WHEN, [WHEN[1], WHEN[2]]))
def test_a_documents_loss_is_the_same_packed_and_alone(run, when, task):
    boundary = LENGTH if task == "summarize" else None
    sizes = [9, 14, 5] if task == "lm" else [(6, 3), (9, 5), (2, 3)]
    program, state = of(run, task=task, model=LOCAL, curriculum=replace(run.curriculum, kind="window"))
    mask = program.masks.full if when == "full mask" else program.masks.growth.mask(2)
    assert int(program.masks.growth.window(2)) == 9
    packed = batch_of(sizes, boundary=boundary)
    losses = jax.jit(lambda params, batch: losses_of(program, params, batch, mask))
    together, start = losses(state.params, packed), 0
    for size in sizes:
        end = start + int(np.sum(size))

        def laid(field, start=start, end=end):
            return np.pad(field[:, start:end], ((0, 0), (0, LENGTH - (end - start))))

        alone = jax.tree.map(laid, packed)
        alone = replace(alone, segments=np.minimum(alone.segments, 1))
        expected = losses(state.params, alone)[:, : end - start]
        np.testing.assert_allclose(together[:, start:end], expected, rtol=1e-5, atol=1e-5)
        assert (expected > 0).any()
        start = end


def moments(state):
    """What the optimizer made of the first gradient, which is linear in it."""
    return jax.tree.leaves(optax.tree.get(state.optimizer, "mu"))


def test_accumulation_gives_the_gradient_of_the_whole_batch(run):
    # Parts of very different weight; the last has none at all.
    batch = batch_of([LENGTH], [3], [9, 14, 5], [2, 2], [1], [30, 2], [5], [7], seed=2)
    batch = replace(batch, weights=np.where(np.arange(8)[:, None] < 6, batch.weights, 0))
    results = []
    for parts in (1, 4):
        options = Optimizer(accumulate=parts, weight_decay=0.0, clip=1e9)
        data = replace(run.data, batch=8)
        program, state = of(replace(run, data=data, optimizer=options), loss=Loss(z=0.01, chunk=64))
        results.append(jax.jit(program.train_step)(state, batch))
    (whole, of_whole), (apart, of_parts) = results
    chex.assert_trees_all_close(of_parts, of_whole, rtol=1e-5)
    for a, b in zip(moments(apart), moments(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)
        assert (b != 0).any()


DROPPING = replace(MODEL, attention_dropout=0.3, bias="alibi")
SEEN_IN_FULL = Curriculum(kind="full")


@pytest.fixture(scope="module")
def dropping(tmp_path_factory):
    """A program with dropout, whose mask never changes, its state, and its train step, compiled once."""
    run = small_run(tmp_path_factory.mktemp("dropping"), model=DROPPING, curriculum=SEEN_IN_FULL)
    program, state = of(run, optimizer=Optimizer(accumulate=2))
    return program, state, jax.jit(program.train_step)


def loss_of(train_step, state, batch=PACKED):
    return float(train_step(state, batch)[1].loss)


def test_a_run_with_dropout_and_alibi_is_one_compilation_and_another_run(run):
    first = []
    for options in ({}, {"attention_dropout": 0.1, "bias": "alibi"}):
        program, state = of(run, model=replace(MODEL, **options))
        _, history = trained(program, state, PACKED, run.steps)
        assert history[-1].loss < history[0].loss
        first.append(float(history[0].loss))
    assert first[0] != first[1]
    assert first[0] == pytest.approx(first[1], rel=0.1)


def test_a_step_drops_the_same_again_and_other_steps_and_keys_drop_otherwise(dropping):
    _, state, train_step = dropping
    once, again = (train_step(state, PACKED) for _ in range(2))
    chex.assert_trees_all_equal(once, again)
    later = replace(state, step=state.step + 1)
    other = replace(state, key=jax.random.key_data(jax.random.key(9)))
    losses = [loss_of(train_step, each) for each in (state, later, other)]
    assert len(set(losses)) == 3


def test_without_dropout_the_key_and_the_step_are_not_read(run):
    _, state = of(run, curriculum=SEEN_IN_FULL)
    for rate in (0.0, 0.3):
        program, _ = of(run, curriculum=SEEN_IN_FULL, model=replace(MODEL, attention_dropout=rate))
        jaxpr = str(jax.make_jaxpr(program.train_step)(state, PACKED))
        assert ("random_wrap" in jaxpr) == ("random_fold_in" in jaxpr) == (rate > 0)


def test_accumulated_parts_drop_otherwise(dropping):
    """The same row twice, of which one part each time is in the loss."""
    _, state, train_step = dropping
    row = batch_of([9, 14, 5])
    twice = jax.tree.map(lambda x: np.concatenate([x, x]), row)
    losses = [
        loss_of(train_step, state, replace(twice, weights=twice.weights * np.float32(part)))
        for part in ([[1], [0]], [[0], [1]])
    ]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.2)


def test_evaluation_with_dropout_is_the_program_without(dropping):
    program, state, _ = dropping
    without, _ = of(replace(program.run, model=replace(DROPPING, attention_dropout=0.0)))
    expected, actual = (
        str(jax.make_jaxpr(each.evaluate)(state.params, PACKED, each.masks.full))
        for each in (without, program)
    )
    assert actual == expected


@pytest.fixture(scope="module")
def settled(tmp_path_factory):
    """A program with a running mean, its first state, and its train step, compiled once."""
    optimizer = Optimizer(ema=0.75, warmup=0.25, learning_rate=1.0, clip=1e-3)
    program, state = of(small_run(tmp_path_factory.mktemp("settled")), optimizer=optimizer)
    return program, state, jax.jit(program.train_step)


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_what_is_not_finite_changes_no_weight_and_is_counted(settled, fault):
    _, state, train_step = settled
    state, _ = train_step(state, PACKED)
    broken = PACKED
    if fault == "loss":
        broken = replace(PACKED, weights=np.where(PACKED.weights > 0, np.inf, 0).astype(np.float32))
    else:
        # A loss of about 1e25, and a gradient whose norm is beyond float32.
        logits = jnp.where(jnp.arange(VOCABULARY)[None] % 2 == 0, 1e25, -1e25) * jnp.ones((16, 1))
        state = replace(state, params={**state.params, "logits": {"kernel": logits}})
    before, rates = state, []
    for skipped in (1, 2):
        state, metrics = train_step(state, broken)
        assert bool(jnp.isfinite(metrics.loss)) == (fault == "gradient")
        assert not jnp.isfinite(metrics.gradient_norm)
        assert (int(metrics.skipped), int(metrics.skipped_in_a_row)) == (skipped, skipped)
        rates.append(float(metrics.learning_rate))
        assert int(state.step) == 1 + skipped
    assert rates == [1.0, 1.0]
    chex.assert_trees_all_equal((state.params, state.ema), (before.params, before.ema))
    chex.assert_trees_all_equal(state.optimizer.inner_state, before.optimizer.inner_state)


def test_after_a_skipped_step_training_goes_on_as_if_it_had_not_been(settled):
    _, state, train_step = settled
    before, _ = train_step(state, PACKED)
    broken = replace(PACKED, weights=np.full_like(PACKED.weights, np.nan))
    skipped, _ = train_step(before, broken)
    assert int(skipped.optimizer.total_notfinite) == 1
    # At the step that was not taken, so that the mask is the same.
    counted = skipped.optimizer._replace(total_notfinite=before.optimizer.total_notfinite)
    after, metrics = train_step(replace(skipped, step=before.step, optimizer=counted), PACKED)
    expected, _ = train_step(before, PACKED)
    chex.assert_trees_all_equal((after.params, after.ema), (expected.params, expected.ema))
    assert int(metrics.skipped_in_a_row) == 0


def test_the_running_mean_of_the_weights(settled, run):
    program, state, train_step = settled
    expected = state.ema
    decays = []
    for _ in range(30):
        done = int(state.step)
        decays.append(min(0.75, (1 + done) / (10 + done)))
        state, _ = train_step(state, PACKED)
        expected = jax.tree.map(
            lambda mean, new, decay=decays[-1]: decay * mean + (1 - decay) * new, expected, state.params
        )
    assert decays[0] < 0.5
    assert decays[-1] == 0.75
    chex.assert_trees_all_close(state.ema, expected, rtol=1e-5, atol=1e-6)
    assert program.weights(state) is state.ema
    plain, state = begin(run, VOCABULARY)
    assert state.ema is None
    assert plain.weights(state) is state.params


def test_the_learning_rate_is_the_schedules_at_each_step(settled):
    _, state, train_step = settled
    rates = []
    for _ in range(8):
        state, metrics = train_step(state, PACKED)
        rates.append(float(metrics.learning_rate))
    assert rates[:2] == [0.5, 1.0]
    assert all(np.diff(rates[1:]) < 0)


def test_rows_of_padding_alone_are_no_loss(settled):
    _, state, train_step = settled
    _, metrics = train_step(state, batch_of([], []))
    assert (float(metrics.loss), float(metrics.weight), int(metrics.skipped)) == (0.0, 0.0, 0)


def test_evaluation_sees_everything_whatever_the_curriculum(run):
    totals = {}
    for kind in ("full", "static", "window"):
        program, state = of(run, "chunked", curriculum=Curriculum(kind=kind, chunk=4, start=4))
        evaluate = jax.jit(program.evaluate)
        full, now = (
            evaluate(state.params, CHUNKED, mask) for mask in (program.masks.full, program.masks.at(state))
        )
        totals[kind] = full.loss_sum.tolist()
        assert (full.loss_sum == now.loss_sum).all() == (kind == "full")
    assert totals["full"] == totals["static"] == totals["window"]


def test_evaluation_is_by_the_tokens_before_in_the_document(run):
    sizes = [(100, 260, 40), (512,)]
    batch = batch_of(*sizes, length=512, seed=3)
    program, state = of(replace(run, data=replace(run.data, length=512), block=128))
    assert program.masks.bucket_starts == (0, 64, 128, 256)
    found = jax.jit(program.evaluate)(state.params, batch, program.masks.full)
    losses = np.asarray(losses_of(program, state.params, batch, program.masks.full))
    for i, (start, end) in enumerate([(0, 64), (64, 128), (128, 256), (256, 512)]):
        inside = (batch.context >= start) & (batch.context < end) & (batch.weights > 0)
        assert float(found.weight[i]) == inside.sum() > 0
        assert float(found.loss_sum[i]) == pytest.approx(losses[inside].sum(), rel=1e-5)


@pytest.mark.parametrize(
    ("length", "starts"), [(2, (0,)), (64, (0,)), (65, (0, 64)), (512, (0, 64, 128, 256))]
)
def test_buckets_begin_below_the_length(run, length, starts):
    program, _ = begin(replace(run, data=replace(run.data, length=length), curriculum=Curriculum(start=2)), 3)
    assert program.masks.bucket_starts == starts


def test_evaluation_under_any_mask_compiles_once_for_its_structure(run):
    program, state = of(run, curriculum=replace(run.curriculum, kind="window"))
    chex.clear_trace_counter()
    evaluate = jax.jit(chex.assert_max_traces(program.evaluate, n=1))
    sums = {
        float(evaluate(state.params, PACKED, program.masks.growth.mask(n)).loss_sum.sum()) for n in (0, 2, 3)
    }
    assert len(sums) == 3


def test_the_key_is_the_seeds_own(run):
    keys = [np.asarray(begin(replace(run, seed=seed), 3)[1].key) for seed in (0, 0, 1)]
    assert (keys[0] == keys[1]).all()
    assert (keys[0] != keys[2]).any()
    assert keys[0].dtype == np.uint32
