"""What trains: groups by name, none that does not exist, and the work that is left."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from train_cases import MODEL, small_run

from train.config.sections import Lora, Optimizer
from train.metrics.mfu import work
from train.model.lora import merge_lora
from train.step.program import program_of, state_like
from train.step.trainable import WeightCounts, groups_of, join_weights, split_weights

VOCABULARY = 17
SHAPE = replace(MODEL, layers=3, pattern=("local", "global"), qkv_bias=True, qk_norm=True)


def state_of(tmp_path, model=SHAPE, **options):
    """The shapes of a state."""
    run = small_run(tmp_path, model=model, **options)
    return state_like(program_of(run, VOCABULARY), VOCABULARY)


def names(tree) -> set[str]:
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths}


@pytest.mark.parametrize(
    ("options", "trained", "frozen"),
    [
        ({"train": ("embedding", "logits")}, {"embed.embedding", "logits.kernel"}, None),
        ({"train": ("norms",), "frozen": ("layers",)}, {"norm.scale"}, None),
        ({"frozen": ("layers",)}, {"embed.embedding", "logits.kernel", "norm.scale"}, None),
        ({"frozen": ("embedding", "logits")}, None, {"embed.embedding", "logits.kernel"}),
        (
            {"train": ("biases",), "frozen": ("local", "value")},
            {f"groups.layers.1.attention.{name}.bias" for name in ("query", "key")},
            None,
        ),
        (
            {"frozen": ("global", "norms", "attention"), "train": ("layers",)},
            {
                f"{place}.feed_forward.{name}.kernel"
                for name in ("gate", "up", "down")
                for place in ("groups.layers.0", "rest.layers.0")
            },
            None,
        ),
    ],
)
def test_groups_train_or_not_by_their_names(tmp_path, options, trained, frozen):
    state, every = state_of(tmp_path, optimizer=Optimizer(**options)), names(state_of(tmp_path).params)
    trained = every - frozen if trained is None else trained
    assert names(state.params) == trained
    assert names(state.frozen) == every - trained
    assert {leaf.shape for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim} == {
        leaf.shape for leaf in jax.tree.leaves(state.params)
    }


def test_every_weight_is_in_a_group_and_lora_in_none(tmp_path):
    state = state_of(tmp_path, lora=Lora(rank=2))
    assert all(groups_of(name, SHAPE.pattern) for name in names(state.frozen))
    assert not any(groups_of(name, SHAPE.pattern) for name in names(state.params))
    state = state_of(tmp_path, lora=Lora(rank=2), optimizer=Optimizer(train=("norms", "embedding")))
    others = {name for name in names(state.params) if "lora" not in name}
    assert {name.rpartition(".")[2] for name in others} == {"scale", "embedding"}
    targets = state_of(tmp_path, lora=Lora(rank=2, targets=("query", "up"))).params
    assert {name.split(".")[-2] for name in names(targets)} == {"query", "up"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"train": ("logits", "norms")},
            r"optimizer\.train: the model has no weights of logits; it has attention, down, .*, value",
        ),
        ({"frozen": ("local",)}, r"optimizer\.frozen: the model has no weights of local; it has"),
        ({"train": ("query",), "frozen": ("attention",)}, r"no weights train: optimizer\.train names none"),
        ({"train": ()}, r"no weights train"),
    ],
)
def test_weights_that_a_model_has_not_are_refused(tmp_path, options, words):
    tied = replace(MODEL, tied_embeddings=True)
    with pytest.raises(ValueError, match=words):
        state_of(tmp_path, tied, optimizer=Optimizer(**options))


def test_what_is_split_is_joined_again(tmp_path):
    run = small_run(tmp_path, model=SHAPE, optimizer=Optimizer(train=("feed_forward",)))
    state = state_of(tmp_path)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape), state.params)
    trained, frozen = split_weights(run, params)
    joined = join_weights(trained, frozen)
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(joined), jax.tree.leaves(params), strict=True))
    assert join_weights(trained, {}) is trained


def test_a_merged_matrix_has_the_scaled_product_in_it():
    random = np.random.default_rng(0)
    kernel, a, b = (
        random.normal(size=size).astype("float32") for size in ((2, 4, 3, 5), (2, 4, 6), (2, 6, 15))
    )
    layer = {"query": {"kernel": kernel}, "lora": {"factors": {"query": {"lora_a": a, "lora_b": b}}}}
    norm = np.ones(3)
    merged = merge_lora({"groups": {0: {"attention": layer}}, "norm": norm}, Lora(rank=6, alpha=3.0))
    expected = kernel + 0.5 * np.einsum("gir,gro->gio", a, b).reshape(kernel.shape)
    assert names(merged) == {"groups.0.attention.query.kernel", "norm"}
    np.testing.assert_allclose(
        merged["groups"][0]["attention"]["query"]["kernel"], expected, rtol=1e-5, atol=1e-5
    )
    assert merged["norm"] is norm


def test_a_frozen_matrix_costs_four_operations_a_token_and_one_of_lora_six(tmp_path):
    shape = replace(MODEL, layers=2)
    state = state_of(tmp_path, shape, lora=Lora(rank=2), optimizer=Optimizer(train=("logits", "out")))
    kernels = {name for name in names(state.frozen) if name.endswith("kernel")}
    leaves = jax.tree_util.tree_leaves_with_path((state.params, state.frozen))
    sizes = {jax.tree_util.keystr(path, simple=True, separator=".")[2:]: leaf.size for path, leaf in leaves}
    assert kernels
    trained = [size for name, size in sizes.items() if "lora" in name or name.endswith("kernel")]
    expected = 6 * sum(trained) - 2 * sum(sizes[name] for name in kernels)
    assert work(shape, VOCABULARY, state).per_token == expected
    tied = replace(shape, tied_embeddings=True)
    every = work(tied, VOCABULARY).per_token
    frozen = state_of(tmp_path, tied, optimizer=Optimizer(frozen=("embedding",)))
    assert work(tied, VOCABULARY, frozen).per_token == every - 2 * VOCABULARY * shape.width
    assert work(tied, VOCABULARY, state_of(tmp_path, tied)).per_token == every


def test_counts_are_said(tmp_path):
    state = state_of(tmp_path, MODEL)
    counts = WeightCounts.of(state)
    every = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert (counts.weights, counts.trained) == (every, every)
    assert (
        str(counts) == f"All {every:,} weights train; the optimizer's state takes {8 * every / 1e3:.1f} kB."
    )
    assert str(WeightCounts(1_000, 25, 900)) == (
        "25 of 1,000 weights (2.50%) train; the optimizer's state takes 900.0 B."
    )
