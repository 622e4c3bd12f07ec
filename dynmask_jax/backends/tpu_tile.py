"""One tile inside a TPU kernel: products to logits, and the mask on the tile's tokens.

Logits are kept in powers of two, as the hardware's exponential is: scale and log2 e are one factor.
"""

import dataclasses
import functools
import math
import operator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dynmask_jax.array_typing import Array, is_boolean
from dynmask_jax.backends.tpu_grid import LANES
from dynmask_jax.block_codes import FULL, TEST
from dynmask_jax.errors import Unsupported
from dynmask_jax.mask_algebra import Mask, evaluate, visible_pairs
from dynmask_jax.plans import Plan
from dynmask_jax.scores import Scores
from dynmask_jax.tokens import Tokens

LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Tile:
    """What is fixed for all tiles of a kernel.

    Attributes:
      scores: scale and soft cap.
      leaf_types: the types of the mask's leaves, in its structure.
      keys_first: whether the line is of keys and its columns of queries.
      filled: whether columns may be of keys that are filling, which must be hidden: their logits of 0
        can be far above all others. Filling among queries has no gradient, and needs no hiding.
    """

    scores: Scores
    leaf_types: Mask
    keys_first: bool
    filled: bool

    @classmethod
    def of(cls, scores: Scores, plan: Plan, *, keys_first: bool) -> "Tile":
        """For the plan's mask and blocks."""
        filled = bool(plan.lengths[1] % plan.block_k or plan.block_k % LANES)
        return cls(
            scores, jax.eval_shape(lambda mask: mask, plan.mask), keys_first, filled and not keys_first
        )

    def logits(self, products):
        """Products of unscaled queries as logits · log2 e."""
        scale, cap = self.scores.scale, self.scores.soft_cap
        if cap is None:
            return products * (scale * LOG2E)
        return (cap * LOG2E) * jnp.tanh(products * (scale / cap))

    def slope(self, logits, gradients):
        """d loss / d (scaled product) from d loss / d logit."""
        cap = self.scores.soft_cap
        return gradients if cap is None else gradients * (1.0 - jnp.square(logits / (cap * LOG2E)))

    def hide(self, logits, mask, head, tokens):
        """The logits `[line, column]`, −inf where the mask hides the pair.

        `mask` holds refs to scalar memory; `tokens` are the line's, each in all lanes `[2, line, 128]`,
        and the column's `[3, column]`.
        """
        mask, (line, column) = _of_head(mask, self.leaf_types, head), tokens
        line = Tokens(line[0], line[1])
        strips = []
        for start in range(0, logits.shape[1], LANES):
            strip = column[:, start : start + LANES]
            visible = self._visible(mask, line, strip)
            strips.append(jnp.where(visible, logits[:, start : start + LANES], -jnp.inf))
        return jnp.concatenate(strips, axis=1)

    def _visible(self, mask, line: Tokens, strip):
        column = Tokens(strip[0:1], strip[1:2])
        seen = evaluate(mask, column, line) if self.keys_first else evaluate(mask, line, column)
        seen = jnp.broadcast_to(seen, line.shape)
        return seen & (jnp.broadcast_to(strip[2:3], line.shape) != 0) if self.filled else seen


_LOOKUPS = {"gather", "dynamic_slice", "dynamic_update_slice", "scatter", "sort", "while", "scan"}


def check_kernel_mask(mask: Mask):
    """Refuses a mask that a kernel cannot compute.

    Raises:
      Unsupported: its function closes over an array or looks things up in one, or a leaf is of a type
        that scalar memory does not hold.
    """
    for leaf in jax.tree.leaves(mask):
        kind = jax.typeof(leaf) if hasattr(leaf, "dtype") else jax.typeof(jnp.asarray(leaf))
        # Under x64 a Python number is traced with 64 bits, which it does not need.
        if kind.dtype not in (jnp.bool_, jnp.int32, jnp.uint32, jnp.float32) and not kind.weak_type:
            raise Unsupported(
                f"backend 'tpu': {mask!r} has a leaf of {kind.dtype}; a kernel takes bool, int32, uint32 and "
                "float32"
            )
    tokens = Tokens.sequence(2)
    traced = jax.make_jaxpr(visible_pairs)(mask, tokens, tokens)
    if traced.consts:
        shapes = ", ".join(f"{x.dtype}{list(x.shape)}" for x in traced.consts)
        raise Unsupported(
            f"backend 'tpu': {mask!r} closes over an array ({shapes}), which a kernel cannot reach; give a "
            "number as a parameter, Predicate(function, number), or take backend 'xla'"
        )
    if lookups := _LOOKUPS & _operations(traced.jaxpr):
        raise Unsupported(
            f"backend 'tpu': {mask!r} uses {', '.join(sorted(lookups))}, which a kernel cannot; take backend "
            "'xla'"
        )


def check_kernel_scores(scores: Scores):
    """Refuses scores that a kernel cannot compute.

    Raises:
      Unsupported: a bias, or dropout.
    """
    for name in ("bias", "dropout"):
        if getattr(scores, name) is not None:
            raise Unsupported(f"backend 'tpu' has no {name} yet; take backend 'xla'")


def _operations(jaxpr) -> set[str]:
    """The names of all operations in a traced function, in what it calls too."""
    names = set()
    for equation in jaxpr.eqns:
        names.add(equation.primitive.name)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            names |= _operations(inner) if hasattr(inner, "eqns") else set()
    return names


def _of_head(mask: Mask, types: Mask, head) -> Mask:
    def leaf(ref, kind):
        value = ref[0, head if kind.shape else 0]
        if is_boolean(kind):
            return value != 0
        return value.astype(jnp.uint32) if kind.dtype == jnp.uint32 else value

    return jax.tree.map(leaf, mask, types)


def dot(a, b, a_axis: int, b_axis: int):
    """A product of matrices over one axis of each, summed in float32.

    Operands in float32 are multiplied in full precision, those in bfloat16 in the one pass there is,
    whatever JAX's default is.
    """
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def by_code(code, add, hide):
    """Runs `add(hide)` on a block to test, and `add(None)` on a full one, where nothing is hidden."""
    pl.when(code == FULL)(lambda: add(None))
    pl.when(code == TEST)(lambda: add(hide))


def hidden(logits, hide):
    """The logits, −inf where `hide` hides a pair; None hides nothing."""
    return logits if hide is None else hide(logits)


def keep_tokens(kept, tokens):
    """At a line's first block: its position and segment, upright, for as long as it lasts."""
    for field in range(2):
        kept[field] = in_lanes(tokens[field : field + 1])


def in_lanes(row: Array) -> Array:
    """A row `[1, n]` turned upright, the same in every lane: `[n, 128]`."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def widened(column: Array, width: int) -> Array:
    """`[n, 128]`, alike in all lanes, as `[n, width]`."""
    return jnp.tile(column, (1, -(-width // LANES)))[:, :width]


def lane_sums(tile: Array) -> Array:
    """`[n, m]` summed over registers only, `[n, 128]`: the rest of the sum is left for the line's end."""
    strips = [tile[:, start : start + LANES] for start in range(0, tile.shape[1], LANES)]
    return functools.reduce(operator.add, strips)
