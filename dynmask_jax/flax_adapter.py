"""What the NNX and the Linen layers have in common; it needs no Flax itself."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynmask_jax.array_typing import Array, Bool, Float, is_concrete, pytree
from dynmask_jax.backends.backend import Backend
from dynmask_jax.bias_algebra import Bias, check_bias
from dynmask_jax.calls import check_positions
from dynmask_jax.dispatch import known_backend
from dynmask_jax.dropout import Dropout
from dynmask_jax.errors import Unsupported
from dynmask_jax.fields_read import reads_segments
from dynmask_jax.mask_algebra import Mask
from dynmask_jax.masks import Causal
from dynmask_jax.plans import Plan, block_size, plan
from dynmask_jax.sharding import axes_of
from dynmask_jax.tokens import Tokens

# Handled below, or without effect here: the softmax is float32 always.
UNDERSTOOD = frozenset(
    [
        "mask",
        "bias",
        "is_causal",
        "dtype",
        "deterministic",
        "dropout_rate",
        "dropout_rng",
        "broadcast_dropout",
        "force_fp32_for_softmax",
        "promote_dtype",
    ]
)


def head_shape(
    features: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None
) -> tuple[int, int]:
    """The layer's key heads K and head dim H, with the defaults filled in: N and D // N.

    Raises:
      ValueError: heads below 1; K does not divide N; or N does not divide D where there is no head dim.
    """
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    for name, count in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads must divide num_heads ({num_heads}), got {num_kv_heads}")
    if head_dim is None and features % num_heads:
        raise ValueError(f"num_heads must divide features ({features}), got {num_heads}; or give head_dim")
    return num_kv_heads, features // num_heads if head_dim is None else head_dim


@dataclass(frozen=True)
class Computation:
    """What computes attention for a Flax layer, and in which blocks. Made by `computation`.

    Attributes:
      attention: what computes it, with the signature of `dynmask_jax.attention`.
      block_q, block_k: tokens in a block of plans that are made here; None for the default.
    """

    attention: Callable
    block_q: int | None
    block_k: int | None

    @property
    def bias(self) -> Bias | None:
        """The one that its attention was made with; raises TypeError where it is something else."""
        if (bias := fixed_options(self.attention).get("bias")) is not None:
            check_bias(bias)
        return bias

    def plan(self, mask: Mask, q_tokens: Tokens, kv_tokens: Tokens) -> Plan:
        """The mask's plan, in these blocks."""
        return plan(mask, q_tokens, kv_tokens, block_q=self.block_q, block_k=self.block_k)


def fixed_options(attention: Callable) -> Mapping[str, Any]:
    """The options that each call of it has: those of a `functools.partial`, and of a `context_parallel`."""
    if isinstance(attention, functools.partial):
        return {**fixed_options(attention.func), **attention.keywords}
    return getattr(attention, "options", {})


def computation(
    attention: Callable, backend: str | Backend | None, block_q: int | None, block_k: int | None
) -> Computation:
    """The options of both `attention_fn`, as one.

    Raises:
      TypeError: the attention cannot be called, or a block size is no whole number.
      ValueError: there is no such backend, or a block size is below 1.
    """
    if not callable(attention):
        raise TypeError(f"attention must be a function like dynmask_jax.attention, got {attention!r}")
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if size is not None:
            block_size(name, size)
    if backend is not None:
        known_backend(backend)
        attention = functools.partial(attention, backend=backend)
    return Computation(attention, block_q, block_k)


@pytree
class Shown(Mask):
    """Keys that are no padding: their segment is not 0."""

    def visible(self, q, k):
        return k.segment > 0


def attend_for_flax(
    original: Callable,
    how: Computation,
    qkv: tuple,
    mask_or_plan: Mask | Plan,
    told: tuple[Tokens, Tokens] | None,
    options: Mapping[str, Any],
) -> Float[Array, "*B T N H"]:
    """Attention for a Flax layer, with the keyword arguments that Flax passes to `original`.

    Args:
      original: Flax's own function, whose options are known.
      how: what computes it.
      qkv: query `[*B, T, N, H]`, key and value `[*B, S, K, H]`.
      mask_or_plan: what is visible.
      told: the tokens of queries and keys, where they were told.
      options: what Flax passes. Its `mask` may be
        - an array over keys `[*B, 1, 1, S]`, as of padding: keys that it hides stay hidden;
        - the same for a single query, as Flax makes one to decode with a cache: the last key that it shows
          is the query's own place. So a row that hides the query's own key, as padding does, is read as if
          the query stood at the last key that it shows;
        - `Tokens`, of queries and keys alike; a `Plan`, which `mask_or_plan` narrows; or one more `Mask`.

        Its `bias` is a `Bias`. Several batch axes are one to attention, so dropout counts their rows as one.

    Raises:
      Unsupported: an option that would change the result and that we have not, by name.
      TypeError: a bias that is an array.
      ValueError: tokens are needed, and were not told; or other ones were. Dropout without a key.
    """
    _refuse(original, options)
    if (dtype := options.get("dtype")) is not None:
        qkv = tuple(x.astype(dtype) for x in qkv)
    if options.get("is_causal"):
        mask_or_plan = mask_or_plan & Causal()
    batch = qkv[0].shape[:-3]
    query, key, value = (_one_batch_axis(x, batch, 3) for x in qkv)
    added = _bias_and_dropout(how, options)
    call = _Call(how, batch, query.shape[1], key.shape[1], added.get("bias", how.bias))
    the_plan = call.plan(mask_or_plan, told, options.get("mask"))
    out = how.attention(query, key, value, the_plan, **added)
    return out if len(batch) == 1 else out.reshape(*batch, *out.shape[1:])


