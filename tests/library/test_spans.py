"""Interval arithmetic: a span holds every result, and a verdict is never wrong."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import BLOCK, PREDICATES, blocks, spans_of

from dynmask_jax import Span, Verdict, maximum, minimum
from dynmask_jax.hashes import radical_inverse, random_draw
from dynmask_jax.spans import lift

INT_MIN, INT_MAX = -(2**31), 2**31 - 1
OPERATORS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
    "maximum": maximum,
    "minimum": minimum,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "abs": lambda a, b: abs(a - b),
    "draw": lambda a, b: random_draw(3, a, b),
    "float": lambda a, b: a * 0.37 + b * 1.7 - 0.1,
}
# A user's predicate may well multiply positions by a float, which strict promotion refuses.
PROMOTION = jax.numpy_dtype_promotion("standard")
near = st.integers(-12, 12)
edge = st.sampled_from(
    [INT_MIN, INT_MIN + 1, INT_MIN + 9, -70_000, 70_000, INT_MAX - 9, INT_MAX - 1, INT_MAX]
)
# One size, so that JAX compiles each operation once.
values = st.lists(near, min_size=4, max_size=4) | st.lists(near | edge, min_size=4, max_size=4)


def whole(numbers):
    return jnp.asarray(numbers, jnp.int32)


def span(numbers):
    return Span(whole(min(numbers)), whole(max(numbers)))


def assert_holds(answer, exact):
    """A span or verdict over a block, against the exact results for its pairs."""
    if isinstance(answer, Verdict):
        assert not answer.every or exact.all()
        assert answer.some or not exact.any()
    else:
        assert (answer.lo <= exact).all()
        assert (answer.hi >= exact).all()


@pytest.mark.parametrize("name", OPERATORS)
@settings(max_examples=100)
@given(a=values, b=values)
def test_every_operator_is_sound_between_spans(name, a, b):
    if name in ("//", "%") and 0 in b:
        b = [x or 5 for x in b]
    with PROMOTION:
        exact = np.asarray(OPERATORS[name](whole(a)[:, None], whole(b)[None, :]))
        assert_holds(OPERATORS[name](span(a), span(b)), exact)


@pytest.mark.parametrize("name", OPERATORS)
@settings(max_examples=40)
@given(a=values, b=near, left=st.booleans())
def test_every_operator_is_sound_beside_a_number(name, a, b, left):
    b = b or 5
    if left and name in ("//", "%"):
        a = [x or 5 for x in a]
    arguments = (lambda x: (whole(b), x)) if left else (lambda x: (x, whole(b)))
    with PROMOTION:
        exact = np.asarray(OPERATORS[name](*arguments(whole(a))))
        assert_holds(OPERATORS[name](*arguments(span(a))), exact)


starts = st.integers(0, 2_000) | st.sampled_from([2**24 - 9, 2**24, 3 * 2**24 - 5, INT_MAX - 40, -5])


@given(first=starts, more=st.integers(0, 40))
def test_the_radical_inverse_is_sound(first, more):
    """Over every number of a span, beyond the digits that count and at the end of int32 too."""
    # One size here too: the last number stands for those beyond it.
    a = np.minimum(first + np.arange(41), min(first + more, INT_MAX))
    assert_holds(radical_inverse(span(a)), np.asarray(radical_inverse(whole(a))))


@pytest.mark.parametrize(
    ("first", "last", "least", "greatest"),
    [
        (1, 3, 1 / 4, 7 / 8),
        (5, 7, 1 / 4, 15 / 16),
        (9, 11, 1 / 4, 7 / 8),
        (0, 3, 0, 7 / 8),
        (3, 5, 1 / 8, 7 / 8),
    ],
)
def test_the_radical_inverse_over_a_span(first, last, least, greatest):
    found = radical_inverse(Span(whole(first), whole(last)))
    assert (float(found.lo), float(found.hi)) == (least, greatest)


def test_the_radical_inverse_is_van_der_corputs():
    assert radical_inverse(jnp.arange(8)).tolist() == [0, 0.5, 0.25, 0.75, 0.125, 0.625, 0.375, 0.875]


def test_a_division_that_may_be_by_zero_says_nothing():
    quotient = span([1, 9]) // span([-1, 1])
    assert (quotient.lo, quotient.hi) == (INT_MIN, INT_MAX)
    assert (span([1, 9]) % span([0, 4])).lo == INT_MIN


def test_spans_are_tight_where_they_can_be():
    """Conservative is not enough: a rule that says "anything" would pass every test of soundness."""
    assert (span([2, 5]) - span([1, 3])).hi == 4
    assert abs(span([-3, 2])).lo == 0
    assert abs(span([-5, -3])).lo == 3
    assert ((span([65, 70]) % 64).lo, (span([65, 70]) % 64).hi) == (1, 6)
    assert (span([60, 70]) % 64).hi == 63
    assert (span([0, 7]) // 8 == span([8, 15]) // 8).some == False  # noqa: E712
    assert (span([0, 7]) // 8 == span([1, 6]) // 8).every
    assert (span([-4, 4]) * 3).hi == 12
    assert random_draw(0, span([4]), span([7])).lo == random_draw(0, whole(4), whole(7))
    assert random_draw(0, span([4, 5]), span([7])).hi < 1.0
    assert random_draw(0, span([4, 6]), span([7])).hi == 1.0


@given(
    a=st.tuples(st.booleans(), st.booleans()),
    b=st.tuples(st.booleans(), st.booleans()),
    name=st.sampled_from(["&", "|", "^", "==", "!="]),
)
def test_verdicts_combine_soundly(a, b, name):
    combine = {
        "&": operator.and_,
        "|": operator.or_,
        "^": operator.xor,
        "==": operator.eq,
        "!=": operator.ne,
    }[name]
    (a_some, a_every), (b_some, b_every) = (sorted(x, reverse=True) for x in (a, b))
    verdict = combine(
        Verdict(jnp.array(a_some), jnp.array(a_every)), Verdict(jnp.array(b_some), jnp.array(b_every))
    )

    def blocks(some, every):
        return [
            x
            for x in ([True, True], [True, False], [False, True], [False, False])
            if (any(x), all(x)) == (some, every)
        ]

    for left in blocks(a_some, a_every):
        for right in blocks(b_some, b_every):
            assert_holds(verdict, combine(np.array(left)[:, None], np.array(right)[None, :]))


@settings(max_examples=200)
@given(
    name=st.sampled_from(list(PREDICATES)),
    n=st.integers(0, 12),
    queries=blocks(),
    keys=blocks(),
)
def test_user_predicates_are_sound_for_each_operator(name, n, queries, keys):
    with PROMOTION:
        exact = lift(PREDICATES[name](queries[:, None], keys[None, :], n), queries.position)
        verdict = lift(PREDICATES[name](spans_of(queries), spans_of(keys), n), Span(0, 0))
    assert isinstance(verdict, Verdict)
    assert_holds(verdict, np.broadcast_to(exact, (BLOCK, BLOCK)))


@pytest.mark.parametrize("value", [np.int32(3), jnp.int32(3), np.array(3)])
def test_numbers_may_stand_on_either_side(value):
    assert (value + span([1, 2])).hi == 5
    assert (value - span([1, 2])).lo == 1
    assert (value > span([1, 2])).every
    assert ((value == 3) & (span([1, 2]) < 5)).every


def test_nan_says_nothing():
    unknown = Span(jnp.float32(1.0), jnp.float32(4.0)) * jnp.float32(jnp.inf)
    for verdict in (unknown < 3.0, unknown >= 3.0, ~(unknown < 3.0)):
        assert verdict.some
        assert not verdict.every


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: bool(span([1, 2])),
        lambda: bool(span([1, 2]) < 3),
        lambda: jnp.sin(span([1, 2])),
        lambda: span([1, 2]) & 3,
        lambda: Span(1.0, 2.0) // 2.0,
        lambda: span([1, 2]) + jnp.uint32(3),
        lambda: max(span([1, 2]), span([1, 3])),
        lambda: hash(span([1, 2])),
        lambda: list(span([1, 2])),
        lambda: (span([1, 2]) < 3) == 1,
        lambda: (span([1, 2]) < 3) != 0,
        lambda: operator.eq(1.0, span([1, 2]) < 3),
        lambda: (span([1, 2]) < 3) == np.int32(1),
        lambda: span([1, 2]) == (span([1, 2]) < 3),
        lambda: span([1, 2]) != "a",
    ],
)
def test_what_has_no_rule_raises(wrong):
    with pytest.raises(TypeError):
        wrong()
