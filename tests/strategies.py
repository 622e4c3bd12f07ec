"""Random masks and blocks of tokens for hypothesis."""

import jax.numpy as jnp
from hypothesis import strategies as st

from dynmask_jax import (
    Causal,
    Chunks,
    Everything,
    Predicate,
    Prefix,
    RandomChunks,
    SameSegment,
    Select,
    Sinks,
    Span,
    Strided,
    Tokens,
    Window,
    maximum,
    minimum,
)

small, positive = st.integers(0, 12), st.integers(1, 12)

# One predicate for each operator that spans follow, with a parameter that varies.
PREDICATES = {
    "+": lambda q, k, n: q.position + k.position < 3 * n,
    "-": lambda q, k, n: n - q.position <= k.position - 20,
    "*": lambda q, k, n: q.position * k.position < n * n,
    "*float": lambda q, k, n: q.position * 0.3 + 0.1 * n >= k.position,
    "//": lambda q, k, n: q.position // (n + 1) == k.position // (n + 1),
    "//span": lambda q, k, n: (q.position * 7) // (k.position + 1) > n,
    "r//": lambda q, k, n: 60 // (1 + q.position + k.position) != n,
    "%": lambda q, k, n: (q.position - k.position) % (n + 1) < 3,
    "%negative": lambda q, k, n: (q.position - k.position) % -(n + 1) < -2,
    "r%": lambda q, k, n: (10 * n) % (k.position - 50) > -30,
    "negative": lambda q, k, n: -q.position > -n,
    "abs": lambda q, k, n: abs(q.position - k.position) >= n,
    ">": lambda q, k, n: q.position > k.position + n,
    "!=": lambda q, k, n: q.segment != k.segment,
    "maximum": lambda q, k, n: maximum(q.position, k.position) < 3 * n,
    "minimum": lambda q, k, n: minimum(q.position, n) == minimum(k.position, n),
    "~": lambda q, k, n: ~(q.position < n),
    "^": lambda q, k, n: (q.position < n) ^ (k.position < n),
    "==bool": lambda q, k, n: (q.position < n) == (k.segment == 1),
    "!=bool": lambda q, k, n: (q.position < n) != (k.segment == 1),
    "constant": lambda q, k, n: n > 4,
}


def leaves():
    """One shipped mask, or a predicate."""
    return st.one_of(
        st.just(Everything()),
        st.just(Causal()),
        st.just(SameSegment()),
        st.builds(Window, small, st.none() | small),
        st.builds(Chunks, positive),
        st.builds(Prefix, small),
        st.builds(Sinks, small),
        st.builds(Strided, positive),
        st.builds(RandomChunks, positive, st.floats(0, 1, width=32), small),
        st.builds(Predicate, st.sampled_from(list(PREDICATES.values())), small),
    )


def masks():
    """Masks and their compositions."""
    return st.recursive(
        leaves(),
        lambda inner: st.one_of(
            st.builds(lambda a, b: a & b, inner, inner),
            st.builds(lambda a, b: a | b, inner, inner),
            st.builds(lambda a: ~a, inner),
            st.builds(Select, st.booleans(), inner, inner),
        ),
        max_leaves=4,
    )


# One size, so that JAX compiles each operation once.
BLOCK = 6


@st.composite
def blocks(draw):
    """A block of `BLOCK` tokens: in order, or anywhere."""
    anywhere = st.lists(st.integers(0, 45), min_size=BLOCK, max_size=BLOCK)
    in_order = st.integers(0, 40).map(lambda first: list(range(first, first + BLOCK)))
    position = jnp.asarray(draw(in_order | anywhere), jnp.int32)
    first = draw(st.integers(0, 2))
    return Tokens(position, jnp.minimum(first + position % draw(st.sampled_from([1, 2])), 2))


def spans_of(tokens: Tokens) -> Tokens:
    """The range of each field over the block."""
    return Tokens(*(Span(field.min(), field.max()) for field in (tokens.position, tokens.segment)))
