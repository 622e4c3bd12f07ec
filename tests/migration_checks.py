"""How a row of docs/migration.md is compared with the library that it names.

Where the cell `there` is code that runs here, it is evaluated too: by that library where it is installed, or
by its rule, pair by pair in NumPy. None of the expected values reads a mask or a bias of ours. Those of
dropout read which pairs we keep: libraries draw other numbers from a key, and compute the same with them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from dynmask_jax import Dropout, Mask, Plan, Tokens, attention, dropout_mask, mask_tensor

T, S = 24, 32
DOCUMENT = [0] * 9 + [1] * 7 + [2] * 8
STARTS = [0] * 9 + [9] * 7 + [16] * 8
STEPS = (0, 1, 7, 8, 13, 20, 39, 40, 64, 127, 128, 1_000)


@dataclass(frozen=True)
class Row:
    """One row of the document's tables, without the backticks of `there` and `here`."""

    there: str
    here: str
    note: str


Check = Callable[[Row, dict], None]
"""Evaluates a row in the document's names, and fails where it is not as expected."""


def shows(expected: np.ndarray) -> Check:
    """The cell is a mask for T tokens, or a plan, and shows just these pairs, `[..., T, S]`."""

    def check(row, names):
        seen = _visible(eval(row.here, names))
        np.testing.assert_array_equal(seen, expected, err_msg=row.here, strict=True)

    return check


def _visible(value) -> np.ndarray:
    if isinstance(value, Mask):
        return np.asarray(mask_tensor(value, Tokens.sequence(T)))
    assert isinstance(value, Plan), f"the cell must give a mask or a plan, got {value!r}"
    seen = np.asarray(mask_tensor(value.mask, value.q_tokens, value.kv_tokens))
    return seen[0] if value.rows == 1 else seen


