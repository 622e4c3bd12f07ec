"""The diffs of docs/porting.md apply, and the ported models train and decode as the originals do."""

import contextlib
import functools
import io
import re

import chex
import jax
import jax.numpy as jnp
import porting_cases as cases
import pytest
from cases import collectives
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from porting_cases import BATCHES, FULL, difference, small
from slow import mostly

from dynmask_jax import Causal, SameSegment, Tokens, plan

F32 = 2e-5
"""The most that a float32 loss or gradient may differ from the original's; the document has what it does."""
BLOCKS = re.findall(r"^```python\n(.*?)^```", cases.DOCUMENT, re.DOTALL | re.MULTILINE)
ROWS = {
    cells[1].strip("`"): cells
    for line in re.findall(r"^\| (?!pattern|-).*\|$", cases.DOCUMENT, re.MULTILINE)
    if len(cells := [cell.strip() for cell in line[1:-1].split("|")]) == 7
}
"""model -> the cells of the first table: pattern, model, added, removed, float32, bfloat16, compilations."""


class Ports:
    """The models and what trains them, each made once for all tests."""

    def __init__(self, folder):
        self.modules = functools.cache(lambda model: (cases.original(model), cases.ported(model, folder)))
        self.ours = functools.cache(self._ours)

    def _ours(self, name: str, dtype: str = "float32"):
        """`(weights, run)` of the ported model, where a second compilation is an error."""
        model, options = OPTIONS[name]
        weights, run = cases.gradients(
            self.modules(model)[1], **small(model, dtype=jnp.dtype(dtype), **options)
        )
        chex.clear_trace_counter()
        return weights, jax.jit(chex.assert_max_traces(lambda *args: run(*args), n=1))


@pytest.fixture(scope="module")
def ports(tmp_path_factory):
    return Ports(tmp_path_factory.mktemp("ported"))


def test_every_model_has_a_diff_and_a_row_that_counts_its_lines():
    assert set(ROWS) == set(cases.DIFFS) == set(BATCHES)
    for model, diff in cases.DIFFS.items():
        assert tuple(map(int, ROWS[model][2:4])) == cases.changed_lines(diff), model


def test_a_diff_that_does_not_fit_is_refused():
    text = (cases.ROOT / "tests" / "porting" / "gemma.py").read_text(encoding="utf-8")
    with pytest.raises(AssertionError, match="the diff expects"):
        cases.apply_diff(text.replace("K_MASK = ", "MASKED = "), cases.DIFFS["gemma"])


OPTIONS = {
    "gemma": ("gemma", {}),
    "llama": ("llama", {"remat": True}),
    "qwen": ("qwen", {}),
    "lm1b": ("lm1b", {}),
    "plain": ("plain", {}),
    "plain_scanned_encoder": ("plain", {"scanned": True, "causal": False}),
}
TRAINED = [(name, dtype) for dtype in ("float32", "bfloat16") for name in OPTIONS]
BY_DEFAULT = {(name, "float32") for name in ("gemma", "llama", "lm1b", "plain_scanned_encoder")}


@pytest.mark.parametrize(("name", "dtype"), mostly(TRAINED, BY_DEFAULT))
def test_loss_and_gradients_at_the_full_mask_are_the_originals_in_one_compilation(name, dtype, ports):
    model, options = OPTIONS[name]
    weights, run = ports.ours(name, dtype)
    original, _ = ports.modules(model)
    same, theirs = cases.gradients(original, **small(model, dtype=jnp.dtype(dtype), **options))
    chex.assert_trees_all_equal(weights, same)
    # Flax's own attention adds bfloat16 and float32 numbers.
    with jax.numpy_dtype_promotion("standard" if model == "plain" else "strict"):
        expected = jax.jit(theirs)(weights, BATCHES[model])
    early, late, final = (run(weights, BATCHES[model], step) for step in (0, 6, FULL))
    assert int(ROWS[model][6]) == 1
    assert abs(float(early[0] - final[0])) > 0.005
    assert early[0] != late[0] != final[0]
    measured = max(difference(a, b) for a, b in zip(final, expected, strict=True))
    printed = float(ROWS[model][5 if dtype == "bfloat16" else 4])
    assert measured <= 3 * printed
    assert dtype == "bfloat16" or measured <= F32


@pytest.mark.parametrize("model", mostly(["gemma", "plain"], ["gemma"]))
def test_nnx_takes_the_gradients_and_the_step_is_data(model, ports):
    """As NNX models are trained mostly: the model goes into `nnx.jit` and `nnx.value_and_grad` as it is."""
    _, module = ports.modules(model)
    made, traces = module.make(0, **small(model)), []

    @nnx.jit
    def run(made, batch, step):
        traces.append(1)
        return nnx.value_and_grad(module.loss)(made, batch, step)

    losses = []
    for step in (0, 6, FULL):
        value, grads = run(made, BATCHES[model], step)
        losses.append(float(value))
    assert len(traces) == 1
    assert len(set(losses)) == 3
    weights, functional = ports.ours(model)
    expected = functional(weights, BATCHES[model], FULL)
    assert difference((value, nnx.to_pure_dict(grads)), expected) < F32


def whole_and_in_pieces(run, cache, tokens, prompt):
    """Logits of the tokens after a cache was filled by a prompt and then token by token."""
    pieces = [slice(0, prompt), *(slice(t, t + 1) for t in range(prompt, tokens.shape[1]))]
    logits = []
    for piece in pieces:
        out, cache = run(piece, cache)
        logits.append(out)
    return jnp.concatenate(logits, axis=1)


