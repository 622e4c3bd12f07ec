"""Validation: at the full mask whatever the curriculum, weighted by tokens, by how much context there is."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow import mostly
from train_cases import small_run

from train.config.operation import Evaluation
from train.config.sections import Curriculum
from train.data.corpus import read_corpus
from train.evaluate.totals import total
from train.evaluate.validation import Validator
from train.step.program import begin
from train.step.state import Evaluated


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = small_run(tmp_path_factory.mktemp("validated"), evaluation=Evaluation(rows=3, every=2), steps=100)
    return replace(run, data=replace(run.data, length=128, rows="packed"), block=32)


def random_weights(state):
    """The state with predictions that differ from token to token."""
    leaves, tree = jax.tree.flatten(state.params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [0.3 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return replace(state, params=jax.tree.unflatten(tree, noise))


def validated(run):
    text = read_corpus(run)
    program, state = begin(run, text.tokenizer.vocabulary)
    return program, random_weights(state), text


def test_the_loss_is_the_mean_of_all_held_out_tokens_and_of_its_buckets(run):
    program, state, text = validated(run)
    validation = Validator(program, text)(state)
    evaluate = jax.jit(program.evaluate)
    parts = [evaluate(state.params, batch, program.masks.full) for batch in text.held_out]
    losses, weights = (np.sum([getattr(p, name) for p in parts], axis=0) for name in ("loss_sum", "weight"))
    assert validation.loss == pytest.approx(losses.sum() / weights.sum(), rel=1e-6)
    assert list(validation.positions) == ["0", "64"]
    assert list(validation.positions.values()) == pytest.approx(losses / weights, rel=1e-6)
    assert validation.positions["0"] != pytest.approx(validation.positions["64"], rel=1e-3)
    assert (validation.pace_loss, validation.evaluators) == (None, {})


@pytest.mark.parametrize("kind", mostly(["full", "static", "window", "reveal"], ["static", "window"]))
def test_the_mask_is_the_full_one_whatever_the_curriculum(run, kind):
    other = replace(run, curriculum=Curriculum(kind=kind, start=4, chunk=8))
    of_run, of_other = (Validator(p, t)(s) for r in (run, other) for p, s, t in [validated(r)])
    assert of_other.loss == of_run.loss


def test_a_pace_by_loss_is_told_the_loss_under_its_own_mask(run):
    paced = replace(run, curriculum=replace(run.curriculum, pace="loss", stages=4, patience=2))
    program, state, text = validated(paced)
    validate = Validator(program, text)
    now = replace(state, pace=replace(state.pace, stage=jnp.int32(2)))
    assert validate(now).pace_loss != pytest.approx(validate(state).pace_loss, rel=1e-4)
    last = replace(state, pace=replace(state.pace, stage=jnp.int32(4)))
    assert validate(last).pace_loss == pytest.approx(validate(state).loss, rel=1e-6)


def test_the_running_mean_is_validated_where_there_is_one(run):
    averaged = replace(run, optimizer=replace(run.optimizer, ema=0.9))
    program, state, text = validated(averaged)
    validate = Validator(program, text)
    assert validate(state).loss == pytest.approx(np.log(256), rel=1e-5), "it is still the first, uniform one"
    plain, state, text = validated(run)
    averages = replace(state, params=jax.tree.map(jnp.zeros_like, state.params), ema=state.params)
    assert validate(averages).loss == pytest.approx(Validator(plain, text)(state).loss, rel=1e-6)


def test_nothing_is_dropped_in_validation_and_the_needle_probe(run):
    probed = replace(run, evaluation=replace(run.evaluation, needles=1))
    dropping = replace(probed, model=replace(run.model, attention_dropout=0.5))
    expected, actual = (Validator(p, t)(s) for r in (probed, dropping) for p, s, t in [validated(r)])
    assert actual == expected
    assert "needle" in actual.evaluators


def test_buckets_without_a_token_are_left_out_and_do_not_spoil_the_mean():
    sums = total(
        lambda batch: Evaluated(jnp.asarray([6.0, 0.0]), jnp.asarray([2.0, 0.0]), jnp.asarray([3, 0])), [0, 1]
    )
    assert sums.loss_sum.tolist() == [12.0, 0.0]
    assert sums.loss_sum.dtype == np.float64
