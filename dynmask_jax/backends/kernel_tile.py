"""What all kernels compute on a tile: products to logits, mask, bias and dropout on the tile's tokens.

A kernel traces the mask's own expression. Logits are kept in powers of two, as the hardware's exponential
is: scale and log2 e are one factor.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from dynmask_jax.array_typing import Array, Float, Int, is_boolean, pytree
from dynmask_jax.bias_algebra import Bias, learnable, scored
from dynmask_jax.dropout import draw
from dynmask_jax.mask_algebra import Mask, evaluate
from dynmask_jax.plans import Plan
from dynmask_jax.scores import Scores
from dynmask_jax.tokens import Tokens

LOG2E = math.log2(math.e)


@pytree
class Numbers:
    """What a kernel reads of mask and scores from memory.

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


@dataclasses.dataclass(frozen=True)
class Tile:
    """What is fixed for all tiles of a kernel. A tile is `[line, column]`.

    Attributes:
      scale, soft_cap: as in `Scores`.
      types: the types of the numbers of mask and scores, in their structure.
      keys_first: whether lines are of keys and columns of queries.
    """

    scale: float
    soft_cap: float | None
    types: Numbers
    keys_first: bool

    @classmethod
    def of(cls, scores: Scores, plan: Plan, *, keys_first: bool = False) -> "Tile":
        """For the plan's mask."""
        types = jax.eval_shape(lambda numbers: numbers, Numbers.of(scores, plan))
        return cls(scores.scale, scores.soft_cap, types, keys_first)

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

    def mask_of(self, numbers: Numbers, head) -> Mask:
        """The mask of one head, from refs to its leaves."""
        return _of_head(numbers.mask, self.types.mask, head)

    def bias_of(self, numbers: Numbers, head) -> Bias:
        """The bias of one head, from refs to its leaves."""
        return _of_head(numbers.bias, self.types.bias, head)

    def visible(self, mask: Mask, line: Tokens, column: Tokens, shape: tuple[int, ...]):
        """The mask of one head between tokens that broadcast to the shape."""
        seen = evaluate(mask, column, line) if self.keys_first else evaluate(mask, line, column)
        return jnp.broadcast_to(seen, shape)

    def score(self, bias: Bias, line: Tokens, column: Tokens, shape: tuple[int, ...]):
        """The bias of one head between tokens that broadcast to the shape."""
        score = scored(bias, column, line) if self.keys_first else scored(bias, line, column)
        return jnp.broadcast_to(score.astype(jnp.float32), shape)

    def score_slopes(self, bias: Bias, line: Tokens, column: Tokens, shape: tuple[int, ...]) -> list:
        """d score / d leaf of each learnable leaf, between tokens that broadcast to the shape.

        Taken forward: so a leaf is a scalar to the expression, whatever it makes of it.
        """
        leaves, rebuilt = learnable(bias)

        def of_leaf(place):
            def score(leaf):
                leaves_with = [*leaves[:place], leaf, *leaves[place + 1 :]]
                return self.score(rebuilt(leaves_with), line, column, shape)

            return jax.jvp(score, leaves[place : place + 1], [jnp.ones_like(leaves[place])])[1]

        return [of_leaf(place) for place in range(len(leaves))]

    def kept(self, pairs, threshold, line: tuple, column: tuple):
        """The pairs, 0 where the weight is dropped; of words, those of a query are two, of a key one."""
        (first, second), (of_key,) = (column, line) if self.keys_first else (line, column)
        first, second, of_key = (jnp.broadcast_to(x, pairs.shape) for x in (first, second, of_key))
        return jnp.where(draw(first, second, of_key) >= threshold, pairs, 0.0)


def _of_head(owner, types, head):
    def leaf(ref, kind):
        value = ref[0, head if kind.shape else 0]
        if is_boolean(kind):
            return value != 0
        # Python's float, where x64 is on, is float64 outside; a kernel's memory holds 32 bits.
        return value.astype(jnp.uint32) if kind.dtype == jnp.uint32 else value

    return jax.tree.map(leaf, owner, types)


def scalars(leaf) -> Array:
    """A leaf of a mask or a bias as a kernel reads it: `[1, 1]` or `[1, N]`, of 32 bits."""
    leaf = jnp.asarray(leaf)
    kind = jnp.float32 if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.int32
    return leaf.astype(kind).reshape(1, -1)


def of_shown(d_products, weights, hidden):
    """Zero where the weight is: a hidden key or value may be so great that its products overflow."""
    return jnp.where(weights > 0.0, d_products, 0.0) if hidden else d_products


def dot(a, b, a_axis: int, b_axis: int):
    """A product of matrices over one axis of each, summed in float32.

    Operands in float32 are multiplied in full precision, those of 16 bits in the one pass there is, whatever
    JAX's default is.
    """
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
