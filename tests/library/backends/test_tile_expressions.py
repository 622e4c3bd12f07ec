"""Masks, biases and draws on a tile, computed where they are smallest: as `visible` on the whole tile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MASKS

from dynmask_jax import ALiBi, Causal, Predicate, Tokens, Window
from dynmask_jax.backends.tile_expressions import elementwise, not_elementwise, strongly_typed
from dynmask_jax.bias_algebra import scored
from dynmask_jax.dropout import draw
from dynmask_jax.fields_read import operations
from dynmask_jax.mask_algebra import by_head, evaluate

LINE = Tokens(jnp.arange(5, 21), jnp.arange(16) // 5)
COLUMN = Tokens(jnp.arange(24), jnp.arange(24) // 7)
SHAPE = 16, 24


def on_tile(function, scalars):
    return elementwise(function, scalars, LINE, COLUMN, SHAPE)


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    def shown(mask):
        def pairs(mask, line, column):
            return jnp.broadcast_to(evaluate(mask, line, column), SHAPE)

        return on_tile(pairs, jax.tree.map(jnp.asarray, mask))

    assert not not_elementwise(operations(MASKS[name]))
    expected = by_head(lambda mask: evaluate(mask, LINE[:, None], COLUMN[None, :]), MASKS[name])
    found = by_head(shown, MASKS[name])
    np.testing.assert_array_equal(found, jnp.broadcast_to(expected, (*expected.shape[:-2], *SHAPE)))


def test_biases_and_draws():
    bias = ALiBi(jnp.float32(0.3))
    found = on_tile(lambda bias, line, column: scored(bias, line, column), bias)
    np.testing.assert_array_equal(found, scored(bias, LINE[:, None], COLUMN[None, :]))

    words = jnp.arange(16) * 77, jnp.arange(16) * 31, jnp.arange(24) * 5
    found = elementwise(
        lambda least, line, column: draw(*line, column) >= least, jnp.int32(9), words[:2], words[2], SHAPE
    )
    expected = draw(words[0][:, None], words[1][:, None], words[2][None, :]) >= 9
    assert 0.3 < expected.mean() < 0.7
    np.testing.assert_array_equal(found, expected)


def test_what_depends_on_one_side_alone_is_computed_once_a_token():
    def pairs(divisor, line, column):
        return (line.position // divisor == column.position // divisor) & (line.position < 17)

    trace = jax.make_jaxpr(lambda divisor: on_tile(pairs, divisor))(jnp.int32(3))
    shapes = {eqn.outvars[0].aval.shape for eqn in trace.eqns if eqn.primitive.name in ("div", "rem", "lt")}
    assert shapes == {(16,), (24,)}
    assert [eqn.outvars[0].aval.shape for eqn in trace.eqns if eqn.primitive.name == "eq"] == [SHAPE]


def test_literals_get_a_dtype_of_their_own():
    found = strongly_typed(lambda q: jnp.where(q > 8, 0.5, -0.25), LINE.position)
    np.testing.assert_array_equal(found, np.where(np.arange(5, 21) > 8, 0.5, -0.25))
    trace = jax.make_jaxpr(lambda q: strongly_typed(lambda q: jnp.where(q > 8, 0.5, 1), q))(LINE.position)
    selected = [eqn for eqn in trace.eqns if eqn.primitive.name == "select_n"]
    assert selected
    assert not any(atom.aval.weak_type for eqn in selected for atom in eqn.invars)


def test_a_number_as_a_condition():
    def odd(_, line, column):
        return (line.position & 1).astype(bool) & (column.position % 3).astype(bool)

    found = on_tile(odd, None)
    expected = odd(None, LINE[:, None], COLUMN[None, :])
    np.testing.assert_array_equal(found, expected)
    assert 0 < expected.sum() < expected.size


@pytest.mark.parametrize(
    ("mask", "which"),
    [
        (Predicate(lambda q, k: jnp.sqrt(k.position.astype(float)) < 3), "sqrt of float32"),
        (Causal() & Predicate(lambda q, k: jnp.exp(k.position.astype(float)) > 2), "exp of float32"),
        (Predicate(lambda q, k: (q.position - k.position) / 7 < 2), "div of float32"),
        (Predicate(lambda q, k: q.position.astype(jnp.int8) > 2), "gt of int8"),
    ],
)
def test_what_a_card_does_not_compute_exactly_is_not_among_the_operations(mask, which):
    assert which in not_elementwise(operations(mask))
    assert not not_elementwise(operations(Causal() & Window(3)))
