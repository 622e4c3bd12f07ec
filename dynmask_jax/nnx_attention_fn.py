"""An `attention_fn` for Flax NNX models that exist already, and what it is told: the step, and the tokens."""

import contextlib
from collections.abc import Callable

import flax.errors
import flax.nnx as nnx
import jax
import jax.numpy as jnp

from dynmask_jax.array_typing import Array, Int, fits_int32, is_concrete, is_traced
from dynmask_jax.backends.backend import Backend
from dynmask_jax.curricula import Curriculum
from dynmask_jax.dispatch import attention
from dynmask_jax.fields_read import reads_segments
from dynmask_jax.flax_adapter import Computation, attend_for_flax, computation
from dynmask_jax.mask_algebra import Mask, check_mask
from dynmask_jax.schedules import Step as StepLike
from dynmask_jax.tokens import Tokens, check_tokens

NEVER_SET = -1
"""The step of a new `attention_fn`."""


class Step(nnx.Variable):
    """The training step that a curriculum reads inside a Flax model. Set it with `set_step`."""


class BatchTokens(nnx.Variable):
    """Positions and segments of a batch, int32 `[2, R, T]`, or `[1, 1, 1]` of none. Set with `set_tokens`."""


class Told(nnx.Module):
    """The tokens of queries and keys that an `attention_fn` was told."""

    def __init__(self):
        self.queries, self.keys = (BatchTokens(jnp.zeros((1, 1, 1), jnp.int32)) for _ in range(2))

    def set(self, of_queries: Tokens | None, of_keys: Tokens | None):
        """Replaces them, in each of the layers that are stacked here; None forgets them."""
        for variable, tokens in ((self.queries, of_queries), (self.keys, of_keys)):
            stack = variable[...].shape[:-3]
            fields = _fields(tokens)
            _replace(variable, jnp.broadcast_to(fields, (*stack, *fields.shape)))

    def tokens(self) -> tuple[Tokens, Tokens] | None:
        """Those of queries and of keys; None: they were not told."""
        fields = self.queries[...], self.keys[...]
        if any(each.shape[0] == 1 for each in fields):
            return None
        queries, keys = (Tokens(*(each[:, 0] if each.shape[1] == 1 else each)) for each in fields)
        return queries, keys


def _replace(variable: nnx.Variable, value: Array):
    """Gives a variable a value of another shape; Flax 0.11 has no `set_value`, and replaces at `...`."""
    if hasattr(variable, "set_value"):
        variable.set_value(value)
    else:
        variable[...] = value


def _fields(tokens: Tokens | None) -> Int[Array, "2 R T"]:
    if tokens is None:
        return jnp.zeros((1, 1, 1), jnp.int32)
    fields = jnp.stack([tokens.position, tokens.segment])
    return fields if fields.ndim == 3 else fields[:, None]


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

    def __init__(self, curriculum: Curriculum, how: Computation, told: Told | None):
        self.curriculum, self.how, self.told = curriculum, how, told
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
        out = _attend(self, (query, key, value), self.curriculum(step), options)
        return jnp.where(step >= 0, out, jnp.nan) if is_traced(step) else out


class MaskAttention(nnx.Module):
    """An `attention_fn` under one mask, without state. Made by `attention_fn`."""

    def __init__(self, mask: Mask, how: Computation, told: Told | None):
        self.mask = lambda: mask  # behind a function NNX keeps its numbers out of the state
        self.how, self.told = how, told

    def __call__(self, query, key, value, **options):
        """Attention under the mask, for what `nnx.MultiHeadAttention` passes."""
        return _attend(self, (query, key, value), self.mask(), options)


def _attend(module: CurriculumAttention | MaskAttention, qkv: tuple, mask: Mask, options):
    told = None if module.told is None else module.told.tokens()
    return attend_for_flax(nnx.dot_product_attention, module.how, qkv, mask, told, options)


