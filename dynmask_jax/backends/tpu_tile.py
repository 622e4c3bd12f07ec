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

from dynmask_jax.array_typing import Array, Float, Int, is_boolean, pytree
from dynmask_jax.backends.tpu_blocks import LANES
from dynmask_jax.bias_algebra import Bias, by_group, learnable, score_pairs, scored
from dynmask_jax.block_codes import FULL, TEST
from dynmask_jax.dropout import draw
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
      scale, soft_cap: as in `Scores`.
      types: the types of the numbers of mask and scores, in their structure.
      keys_first: whether the line is of keys and its columns of queries.
      filled: whether columns may be of keys that are filling, which must be hidden: their logits of 0
        can be far above all others. Filling among queries has a level of inf, and so no weights.
      of_bias: whether the kernel sums gradients of the bias.
    """

    scale: float
    soft_cap: float | None
    types: "Numbers"
    keys_first: bool
    filled: bool
    of_bias: bool

    @classmethod
    def of(cls, scores: Scores, plan: Plan, *, keys_first: bool = False, of_bias: bool = False) -> "Tile":
        """For the plan's mask and blocks."""
        filled = bool(plan.lengths[1] % plan.block_k or plan.block_k % LANES)
        types = jax.eval_shape(lambda numbers: numbers, Numbers.of(scores, plan))
        return cls(scores.scale, scores.soft_cap, types, keys_first, filled and not keys_first, of_bias)

    def capped(self, products):
        """Products of unscaled queries as logits · log2 e, without bias."""
        scale, cap = self.scale, self.soft_cap
        if cap is None:
            return products * (scale * LOG2E)
        return (cap * LOG2E) * jnp.tanh(products * (scale / cap))

    def slope(self, capped, gradients):
        """d loss / d (scaled product) from d loss / d logit."""
        cap = self.soft_cap
        return gradients if cap is None else gradients * (1.0 - jnp.square(capped / (cap * LOG2E)))

    def hide(self, logits, numbers, head, tokens):
        """The logits `[line, column]`, −inf where the mask hides the pair.

        `numbers` holds refs to scalar memory; `tokens` are the line's, each in all lanes `[n, line, 128]`,
        and the column's `[fields, column]`.
        """
        mask, line = _of_head(numbers.mask, self.types.mask, head), Tokens(tokens[0][0], tokens[0][1])

        def hidden(logits, column):
            return jnp.where(self._visible(mask, line, column), logits, -jnp.inf)

        return by_strip(hidden, logits, tokens[1])

    def biased(self, capped, numbers, head, tokens):
        """The logits · log2 e with the bias; arguments as of `hide`."""
        if self.types.bias is None:
            return capped
        bias, line = _of_head(numbers.bias, self.types.bias, head), Tokens(tokens[0][0], tokens[0][1])

        def added(capped, column):
            return capped + LOG2E * self.score(bias, line, Tokens(column[0:1], column[1:2]))

        return by_strip(added, capped, tokens[1])

    def score(self, bias: Bias, line: Tokens, column: Tokens):
        """The bias of one head on a strip, `[line, 128]`."""
        score = scored(bias, column, line) if self.keys_first else scored(bias, line, column)
        return jnp.broadcast_to(score.astype(jnp.float32), line.shape)

    def bias_gradients(self, d_logits, numbers, head, tokens):
        """Of each learnable leaf of the bias, from gradients of logits `[line, column]`: `[leaves, 128]`.

        Lines are of queries. The sum over lanes is left for later.
        """
        bias, line = _of_head(numbers.bias, self.types.bias, head), Tokens(tokens[0][0], tokens[0][1])
        leaves, rebuilt = learnable(bias)

        def of_leaf(place, column):
            """d score / d leaf, forward: a leaf is a scalar to the expression, whatever it makes of it."""

            def score(leaf):
                return self.score(rebuilt([*leaves[:place], leaf, *leaves[place + 1 :]]), line, column)

            return jax.jvp(score, leaves[place : place + 1], [jnp.ones_like(leaves[place])])[1]

        total = jnp.zeros((len(leaves), LANES), jnp.float32)
        for start in range(0, d_logits.shape[1], LANES):
            column, d_strip = tokens[1][:, start : start + LANES], d_logits[:, start : start + LANES]
            column = Tokens(column[0:1], column[1:2])
            found = [of_leaf(place, column) * d_strip for place in range(len(leaves))]
            total += jnp.concatenate([x.sum(axis=0, keepdims=True) for x in found], axis=0)
        return total

    def kept(self, pairs, numbers, words):
        """The pairs `[line, column]`, 0 where the weight is dropped.

        `words` are the line's, in all lanes `[n, line, 128]`, and the column's `[n, column]`: of the side of
        the queries two, of that of the keys one.
        """
        threshold, line = numbers.threshold[0, 0], words[0]

        def kept(pairs, column):
            of_queries, of_key = (column, line[0]) if self.keys_first else (line, column[0:1])
            first, second = (of_queries[0:1], of_queries[1:2]) if self.keys_first else (line[0], line[1])
            first, second, of_key = (jnp.broadcast_to(x, pairs.shape) for x in (first, second, of_key))
            return jnp.where(draw(first, second, of_key) >= threshold, pairs, 0.0)

        return by_strip(kept, pairs, words[1])

    def _visible(self, mask, line: Tokens, strip):
        column = Tokens(strip[0:1], strip[1:2])
        seen = evaluate(mask, column, line) if self.keys_first else evaluate(mask, line, column)
        seen = jnp.broadcast_to(seen, line.shape)
        return seen & (jnp.broadcast_to(strip[2:3], line.shape) != 0) if self.filled else seen


