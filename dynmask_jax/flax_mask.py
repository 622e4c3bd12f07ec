"""What the mask of a Flax layer is to attention: from nothing, an array, tokens or a plan to a plan."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from dynmask_jax.array_typing import Array, Bool, pytree
from dynmask_jax.bias_algebra import Bias
from dynmask_jax.calls import check_positions
from dynmask_jax.errors import Unsupported
from dynmask_jax.fields_read import reads_segments
from dynmask_jax.mask_algebra import Mask
from dynmask_jax.plans import Plan
from dynmask_jax.sharding import axes_of
from dynmask_jax.tokens import Tokens


@pytree
class Shown(Mask):
    """Keys that are no padding: their segment is not 0."""

    def visible(self, q, k):
        return k.segment > 0


def one_batch_axis(x: Array, batch: tuple[int, ...], rest: int) -> Array:
    """An array `[*B, …]`, `rest` axes after those of the batch, with one batch axis.

    Raises:
      ValueError: a mesh partitions another batch axis than the first.
    """
    if any(axes_of(x)[1 : len(batch)]):
        raise ValueError(
            f"of the batch axes {batch} the mesh may partition the first alone, got {jax.typeof(x)}: reshape "
            "the model's input to one batch axis"
        )
    return x if len(batch) == 1 else x.reshape(math.prod(batch), *x.shape[-rest:])


@dataclass(frozen=True)
class LayerCall:
    """One call of a Flax layer.

    Attributes:
      planned: the plan of a mask and of the tokens of queries and keys.
      batch: its batch axes.
      queries, keys: T and S.
      bias: or None.
    """

    planned: Callable[[Mask, Tokens, Tokens], Plan]
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
            the_plan = self.planned(mask_or_plan, *tokens)
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
        return jax.tree.map(lambda field: one_batch_axis(field, self.batch, 1), tokens)

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
    codes, fine = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (rows, *x.shape[1:])), (the_plan.codes, the_plan.fine)
    )
    # Codes of before: a block to skip stays one, and a full one is tested where Shown says so.
    return (
        replace(the_plan, q_tokens=q_tokens, kv_tokens=Tokens(position, segment), codes=codes, fine=fine)
        & Shown()
    )