def plans_blocks(expected: np.ndarray, block_q: int, block_k: int) -> Check:
    """The cell is a plan that shows these pairs, in blocks of these sizes: 0 none, 1 some, 2 all visible."""

    def check(row, names):
        shows(expected)(row, names)
        cut = expected.reshape(T // block_q, block_q, T // block_k, block_k)
        codes = cut.any(axis=(1, 3)).astype(int) + cut.all(axis=(1, 3))
        np.testing.assert_array_equal(eval(row.here, names).codes[0], codes)

    return check


def gives(expected: Callable) -> Check:
    """The cell gives the array, or the arrays, that `expected` makes from the document's names.

    Attention is that of the dense backend where the cell names none: it compiles in the least time.
    """

    def check(row, names):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            wanted = jax.tree.leaves(expected(names))
        got = jax.tree.leaves(eval(row.here, names | {"attention": partial(attention, backend="dense")}))
        assert [each.shape for each in got] == [each.shape for each in wanted]
        for ours, theirs in zip(got, wanted, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5, err_msg=row.here)

    return check


def counts(length: Callable[[int], int]) -> Check:
    """The cell is a schedule with these values."""

    def check(row, names):
        schedule = eval(row.here, names)
        assert [int(schedule(step)) for step in STEPS] == [length(step) for step in STEPS]

    return check


def grows(expected: Callable[[int], np.ndarray], segment=None) -> Check:
    """The cell is a curriculum that shows these pairs at each step."""

    def check(row, names):
        curriculum, tokens = eval(row.here, names), Tokens(jnp.arange(T), segment)
        for step in STEPS:
            seen = mask_tensor(curriculum(step), tokens)
            np.testing.assert_array_equal(seen, expected(step), err_msg=f"step {step}", strict=True)

    return check


def refuses(error: type[Exception], *words: str) -> Check:
    """The cell raises this error, the row's note names it, and its message says these words."""

    def check(row, names):
        assert row.note.startswith(f"`{error.__name__}`"), row.note
        with pytest.raises(error) as caught:
            eval(row.here, names)
        assert caught.type is error
        for each in words:
            assert each in str(caught.value)

    return check


def pairs(rule: Callable[[int, int], bool], queries: int = T, keys: int = T) -> np.ndarray:
    """`rule(q, k)` for every pair of indices."""
    return np.array([[bool(rule(q, k)) for k in range(keys)] for q in range(queries)])


def blocks(rule: Callable, q_lengths, k_lengths, room: int | None = None) -> np.ndarray:
    """`rule(q, k, queries, keys)` by indices within each block; nothing is seen across blocks.

    Args:
      room: keys from the start of one block to the next; their number where left out.
    """
    k_rooms = [room or length for length in k_lengths]
    seen = np.zeros((sum(q_lengths), sum(k_rooms)), bool)
    row = column = 0
    for queries, keys, width in zip(q_lengths, k_lengths, k_rooms, strict=True):
        part = pairs(lambda q, k, t=queries, s=keys: rule(q, k, t, s), queries, keys)
        seen[row : row + queries, column : column + keys] = part
        row, column = row + queries, column + width
    return seen


def fragments(lengths) -> np.ndarray:
    """Causal attention within each of these stretches of the row."""
    return blocks(lambda q, k, *_: k <= q, lengths, lengths)


def lengths_of(last) -> list[int]:
    """Stretches of a row of T, from the indices of their last tokens."""
    return np.diff([-1, *sorted(set(last) | {T - 1})]).tolist()


def every(length: int) -> list[int]:
    """Last tokens of stretches of `length`."""
    return list(range(length - 1, T, length))


def softmax(names, seen, *, scale=1 / math.sqrt(8), soft_cap=None, bias: Any = 0.0, factor: Any = 1.0):
    """`(out, lse)` of attention in float64; `factor` is what weights are multiplied by after all."""
    q, k, v = (np.asarray(names[name], np.float64) for name in "qkv")
    k, v = (each.repeat(q.shape[2] // each.shape[2], axis=2) for each in (k, v))
    logits = np.einsum("btnh,bsnh->bnts", q, k) * scale
    logits = logits if soft_cap is None else soft_cap * np.tanh(logits / soft_cap)
    weights = np.where(seen, np.exp(logits + bias), 0.0)
    total = weights.sum(axis=-1)
    out = np.einsum("bnts,bsnh->btnh", weights / total[..., None] * factor, v)
    return out, np.log(total).swapaxes(1, 2)


def softmax_of(seen, **options) -> Check:
    return gives(lambda names: softmax(names, seen, **options)[0])


def alibi_bias() -> np.ndarray:
    """As its paper, `[4, T, T]`: m · −(q − k), of slopes 2^−2, 2^−4, 2^−6 and 2^−8."""
    return np.array(
        [[[-(2.0 ** -(2 * h)) * (q - k) for k in range(T)] for q in range(T)] for h in (1, 2, 3, 4)]
    )


def t5_bias(names) -> np.ndarray:
    """As T5's code adds it, `[4, T, T]`, from its table: 32 buckets, half for keys after the query."""

    def bucket(distance: int) -> int:
        if distance < 8:
            return distance
        return min(8 + int(math.log(distance / 8) / math.log(128 / 8) * 8), 15)

    index = np.array([[(16 if k > q else 0) + bucket(abs(k - q)) for k in range(T)] for q in range(T)])
    return np.asarray(names["table"])[:, index]


def factor(rate: float, rng, heads: int, *, broadcast: bool) -> np.ndarray:
    """What libraries multiply weights by, `[2, heads, T, T]`: 1 / (1 − rate) where they keep one, else 0."""
    kept = dropout_mask(Dropout(rate, rng, broadcast), Tokens.sequence(T), batch=2, heads=heads)
    return np.where(kept, np.float32(1 / (1 - rate)), np.float32(0))


def jax_nn_bias(bias: Callable, **options) -> Check:
    """As `jax.nn.dot_product_attention` gives with an array as its bias."""

    def expected(names):
        array = jnp.asarray(bias(names), jnp.float32)[None]
        return jax.nn.dot_product_attention(*(names[name] for name in "qkv"), bias=array, **options)

    return gives(expected)


def mask_mod(row: Row, names: dict):
    """As the row's own `mask_mod` says, over all indices: batch, heads, queries, keys."""
    index = {
        "q_idx": np.arange(T)[:, None],
        "kv_idx": np.arange(T)[None, :],
        "b": np.arange(2)[:, None, None],
    }
    index |= {"h": np.arange(4)[:, None, None], "window": np.array([2, 4, 8, 24])}
    index |= {"document_id": np.array(DOCUMENT), "prefix_length": np.array([4, 9])}
    index |= {"is_global": np.isin(np.arange(T), [0, 11, 22]), "abs": abs}
    there = row.there.replace("(q_idx - kv_idx).abs()", "abs(q_idx - kv_idx)")
    shows(eval(there, names | index))(row, names)


def splash_mask(row: Row, names: dict):
    """As the splash mask of the row shows, whose classes run in NumPy."""
    mask = eval(row.there, names | vars(splash_attention_mask))
    shows(np.asarray(mask[(slice(None),) * len(mask.shape)]))(row, names)


def splash(*, residuals: bool = False, scale: float = 1.0, sinks=None, soft_cap=None) -> Check:
    """As splash attention's own reference, under a causal mask, one head of one sequence at a time."""

    def expected(names):
        q, k, v = (names[name].swapaxes(1, 2) for name in "qkv")
        k, v = (jnp.repeat(each, 2, axis=1) for each in (k, v))

        def one_head(q, k, v, sink):
            mask = splash_attention_mask.CausalMask((T, T))[:, :]
            options = {"save_residuals": True, "attn_logits_soft_cap": soft_cap}
            return splash_attention_kernel.attention_reference(mask, q * scale, k, v, None, sink, **options)

        over_heads = jax.vmap(one_head, in_axes=(0, 0, 0, None if sinks is None else 0))
        out, (lse,) = jax.vmap(over_heads, in_axes=(0, 0, 0, None))(q, k, v, sinks)
        return (out.swapaxes(1, 2), lse.swapaxes(1, 2)) if residuals else out.swapaxes(1, 2)

    return gives(lambda names: jax.jit(expected)({name: names[name] for name in "qkv"}))


def jax_nn(row: Row, names: dict):
    """As `jax.nn.dot_product_attention` gives with the row's options."""
    call = f"jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, {row.there}))(q, k, v)"
    gives(lambda names: eval(call, names))(row, names)


def nothing_visible(names) -> np.ndarray:
    """Zeros; and in `jax.nn`, as the row's note says, the mean of the values."""
    q, k, v = (names[name] for name in "qkv")
    there = jax.nn.dot_product_attention(q, k, v, mask=jnp.zeros((1, 1, T, T), bool))
    mean = jnp.repeat(v.mean(axis=1), 2, axis=1)[:, None]
    np.testing.assert_allclose(there, np.broadcast_to(mean, there.shape), rtol=1e-4, atol=1e-5)
    return np.zeros(q.shape)


def flax_mask(row: Row, names: dict):
    """As the row's array, which `nnx` and `linen` make alike."""
    names = names | {"x": jnp.ones(T), "position": jnp.arange(T)}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        made = [np.asarray(eval(row.there, names | vars(library)), bool)[0] for library in (nnx, linen)]
    np.testing.assert_array_equal(*made)
    shows(made[0])(row, names)


def nnx_layer(names):
    """Flax's own layer under its own causal mask."""
    layer, x = nnx.MultiHeadAttention(2, 16, decode=False, rngs=nnx.Rngs(0)), names["x"]
    return layer(x, mask=nnx.make_causal_mask(x[..., 0]))


def nnx_dropout(names):
    """Flax's own layer under its own causal mask, and its own weights, dropped where we drop them."""

    def attend(query, key, value, *, mask, dropout_rng, dropout_rate, broadcast_dropout, deterministic, **_):
        assert not deterministic
        weights = linen.dot_product_attention_weights(query, key, mask=mask)
        weights *= factor(dropout_rate, dropout_rng, 2, broadcast=broadcast_dropout)
        return jnp.einsum("bnts,bsnh->btnh", weights, value)

    options = {"decode": False, "dropout_rate": 0.1, "attention_fn": attend}
    layer, x = nnx.MultiHeadAttention(2, 16, rngs=nnx.Rngs(0), **options), names["x"]
    return layer(x, mask=nnx.make_causal_mask(x[..., 0]), deterministic=False)


def nnx_bias(bias: Callable, seen: np.ndarray) -> Check:
    """As Flax's own layer gives where its own attention is given an array as its bias."""

    def expected(names):
        attend = partial(nnx.dot_product_attention, bias=jnp.asarray(bias(names), jnp.float32)[None])
        layer = nnx.MultiHeadAttention(4, 16, decode=False, rngs=nnx.Rngs(0), attention_fn=attend)
        return layer(names["x"], mask=jnp.asarray(seen)[None, None])

    return gives(expected)


def linen_layer(seen: np.ndarray, heads: int = 2, bias: Callable | None = None) -> Check:
    """As Flax's own layer gives under this mask, with this array as its attention's bias."""

    def expected(names):
        array = None if bias is None else jnp.asarray(bias(names), jnp.float32)[None]
        attend = partial(linen.dot_product_attention, bias=array)
        layer = linen.MultiHeadDotProductAttention(heads, attention_fn=attend)
        return layer.init_with_output(jax.random.key(0), names["x"], mask=seen[None, None])[0]

    return gives(expected)


def tokamax_mask(row: Row, names: dict):
    """As the row's `Mask` shows: ranges of keys for each query, of queries for each key, and causality."""

    def ranges(q_start=0, q_end=T, k_start=0, k_end=T, is_causal=False):
        q_start, q_end, k_start, k_end = (
            np.broadcast_to(each, T) for each in (q_start, q_end, k_start, k_end)
        )
        of_keys = pairs(lambda q, k: k_start[q] <= k < k_end[q])
        of_queries = pairs(lambda q, k: q_start[k] <= q < q_end[k])
        return of_keys & of_queries & pairs(lambda q, k: q >= k or not is_causal)

    shows(eval(row.there, names | {"Mask": ranges, "document_start": STARTS}))(row, names)