@pytree
class Numbers:
    """What a kernel reads of mask and scores from scalar memory.

    Attributes:
      mask, bias: their leaves are scalars or `[N]`.
      threshold: draws below it are dropped, int32; None without dropout.
      scale: what weights that are kept are multiplied by; None without dropout.
    """

    mask: Mask
    bias: Bias | None
    threshold: Int[Array, ""] | None
    scale: Float[Array, ""] | None

    @classmethod
    def of(cls, scores: Scores, plan: Plan) -> "Numbers":
        """Of one call."""
        drop = scores.dropout
        return cls(plan.mask, scores.bias, drop and drop.threshold, drop and drop.scale)


def by_strip(function, pairs, columns):
    """`function(pairs, columns)` over strips of 128 lanes, of `[line, column]` and `[n, column]`."""
    strips = [slice(start, start + LANES) for start in range(0, pairs.shape[1], LANES)]
    return jnp.concatenate([function(pairs[:, strip], columns[:, strip]) for strip in strips], axis=1)


_LOOKUPS = {"gather", "dynamic_slice", "dynamic_update_slice", "scatter", "sort", "while", "scan"}


def check_kernel_mask(mask: Mask):
    """Refuses a mask that a kernel cannot compute.

    Raises:
      Unsupported: its function closes over an array or looks things up in one, or a leaf is of a type
        that scalar memory does not hold.
    """
    _check_kernel_function(mask, visible_pairs)


def _check_kernel_function(mask: Mask | Bias, function):
    for leaf in jax.tree.leaves(mask):
        kind = jax.typeof(leaf) if hasattr(leaf, "dtype") else jax.typeof(jnp.asarray(leaf))
        # Under x64 a Python number is traced with 64 bits, which it does not need.
        if kind.dtype not in (jnp.bool_, jnp.int32, jnp.uint32, jnp.float32) and not kind.weak_type:
            raise Unsupported(
                f"backend 'tpu': {mask!r} has a leaf of {kind.dtype}; a kernel takes bool, int32, uint32 and "
                "float32"
            )
    tokens = Tokens.sequence(2)
    traced = jax.make_jaxpr(function)(mask, tokens, tokens)
    if traced.consts:
        owner = "BiasFunction" if isinstance(mask, Bias) else "Predicate"
        shapes = ", ".join(f"{x.dtype}{list(x.shape)}" for x in traced.consts)
        raise Unsupported(
            f"backend 'tpu': {mask!r} closes over an array ({shapes}), which a kernel cannot reach; give a "
            f"number as a parameter, {owner}(function, number), or take backend 'xla'"
        )
    if lookups := _LOOKUPS & _operations(traced.jaxpr):
        raise Unsupported(
            f"backend 'tpu': {mask!r} uses {', '.join(sorted(lookups))}, which a kernel cannot; take backend "
            "'xla'"
        )


def check_kernel_bias(bias: Bias | None):
    """Refuses a bias that a kernel cannot compute.

    Raises:
      Unsupported: it looks numbers up in a table, closes over an array, or has leaves of other types.
    """
    if bias is None:
        return
    if any(jnp.ndim(leaf) > 1 for leaf in jax.tree.leaves(bias)):
        raise Unsupported(
            f"backend 'tpu': {bias!r} has a table, which a kernel cannot read; take backend 'xla'"
        )

    def pairs(bias, q, k):
        heads = next((jnp.shape(leaf)[0] for leaf in jax.tree.leaves(bias) if jnp.ndim(leaf)), 1)
        return by_group(bias, lambda one_head: score_pairs(one_head, q, k), heads, 1)

    _check_kernel_function(bias, pairs)


def _operations(jaxpr) -> set[str]:
    """The names of all operations in a traced function, in what it calls too."""
    names = set()
    for equation in jaxpr.eqns:
        names.add(equation.primitive.name)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            names |= _operations(inner) if hasattr(inner, "eqns") else set()
    return names


def _of_head(mask, types, head):
    def leaf(ref, kind):
        value = ref[0, head if kind.shape else 0]
        if is_boolean(kind):
            return value != 0
        # Python's float, where x64 is on, is float64 outside; scalar memory holds 32 bits.
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


def keep_rows(kept, rows, places: tuple[int, ...] = (0, 1)):
    """At a line's first block: rows of it, such as position and segment, upright, for as long as it lasts."""
    for at, row in enumerate(places):
        kept[at] = in_lanes(rows[row : row + 1])


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
