"""What users of other libraries pass by habit: it is right, or refused with the remedy, or warned of."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from dynmask_jax import (
    Causal,
    Chunks,
    Everything,
    Mask,
    Predicate,
    Prefix,
    RandomChunks,
    SameSegment,
    Select,
    Sinks,
    Strided,
    Tokens,
    Window,
    attention,
    growing_window,
    linear,
    mask_tensor,
    plan,
    reveal,
)
from dynmask_jax.array_typing import pytree
from dynmask_jax.context.parallel import context_parallel
from dynmask_jax.fields_read import fields_read


def qkv(queries=8, keys=8, heads=2, dtype=jnp.float32):
    q, k, v = (
        jax.random.normal(jax.random.key(i), (1, n, heads, 8), dtype)
        for i, n in enumerate((queries, keys, keys))
    )
    return q, k, v


@pytree
class Even(Mask):
    """Every second query sees all."""

    def visible(self, q, k):
        return q.position % 2 == 0


POSITION, SEGMENT, KEYS = "q.position k.position", "q.segment k.segment", "k.position"
BOTH = f"{POSITION} {SEGMENT}"


@pytest.mark.parametrize(
    ("mask", "fields"),
    [
        (Everything(), ""),
        (~Everything() | Everything(), ""),
        (Causal(), POSITION),
        (Window(3, ahead=2), POSITION),
        (Window(np.array([3, 5])), POSITION),
        (Window(jnp.int32(3)), POSITION),
        (Chunks(4), POSITION),
        (Prefix(3), KEYS),
        (Sinks(3), KEYS),
        (Strided(3), POSITION),
        (RandomChunks(4, 0.5), POSITION),
        (SameSegment(), SEGMENT),
        (~SameSegment(), SEGMENT),
        (Causal() & SameSegment(), BOTH),
        (Select(True, SameSegment(), Everything()), SEGMENT),
        (Predicate(lambda q, k: q.segment >= k.segment), SEGMENT),
        (Predicate(lambda q, k, n: k.position < n, 3), KEYS),
        (Predicate(lambda q, k: q.position == q.position), "q.position"),
        (Even(), "q.position"),
        (reveal(4, linear(0.0, 1.0, 5))(3), POSITION),
        (growing_window(linear(1, 8, 5), base=Causal() & SameSegment())(3), BOTH),
    ],
    ids=repr,
)
def test_the_fields_that_a_mask_reads_are_found_in_its_trace(mask, fields):
    assert fields_read(mask) == set(fields.split())


def test_the_fields_of_a_mask_of_traced_numbers():
    found = []
    jax.jit(lambda n: found.append(fields_read(Window(n) & SameSegment())) or n)(3)
    assert found == [set(BOTH.split())]


@pytest.mark.parametrize(
    "mask", [Causal(), Window(3), Even(), Causal() & Window(jnp.array([2, 4]))], ids=repr
)
@pytest.mark.parametrize("backend", ["dense", "xla"])
def test_a_mask_alone_does_not_say_where_one_query_stands_among_keys(mask, backend):
    q, k, v = qkv(queries=1)
    with pytest.raises(ValueError, match=r"where 1 queries stand among 8 keys is not said") as refused:
        attention(q, k, v, mask, backend=backend)
    assert "plan(mask, Tokens.sequence(1, start=7), Tokens.sequence(8)) in place" in str(refused.value)
    assert "plan(mask, Tokens.sequence(1), Tokens.sequence(8)) if they start where" in str(refused.value)


def test_both_ways_that_the_message_shows_are_right():
    q, k, v = qkv(queries=3)
    last = plan(Causal(), Tokens.sequence(3, start=5), Tokens.sequence(8))
    first = plan(Causal(), Tokens.sequence(3), Tokens.sequence(8))
    whole = attention(jnp.concatenate([q[:, :1]] * 5 + [q], axis=1), k, v, Causal())
    np.testing.assert_allclose(attention(q, k, v, last), whole[:, 5:], rtol=1e-5, atol=1e-6)
    alone = attention(q, k[:, :3], v[:, :3], Causal())
    np.testing.assert_allclose(attention(q, k, v, first), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask", [Prefix(3), Sinks(2), Predicate(lambda q, k: k.position != 5)], ids=repr)
def test_where_queries_stand_does_not_matter_to_masks_of_keys_alone(mask):
    q, k, v = qkv(queries=3)
    expected = attention(q, k, v, plan(mask, Tokens.sequence(3, start=5), Tokens.sequence(8)))
    np.testing.assert_allclose(attention(q, k, v, mask), expected, rtol=1e-5, atol=1e-6)


def test_a_mask_that_reads_no_positions_takes_any_numbers_of_queries_and_keys():
    q, k, v = qkv(queries=3)
    expected = jax.nn.dot_product_attention(q, k, v)
    np.testing.assert_allclose(attention(q, k, v, Everything()), expected, rtol=1e-5, atol=1e-6)


PACKED = Causal() & SameSegment()


@pytest.mark.parametrize(
    "mask",
    [
        SameSegment(),
        PACKED,
        growing_window(linear(1, 8, 5), base=PACKED)(2),
        Predicate(lambda q, k: q.segment == k.segment),
    ],
    ids=repr,
)
def test_packed_documents_without_tokens_are_refused(mask):
    words = r"reads the segments of tokens, and there are none here"
    with pytest.raises(ValueError, match=words):
        attention(*qkv(), mask)
    with pytest.raises(ValueError, match=words):
        jax.jit(attention)(*qkv(), mask)
    attention(*qkv(), plan(mask, Tokens.packed([3, 5])))


def test_context_parallel_refuses_the_same():
    attend = context_parallel(attention, mesh=Mesh(np.array(jax.devices()[:2]), ("context",)))
    with pytest.raises(ValueError, match="reads the segments"):
        attend(*qkv(), PACKED)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (jnp.ones((8, 8), bool), r"got an array of bool: masks are expressions"),
        (np.zeros((8, 8), np.float32), r"got an array of float32: .* jax\.nn\.dot_product_attention"),
        ([[True]], "got an array of lists"),
        (None, r"got NoneType; that all keys are visible is Everything\(\)"),
        (Causal, r"got Causal: an instance, Causal\(…\)"),
        (Causal | Window, r"a union of types; masks are instances"),
        (growing_window(linear(1, 8, 5)), r"a curriculum is called with the step first"),
        ("causal", "got str"),
    ],
)
def test_what_is_no_mask_is_refused_with_the_remedy(value, words):
    with pytest.raises(TypeError, match=words) as refused:
        attention(*qkv(), value)
    assert str(refused.value).startswith("mask_or_plan must be a Mask or a Plan, got ")
    for combine in (lambda: Causal() & value, lambda: value & Causal(), lambda: Causal() | value):
        with pytest.raises(TypeError, match=words):
            combine()


def test_classes_are_no_masks():
    for combine in (
        lambda: Causal & Window(4),
        lambda: Window(4) & Causal,
        lambda: Causal & Window,
        lambda: ~Causal,
    ):
        with pytest.raises(TypeError, match=r"mask must be a Mask, got Causal: an instance, Causal\(…\)"):
            combine()


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("is_causal", r"Causal\(\)"),
        ("attn_bias", "it is bias here"),
        ("dropout_rate", r"dropout=Dropout\(rate, key\)"),
        ("mask", "the fourth argument"),
        ("segment_ids", r"plan\(mask & SameSegment\(\)"),
        ("softmax_scale", "it is scale here"),
        ("implementation", "it is backend here: dense"),
        ("other", "its options are scale, soft_cap, sinks, bias, dropout, backend, sharding and return_lse"),
    ],
)
def test_options_of_other_libraries_are_refused_with_ours(name, remedy):
    with pytest.raises(TypeError, match=f"attention has no option '{name}': .*{remedy}"):
        attention(*qkv(), Causal(), **{name: True})


TABLE = np.array([0, 0, 0, 1, 1, 1, 2, 2])
CONDITIONS = {
    "and": lambda q, k: q.position >= k.position and q.position < 3,
    "if": lambda q, k: k.position < 2 if q.position < 3 else k.position < 4,
    "chain": lambda q, k: 0 <= q.position - k.position < 3,
    "not": lambda q, k: not (q.position < k.position),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_python_conditions_on_tokens_are_refused(name):
    with pytest.raises(TypeError, match=r"combine conditions with & \| ~"):
        attention(*qkv(), Predicate(CONDITIONS[name]))
    with pytest.raises(TypeError, match=r"combine conditions with & \| ~"):
        mask_tensor(Predicate(CONDITIONS[name]), Tokens.sequence(4))


@pytest.mark.parametrize("table", [TABLE, TABLE.tolist()], ids=["numpy", "list"])
def test_a_table_that_is_no_jax_array_is_refused(table):
    words = r"make it jnp\.asarray\(table\)\[q\.position\]\. Document ids belong in Tokens"
    mask = Predicate(lambda q, k: table[q.position] == table[k.position])
    with pytest.raises(TypeError, match=words):
        attention(*qkv(), mask)


def test_a_jax_table_is_right_and_says_that_it_skips_nothing():
    table = jnp.asarray(TABLE)
    mask = Predicate(lambda q, k: table[q.position] == table[k.position])
    with pytest.warns(UserWarning, match=r"it indexes an array with tokens.*skips no block"):
        out = attention(*qkv(), mask, backend="xla")
    segments = plan(SameSegment(), Tokens(jnp.arange(8), jnp.asarray(TABLE) + 1))
    np.testing.assert_allclose(out, attention(*qkv(), segments), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k: jnp.where(k.position <= q.position, 1, 0),
        lambda q, k: k.position - q.position,
        lambda q, k: 1,
    ],
)
def test_whole_numbers_are_no_booleans(function):
    with pytest.raises(TypeError, match=r"a mask must give booleans, got int.*: compare"):
        attention(*qkv(), Predicate(function))
    with pytest.raises(TypeError, match=r"a mask must give booleans, got int.*: compare"):
        mask_tensor(Predicate(function), Tokens.sequence(4))


def test_options_are_named_where_the_mask_is_missing_too():
    with pytest.raises(TypeError, match=r"attention has no option 'is_causal': give the mask Causal\(\)"):
        attention(*qkv(), is_causal=True)
    with pytest.raises(TypeError, match=r"attention needs a mask or a plan after q, k and v: Everything\(\)"):
        attention(*qkv())


@pytest.mark.parametrize(
    "lengths", [jnp.array([3, 2]), np.array([3, 2]), [np.int64(3), jnp.int32(2)], (3, 2)]
)
def test_lengths_are_whole_numbers_of_any_library(lengths):
    assert Tokens.packed(lengths).segment.tolist() == [1, 1, 1, 2, 2]
    with pytest.raises(TypeError, match=r"whole numbers, got .*for a batch"):
        Tokens.packed(jnp.ones((2, 2), jnp.int32))


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (
            lambda: Tokens.packed([[3, 5], [4, 4]]),
            TypeError,
            r"whole numbers, got \[3, 5\]; for a batch .*stack",
        ),
        (lambda: Tokens.packed([2.5]), TypeError, r"lengths must be whole numbers, got 2\.5$"),
        (lambda: Tokens.packed([True, True]), TypeError, "lengths must be whole numbers, got True"),
        (
            lambda: Tokens(jnp.arange(3), jnp.array([-1, 1, 1])),
            ValueError,
            "from 1, with 0 for padding, got -1",
        ),
        (
            lambda: Tokens(jnp.arange(3), jnp.ones(3, bool)),
            TypeError,
            r"a mask of padding is \.astype\(int\)",
        ),
        (lambda: Tokens(jnp.arange(3.0)), TypeError, "position must hold integers, got float32"),
    ],
)
def test_wrong_tokens_are_refused(build, error, words):
    with pytest.raises(error, match=words):
        build()


def test_the_batch_of_packed_rows_that_the_message_shows():
    rows = jax.tree.map(lambda *rows: jnp.stack(rows), *map(Tokens.packed, [[3, 5], [4, 4]]))
    assert rows.shape == (2, 8)
    assert rows.segment.tolist() == [[1] * 3 + [2] * 5, [1] * 4 + [2] * 4]


def test_a_padding_mask_of_hugging_face_is_a_segment():
    q, k, v = qkv()
    padding = jnp.array([[1, 1, 1, 1, 1, 0, 0, 0]])
    tokens = Tokens(jnp.arange(8)[None], padding)
    out = attention(q, k, v, plan(PACKED, tokens))
    np.testing.assert_allclose(
        out[:, :5], attention(q[:, :5], k[:, :5], v[:, :5], Causal()), rtol=1e-5, atol=1e-6
    )
    assert not np.asarray(out[:, 5:]).any()


def test_arrays_laid_out_as_pytorchs_are_warned_of():
    q, k, v = (x.swapaxes(1, 2) for x in qkv(queries=200, keys=200))
    with pytest.warns(UserWarning, match=r"have more heads than tokens: .* need \.swapaxes\(1, 2\)"):
        attention(q, k, v, Causal())
    with pytest.warns(UserWarning, match="more heads than tokens"):
        jax.eval_shape(functools.partial(attention, mask_or_plan=Causal()), q, k, v)