def attention_fn(
    curriculum: Curriculum | Mask,
    *,
    attention: Callable = attention,
    backend: str | Backend | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
) -> CurriculumAttention | MaskAttention:
    """An `attention_fn` for `nnx.MultiHeadAttention`, under a curriculum or one mask.

    Args:
      curriculum: `step -> Mask`, or a `Mask`.
      attention: what computes it: `functools.partial(attention, bias=ALiBi.for_heads(8))`, with options of
        its own, or a `context_parallel`.
      backend: its backend.
      block_q, block_k: tokens in a block of the plans that are made here.

    Make one for each layer: NNX's tree mode refuses a module that two layers share. Positions are
    0, 1, …; decoding with Flax's cache works. A whole curriculum is one compilation: the step is a
    variable, moved by `set_step`, and until it is called the model refuses to run.

    A mask or curriculum that reads segments (`& SameSegment()`) must be told of each batch's tokens, packed
    documents or padding: by `set_tokens`; by what the model gives its layers as `mask`, `Tokens` or a `Plan`
    (which is narrowed); or by a padding mask `[batch, 1, 1, keys]`, from which segments 1 and 0 are made.
    Under any other mask a padding mask hides keys. Mask arrays of pairs, `[…, queries, keys]`, are refused.
    With `decode=True` Flax itself takes arrays alone.

    The layer's `dropout_rate`, `broadcast_dropout` and `deterministic` mean what they mean in Flax; the draws
    are those of `Dropout`, at the key that the layer draws. Flax's layers pass no bias. A module of your own
    that calls this may: `bias=RelativeBuckets(self.table[...])`, of a learned table.

    Numbers that the mask or curriculum keeps must outlive the transformation that the model is made in: use
    NumPy arrays for per-head values, not jnp.

    The step is state beside the parameters, as that of dropout and batch norm is:
    `nnx.split(model, nnx.Param, ...)`, with the dots. So are tokens. Under one mask there is no step, and no
    state if it reads no segments.

    A checkpoint from before the model had an `attention_fn` holds parameters and no step: restore it into
    `nnx.state(model, nnx.Param)`, then call `set_step` or `set_final`. Call one of them after restoring a
    whole state too: `jit` cannot read the restored step.

    Raises:
      TypeError: neither a curriculum nor a mask; attention that cannot be called; or an array as a bias.
      ValueError: a mask with traced numbers; when called, a mask that reads segments and no tokens, or other
        ones; other numbers of queries and keys and a mask that reads positions; dropout without a key.
      Unsupported: when called with a mask array of pairs, sown weights, or a precision.

    >>> layer = nnx.MultiHeadAttention(
    ...     num_heads=2, in_features=8, decode=False, rngs=nnx.Rngs(0),
    ...     attention_fn=attention_fn(growing_window(linear(2, 16, steps=10))))
    >>> set_step(layer, 5)
    >>> layer(jnp.ones((1, 16, 8))).shape
    (1, 16, 8)
    """
    how = computation(attention, backend, block_q, block_k)
    if isinstance(curriculum, Mask):
        if any(map(is_traced, jax.tree.leaves(curriculum))):
            raise ValueError(
                "attention_fn keeps its mask, whose numbers must outlive the transformation that the model "
                "is made in: use Python or NumPy numbers, not jnp arrays"
            )
        return MaskAttention(curriculum, how, _told(curriculum, how))
    if isinstance(curriculum, type) or not callable(curriculum):
        check_mask(curriculum, "attention_fn needs a curriculum or a mask")
    mask = _mask_of(curriculum)
    return CurriculumAttention(curriculum, how, _told(mask, how))


def _told(mask: Mask | None, how: Computation) -> Told | None:
    """A place for tokens, where mask or bias read segments, or the mask cannot be known beforehand."""
    return Told() if mask is None or reads_segments(mask) or reads_segments(how.bias) else None


def _mask_of(curriculum: Curriculum) -> Mask | None:
    """The curriculum's mask, with shapes and types in place of its numbers; None if it differs by step."""
    try:
        found = jax.eval_shape(curriculum, jax.ShapeDtypeStruct((), jnp.int32))
    except jax.errors.ConcretizationTypeError:  # one of Python's conditions, for use outside `jit`
        return None
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
    with _remedy_for_outer_variables():
        for follower in followers:
            # A buffer of its own for each, and not the caller's: a model may be donated.
            follower.step[...] = jnp.array(
                jnp.broadcast_to(step, follower.step[...].shape), jnp.int32, copy=True
            )
            follower.ever_set.yes = True


@contextlib.contextmanager
def _remedy_for_outer_variables():
    try:
        yield
    except flax.errors.TraceContextError as cause:
        raise ValueError(
            "the model's variables belong to a trace around this one (jax.grad in jit, say), from which they "
            "cannot be changed: call set_step and set_tokens before it, or make the model in here with "
            "nnx.merge(…, copy=True)"
        ) from cause


def set_tokens(model: nnx.Module, q_tokens: Tokens | None, kv_tokens: Tokens | None = None) -> None:
    """Tells every `attention_fn` in the model whose mask reads segments of a batch's tokens.

    Args:
      model: the model, or one layer of it: `layer.cross_attention` is told of its own.
      q_tokens: of the queries, `[T]` for all rows alike or `[B, T]`; None forgets what was told, before
        decoding, or before a whole state is saved.
      kv_tokens: of the keys; left out, the queries are the keys too.

    Layers whose mask reads no segments stay at positions 0, 1, … of one document, and see across documents.

    The tokens are state, as the step is. Where they are set outside `nnx.jit`, each shape is one compilation.
    Set inside, they stay with the model that comes out, which the next call compiles anew, once: forget
    them at the end, or use a functional loop (`nnx.split`, `nnx.merge`), from which none come out.

    Raises:
      TypeError: the tokens are something else.
      ValueError: their shapes do not fit each other; or no `attention_fn` in the model reads segments.
    """
    if q_tokens is not None or kv_tokens is not None:
        kv_tokens = q_tokens if kv_tokens is None else kv_tokens
        check_tokens(q_tokens, kv_tokens)
    listeners = [node for _, node in nnx.iter_graph(model) if isinstance(node, Told)]
    if not listeners:
        raise ValueError(
            "the model has no attention_fn (dynmask_jax.nnx) whose mask reads segments: make it with "
            "& SameSegment()"
        )
    with _remedy_for_outer_variables():
        for listener in listeners:
            listener.set(q_tokens, kv_tokens)


def set_final(model: nnx.Module) -> None:
    """Moves every `attention_fn` in the model to the curriculum's end: the full mask.

    For evaluation and generation, and wherever weights were restored without a step. The step becomes
    2³¹ − 1, the last that int32 holds. Raises as `set_step` does.
    """
    set_step(model, 2**31 - 1)