@pytest.mark.parametrize("model", mostly(["gemma", "llama"], ["llama"]))
def test_decoding_with_a_list_of_caches_gives_what_one_pass_does(model, ports):
    theirs, ours = (module.make(0, **small(model)) for module in ports.modules(model))
    tokens, size = jnp.asarray(cases.tokens())[:2, :14], 16
    place = jnp.broadcast_to(jnp.arange(14), tokens.shape)

    @nnx.jit
    def step(ours, tokens, place, cache):
        return ours(tokens, place, cache, plan(Causal(), Tokens(place), Tokens.sequence(size)))

    def run(piece, cache):
        return step(ours, tokens[:, piece], place[:, piece], cache)

    decoded = whole_and_in_pieces(run, ours.init_cache(2, size), tokens, 6)
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((14, 14), bool)), (2, 14, 14))
    whole = nnx.jit(lambda model, mask: model(tokens, place, None, mask)[0])
    assert difference(decoded, whole(theirs, causal)) < F32
    assert difference(decoded, whole(ours, plan(Causal(), Tokens(place)))) < F32


def test_decoding_of_rows_padded_on_the_left(ports):
    theirs, ours = (module.make(0, **small("qwen")) for module in ports.modules("qwen"))
    tokens = jnp.concatenate([BATCHES["qwen"][:3, -12:], jnp.asarray(cases.tokens())[:3, :6]], axis=1)
    tokens = tokens.at[:, :5].set(
        jnp.where(jnp.arange(3)[:, None] * 2 > jnp.arange(5)[None, :], 0, tokens[:, :5])
    )
    segments = (tokens != 0).astype(jnp.int32)
    visible = Causal() & SameSegment()
    step = nnx.jit(lambda model, *args: (model(*args, visible), args[2]))

    def run(piece, cache):
        return step(ours, tokens[:, piece], segments[:, piece], cache)[0], cache

    shown = (tokens != 0)[:, :, None]
    decoded = whole_and_in_pieces(run, ours.init_cache(3, 20), tokens, 12)
    whole = nnx.jit(lambda model, *args: model(*args))
    for each, more in ((theirs, ()), (ours, (visible,))):
        at_once = whole(each, tokens, segments, each.init_cache(*tokens.shape), *more)
        assert difference(jnp.where(shown, decoded, 0), jnp.where(shown, at_once, 0)) < F32


def test_decoding_with_linens_cache(ports):
    theirs, ours = ports.modules("lm1b")
    model, weights = theirs.make(0, **small("lm1b"))
    tokens = jnp.asarray(cases.tokens())[:2, :12]
    decoder, _ = ours.make(0, **small("lm1b", decode=True))
    cache = jax.jit(decoder.init)(jax.random.key(0), tokens)["cache"]
    before = ours.shift_inputs(tokens)

    @jax.jit
    def step(cache, token):
        logits, new = decoder.apply({"params": weights, "cache": cache}, token, mutable=["cache"])
        return logits, new["cache"]

    decoded = whole_and_in_pieces(lambda piece, cache: step(cache, before[:, piece]), cache, tokens, 1)
    for each in (model, ours.make(0, **small("lm1b"))[0]):
        assert difference(decoded, jax.jit(each.apply)({"params": weights}, tokens)) < F32


SHARDED = {
    "gemma_fsdp_tp": ("gemma", (4, 2), ("fsdp", "tp"), AxisType.Explicit),
    "gemma_data": ("gemma", (8,), ("data",), AxisType.Explicit),
    "gemma_auto": ("gemma", (4, 2), ("data", "tensor"), AxisType.Auto),
    "llama": ("llama", (8,), ("data",), AxisType.Auto),
    "qwen": ("qwen", (8,), ("data",), AxisType.Auto),
    "lm1b": ("lm1b", (8,), ("data",), AxisType.Auto),
    "plain": ("plain", (8,), ("data",), AxisType.Auto),
}
"""name -> the model, and the mesh, whose first axis partitions rows and whose second, if any, heads."""


@pytest.mark.parametrize("name", mostly(SHARDED, ["gemma_fsdp_tp"]))
def test_a_sharded_batch_gives_what_one_device_does_and_gathers_nothing(name, ports):
    model, shape, axes, kind = SHARDED[name]
    _, module = ports.modules(model)
    weights, run = ports.ours(model)
    expected = run(weights, BATCHES[model], 6)
    with jax.set_mesh(jax.make_mesh(shape, axes, axis_types=(kind,) * len(axes))):
        heads = {"tensor_axis": axes[1]} if len(axes) == 2 else {}
        weights, run = cases.gradients(module, **small(model, **heads))
        partitioned = [not x.is_fully_replicated for x in jax.tree.leaves(weights)]
        assert any(partitioned) == bool(heads)
        weights = jax.tree.map(
            lambda x: x if len(x.sharding.device_set) == 8 else jax.device_put(x, P()), weights
        )
        args = weights, jax.device_put(BATCHES[model], P(axes[0])), jax.device_put(jnp.int32(6), P())
        program = jax.jit(run).lower(*args).compile()
        assert difference(program(*args), expected) < F32
        assert collectives(program) == set()


def test_the_blocks_run_as_printed():
    """A `print(...)  # words` prints these words."""
    printed, names = io.StringIO(), {}
    with contextlib.redirect_stdout(printed):
        for block in BLOCKS:
            exec(block, names)
    expected = [
        found for block in BLOCKS for found in re.findall(r"^ *print\(.*\)  # (.*)$", block, re.MULTILINE)
    ]
    assert printed.getvalue().splitlines() == expected
