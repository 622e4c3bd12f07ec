"""Attention for Flax NNX: a layer of our own, and an `attention_fn` for models that exist already."""

from collections.abc import Callable

import flax.nnx as nnx
import jax
import jax.numpy as jnp

from dynmask_jax.array_typing import Array, Float, fits_int32, is_concrete, is_traced
from dynmask_jax.calls import as_plan
from dynmask_jax.curricula import Curriculum
from dynmask_jax.dispatch import attention
from dynmask_jax.flax_adapter import attend_for_flax, check_reads_no_segments, head_shape
from dynmask_jax.mask_algebra import Mask, check_mask
from dynmask_jax.plans import Plan
from dynmask_jax.rotary import rotary
from dynmask_jax.schedules import Step as StepLike
from dynmask_jax.tokens import Tokens


class Attention(nnx.Module):
    """Multi-head attention under a plan: projections, rotary positions, attention, projection.

    Its parameters have the names and shapes of `nnx.MultiHeadAttention`'s, without biases:
    query.kernel `[D, N, H]`, key.kernel and value.kernel `[D, K, H]`, out.kernel `[N, H, D]`.

    Args:
      features: D, the model width in and out.
      num_heads: N query heads.
      num_kv_heads: K key heads, which divide N; N by default.
      head_dim: H, by default D // N.
      rope_theta: base of rotary positions, read from the plan's tokens; None for no rotation.
      attention: what computes it, with the signature of `dynmask_jax.attention`:
        `functools.partial(attention, soft_cap=50.0)`, say.
      dtype: of the computation; None for that of the inputs and parameters.
      rngs: `nnx.Rngs` with a `params` stream.

    Raises:
      ValueError: num_kv_heads does not divide num_heads, or num_heads features without a head_dim.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_theta: float | None = None,
        attention: Callable = attention,
        dtype=None,
        rngs: nnx.Rngs,
    ):
        num_kv_heads, head_dim = head_shape(features, num_heads, num_kv_heads, head_dim)
        self.rope_theta, self.attention = rope_theta, attention

        def heads(count: int) -> nnx.LinearGeneral:
            return nnx.LinearGeneral(features, (count, head_dim), use_bias=False, dtype=dtype, rngs=rngs)

        self.query, self.key, self.value = heads(num_heads), heads(num_kv_heads), heads(num_kv_heads)
        self.out = nnx.LinearGeneral(
            (num_heads, head_dim), features, axis=(-2, -1), use_bias=False, dtype=dtype, rngs=rngs
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask_or_plan: Mask | Plan,
        context: Float[Array, "B S D"] | None = None,
    ) -> Float[Array, "B T D"]:
        """The layer's output for queries from `x` and keys from `context` (`x` where left out)."""
        context = x if context is None else context
        plan = as_plan(mask_or_plan, x.shape[0], x.shape[1], context.shape[1])
        return self.attend(x, *self.keys_values(context, plan.kv_tokens), plan)

    def keys_values(
        self, context: Float[Array, "B S D"], tokens: Tokens
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Keys and values of the context: turned to their positions, so that they can be kept.

        With `attend`, the two halves of a call: a cache holds keys and values between them.
        """
        return self._turned(self.key(context), tokens), self.value(context)

    def attend(
        self, x: Float[Array, "B T D"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], plan: Plan
    ) -> Float[Array, "B T D"]:
        """The layer's output for queries from `x`, given what `keys_values` made of their keys."""
        return self.out(self.attention(self._turned(self.query(x), plan.q_tokens), k, v, plan))

    def _turned(self, heads: Float[Array, "B S *NH"], tokens: Tokens) -> Float[Array, "B S *NH"]:
        return heads if self.rope_theta is None else rotary(heads, tokens.position, self.rope_theta)


NEVER_SET = -1
"""The step of a new `attention_fn`."""


class Step(nnx.Variable):
    """The training step that a curriculum reads inside a Flax model. Set it with `set_step`."""


class _EverSet:
    """Whether a step was ever set: a part of a module's structure, so that a trace can tell.

    All copies of a module, in and outside `jit`, hold the same object. So it changes once, where `set_step`
    is first called, and no call is compiled anew for it. It errs on one side alone: where one of several
    copies was set, it says so for all. What a trace cannot refuse for that, a negative step turns into NaN.
    """

    def __init__(self):
        self.yes = False

    def __eq__(self, other):
        return isinstance(other, _EverSet) and self.yes == other.yes

    def __hash__(self):
        return hash(_EverSet)


class CurriculumAttention(nnx.Module):
    """An `attention_fn` that follows a curriculum. Made by `attention_fn`, one for each layer."""

    def __init__(self, curriculum: Curriculum):
        self.curriculum = curriculum
        self.step = Step(jnp.full((), NEVER_SET, jnp.int32))
        self.ever_set = _EverSet()

    def __call__(self, query, key, value, **options):
        """Attention under the curriculum's mask at the step, for what `nnx.MultiHeadAttention` passes.

        Raises:
          ValueError: no step was ever set. Restored weights do not bring one.
        """
        step = self.step[...]
        # A concrete step tells by itself: a whole state may have been restored.
        if not (self.ever_set.yes if is_traced(step) else bool((step >= 0).all())):
            raise ValueError(
                "the model follows a curriculum, and no step was set: set_step(model, step) in training, "
                "set_final(model) for the full mask, as in evaluation and generation"
            )
        out = attend_for_flax(nnx.dot_product_attention, query, key, value, self.curriculum(step), options)
        return jnp.where(step >= 0, out, jnp.nan) if is_traced(step) else out


class MaskAttention(nnx.Module):
    """An `attention_fn` under one mask, without state. Made by `attention_fn`."""

    def __init__(self, mask: Mask):
        self.mask = lambda: mask  # behind a function NNX keeps its numbers out of the state

    def __call__(self, query, key, value, **options):
        """Attention under the mask, for what `nnx.MultiHeadAttention` passes."""
        return attend_for_flax(nnx.dot_product_attention, query, key, value, self.mask(), options)


def attention_fn(curriculum: Curriculum | Mask) -> CurriculumAttention | MaskAttention:
    """An `attention_fn` for `nnx.MultiHeadAttention`, under a curriculum or one mask.

    Make one for each layer: NNX's tree mode refuses a module that two layers share. Positions are
    0, 1, …; decoding with Flax's cache works. A whole curriculum is one compilation: the step is a
    variable, moved by `set_step`, and until it is called the model refuses to run. Numbers that the mask or
    curriculum keeps must outlive the transformation that the model is made in: use NumPy arrays for per-head
    values, not jnp.

    The step is state beside the parameters, as that of dropout and batch norm is:
    `nnx.split(model, nnx.Param, ...)`, with the dots. Under one mask there is no step, and no state.

    A checkpoint from before the model had an `attention_fn` holds parameters and no step: restore it into
    `nnx.state(model, nnx.Param)`, then call `set_step` or `set_final`. Call one of them after restoring a
    whole state too: `jit` cannot read the restored step.

    Raises:
      TypeError: neither a curriculum nor a mask.
      ValueError: a mask with traced numbers, or one that reads segments, which Flax's layers do not pass on;
        when called with other numbers of queries and keys and a mask that reads positions.
      Unsupported: when called with dropout, a bias, a mask array for several queries, sown weights,
        or a precision.

    >>> layer = nnx.MultiHeadAttention(
    ...     num_heads=2, in_features=8, decode=False, rngs=nnx.Rngs(0),
    ...     attention_fn=attention_fn(growing_window(linear(2, 16, steps=10))))
    >>> set_step(layer, 5)
    >>> layer(jnp.ones((1, 16, 8))).shape
    (1, 16, 8)
    """
    if isinstance(curriculum, Mask):
        if any(map(is_traced, jax.tree.leaves(curriculum))):
            raise ValueError(
                "attention_fn keeps its mask, whose numbers must outlive the transformation that the model "
                "is made in: use Python or NumPy numbers, not jnp arrays"
            )
        check_reads_no_segments(curriculum)
        return MaskAttention(curriculum)
    if isinstance(curriculum, type) or not callable(curriculum):
        check_mask(curriculum, "attention_fn needs a curriculum or a mask")
    check_reads_no_segments(_mask_of(curriculum))
    return CurriculumAttention(curriculum)


def _mask_of(curriculum: Curriculum) -> Mask:
    """The curriculum's mask, with shapes and types in place of its numbers."""
    try:
        found = jax.eval_shape(curriculum, jax.ShapeDtypeStruct((), jnp.int32))
    except jax.errors.ConcretizationTypeError:  # one of Python's conditions, for use outside `jit`
        found = curriculum(0)
    if not isinstance(found, Mask):
        given = "a number" if isinstance(found, jax.ShapeDtypeStruct) else type(found).__name__
        raise TypeError(
            f"attention_fn needs a curriculum, step -> Mask; this one gives {given}: a schedule is given to "
            "a curriculum, attention_fn(growing_window(schedule))"
        )
    return found


def set_step(model: nnx.Module, step: StepLike) -> None:
    """Moves every `attention_fn` in the model to a training step, which may be traced.

    Raises:
      ValueError: the model has none that follows a curriculum; or the step is negative, or beyond int32.
      TypeError: the step is not one whole number.
    """
    if not (isinstance(step, int) or hasattr(step, "dtype")) or jnp.shape(step) != ():
        raise TypeError(f"step must be one whole number, got {step!r}")
    if not isinstance(step, int) and not jnp.issubdtype(jnp.result_type(step), jnp.integer):
        raise TypeError(f"step must be a whole number, got {step!r}")
    if is_concrete(step) and not (int(step) >= 0 and fits_int32(step)):
        raise ValueError(f"step must lie in 0 … 2³¹ − 1, got {step}")
    followers = [node for _, node in nnx.iter_graph(model) if isinstance(node, CurriculumAttention)]
    if not followers:
        raise ValueError("the model has no attention_fn (dynmask_jax.nnx) that follows a curriculum")
    for follower in followers:
        follower.ever_set.yes = True
        follower.step[...] = jnp.broadcast_to(step, follower.step[...].shape).astype(jnp.int32)


def set_final(model: nnx.Module) -> None:
    """Moves every `attention_fn` in the model to the curriculum's end: the full mask.

    For evaluation and generation, and wherever weights were restored without a step. The step becomes
    2³¹ − 1, the last that int32 holds. Raises as `set_step` does.
    """
    set_step(model, 2**31 - 1)