def _one_batch_axis(x: Array, batch: tuple[int, ...], rest: int) -> Array:
    if any(axes_of(x)[1 : len(batch)]):
        raise ValueError(
            f"of the batch axes {batch} the mesh may partition the first alone, got {jax.typeof(x)}: reshape "
            "the model's input to one batch axis"
        )
    return x if len(batch) == 1 else x.reshape(math.prod(batch), *x.shape[-rest:])


def _refuse(original: Callable, options: Mapping[str, Any]):
    if options.get("module") is not None:
        raise Unsupported("attention_fn never forms attention weights: sow_weights must be False")
    known = inspect.signature(original).parameters
    for name, value in options.items():
        if name not in UNDERSTOOD and not (name in known and value is known[name].default):
            raise Unsupported(f"attention_fn does not support {name}={value!r}")


def _bias_and_dropout(how: Computation, options: Mapping[str, Any]) -> dict[str, Any]:
    """What Flax's options add to the call of `attention`: nothing where they are off."""
    added = {}
    if options.get("bias") is not None:
        check_bias(options["bias"])
        added["bias"] = options["bias"]
    rate = options.get("dropout_rate", 0.0)
    if not (options.get("deterministic") or (is_concrete(rate) and rate == 0)):
        if (rng := options.get("dropout_rng")) is None:
            raise ValueError(f"attention_fn got dropout_rate={rate} and no dropout_rng, a key of jax.random")
        added["dropout"] = Dropout(rate, rng, broadcast=options.get("broadcast_dropout", True))
    for name in added:
        if fixed_options(how.attention).get(name) is not None:
            raise ValueError(f"attention_fn was made with {name}, and got {name} of its layer too: give one")
    return added


@dataclass(frozen=True)
class _Call:
    """One call of a Flax layer: what computes it, its batch axes, T and S, and its bias."""

    how: Computation
    batch: tuple[int, ...]
    queries: int
    keys: int
    bias: Bias | None

    def plan(self, mask_or_plan: Mask | Plan, told: tuple[Tokens, Tokens] | None, given) -> Plan:
        """The plan for what the layer was given as its mask: nothing, an array, tokens or a plan."""
        if isinstance(given, Mask):
            mask_or_plan, given = mask_or_plan & given, None
        if isinstance(given, Plan | Tokens):
            self._refuse_second(mask_or_plan, told, type(given).__name__)
        if isinstance(given, Plan):
            assert not isinstance(mask_or_plan, Plan)
            return given & mask_or_plan
        if isinstance(given, Tokens):
            tokens = self._by_rows(given)
            told, given = (tokens, tokens), None
        shown = None if given is None else self._shown(given)
        if isinstance(mask_or_plan, Plan):
            the_plan = mask_or_plan
        else:
            tokens = self._checked(told) if told is not None else self._tokens(mask_or_plan, shown)
            the_plan = self.how.plan(mask_or_plan, *tokens)
        return the_plan if shown is None else _without_hidden(the_plan, shown)

    def _by_rows(self, tokens: Tokens) -> Tokens:
        """The tokens `[T]` or `[*B, T]` that came as a mask, with one batch axis."""
        if tokens.shape[:-1] not in ((), self.batch) or not tokens.shape[-1] == self.queries == self.keys:
            raise ValueError(
                f"tokens as a mask are of queries and keys alike, {(*self.batch, self.queries)} or "
                f"({self.queries},), got {tokens.shape} for {self.queries} queries and {self.keys} keys"
            )
        if len(tokens.shape) == 1:
            return tokens
        return jax.tree.map(lambda field: _one_batch_axis(field, self.batch, 1), tokens)

    def _refuse_second(self, mask_or_plan: Mask | Plan, told: tuple[Tokens, Tokens] | None, given: str):
        """Refuses tokens or a plan as a mask where tokens are known already: which hold is not said."""
        known = "a plan, which has its tokens" if isinstance(mask_or_plan, Plan) else "tokens, by set_tokens"
        if told is not None or isinstance(mask_or_plan, Plan):
            raise ValueError(
                f"attention_fn has {known}, and was given {given} as the layer's mask too: give one of them"
            )

    def _checked(self, told: tuple[Tokens, Tokens]) -> tuple[Tokens, Tokens]:
        lengths = tuple(tokens.shape[-1] for tokens in told)
        if lengths != (self.queries, self.keys):
            raise ValueError(
                f"attention_fn was told of {lengths[0]} queries and {lengths[1]} keys, got {self.queries} "
                f"and {self.keys}: set_tokens(model, tokens) for each batch, and set_tokens(model, None) "
                "before decoding"
            )
        rows = {tokens.shape[0] for tokens in told if len(tokens.shape) == 2}
        if rows - {math.prod(self.batch)}:
            raise ValueError(
                f"attention_fn was told of {max(rows)} rows, got {self.batch}: set_tokens(model, tokens) for "
                "each batch"
            )
        return told

    def _tokens(self, mask: Mask, shown: Bool[Array, "B S"] | None) -> tuple[Tokens, Tokens]:
        """Queries and keys where none were told: at 0, 1, …, and of one document that `shown` pads."""
        expressions = (mask,) if self.bias is None else (mask, self.bias)
        if shown is None:
            for expression in filter(reads_segments, expressions):
                raise ValueError(
                    f"attention_fn: {expression!r} reads segments, and none were told, so packed documents "
                    "would count as one: call set_tokens(model, Tokens(position, segment)) for each batch of "
                    "an NNX model, or give the layer Tokens or a plan as its mask"
                )
            self._check_positions(expressions)
            return Tokens.sequence(self.queries), Tokens.sequence(self.keys)
        place = jnp.broadcast_to(jnp.arange(self.keys, dtype=jnp.int32), shown.shape)
        keys = Tokens(place, shown.astype(jnp.int32))
        if self.queries == 1:
            return Tokens(jnp.max(jnp.where(shown, place, 0), axis=1, keepdims=True)), keys
        if self.queries == self.keys and any(map(reads_segments, expressions)):
            return keys, keys
        self._check_positions(expressions)
        return Tokens.sequence(self.queries), keys

    def _check_positions(self, expressions: tuple[Mask | Bias, ...]):
        for expression in expressions:
            check_positions(expression, self.queries, self.keys)

    def _shown(self, mask) -> Bool[Array, "B S"]:
        """Which keys an array over keys shows."""
        if not isinstance(mask, jax.Array | np.ndarray):
            raise TypeError(
                "the layer's mask must be an array over keys, Tokens, a Plan or a Mask, got "
                f"{type(mask).__name__}"
            )
        mask = jnp.asarray(mask)
        if mask.ndim < 3 or mask.shape[-3:] != (1, 1, self.keys):
            raise Unsupported(
                f"attention_fn takes a mask array over keys alone, [batch, 1, 1, {self.keys}], as of "
                f"padding, got {mask.shape}: write what it says of pairs as an expression, by which blocks "
                "are skipped. make_causal_mask is attention_fn(Causal()), combine_masks is &, and a mask of "
                "equal segments is SameSegment(), with Tokens(position, segment) as the layer's mask"
            )
        rows = mask.shape[:-3]
        if len(rows) > len(self.batch) or any(
            n not in (1, b) for n, b in zip(rows, self.batch, strict=False)
        ):
            raise ValueError(f"the layer's mask must be of {self.batch} rows, or 1, got {mask.shape}")
        return jnp.broadcast_to(mask.astype(bool), (*self.batch, 1, 1, self.keys)).reshape(-1, self.keys)


def _without_hidden(the_plan: Plan, shown: Bool[Array, "B S"]) -> Plan:
    """The plan, its keys that are not shown turned into padding, which nobody sees."""
    kv_tokens = the_plan.kv_tokens
    segment = jnp.where(shown, kv_tokens.segment, 0)
    rows = segment.shape[0]
    position = jnp.broadcast_to(kv_tokens.position, segment.shape)
    q_tokens = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, x.shape[1])), the_plan.q_tokens)
    codes = jnp.broadcast_to(the_plan.codes, (rows, *the_plan.codes.shape[1:]))
    # Codes of before: a block to skip stays one, and a full one is tested where Shown says so.
    return replace(the_plan, q_tokens=q_tokens, kv_tokens=Tokens(position, segment), codes=codes) & Shown()
