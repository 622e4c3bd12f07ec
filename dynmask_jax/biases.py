"""The catalogue of biases: what is added to each query's score of a key, as one expression over their tokens.

What a bias is, and how biases add and are read, is in `dynmask_jax.bias_algebra`.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from dynmask_jax.array_typing import Number, is_boolean, pytree, static
from dynmask_jax.bias_algebra import Bias as Bias
from dynmask_jax.bias_algebra import Sum as Sum
from dynmask_jax.bias_algebra import bias_tensor as bias_tensor
from dynmask_jax.leaves import check_function, check_whole


@pytree
class ALiBi(Bias):
    """Attention with linear biases: −slope · |q − k| (Press et al. 2021, arXiv:2108.12409).

    The paper's masks are causal; without one, keys after the query are as far as those before it.

    Args:
      slopes: of each query head, `[N]`, or one for all. `ALiBi.for_heads(N)` has the paper's.

    Raises:
      TypeError: slopes are not floating.
    """

    slopes: Number

    def __post_init__(self):
        _check_floating("ALiBi", "slopes", self.slopes)

    @classmethod
    def for_heads(cls, heads: int) -> "ALiBi":
        """With the slopes of the paper: 2^(−8/N), 2^(−16/N), …, 2^−8.

        Where N is no power of two, those of the next lower one, and then every other one of twice as many, as
        in the authors' code.

        >>> ALiBi.for_heads(4).slopes.tolist()
        [0.25, 0.0625, 0.015625, 0.00390625]
        """
        check_whole("ALiBi", "heads", heads, least=1)
        power = 2 ** int(np.log2(heads))
        slopes = [*_slopes(power), *_slopes(2 * power)[::2][: heads - power]]
        return cls(np.asarray(slopes, np.float32))

    def score(self, q, k):
        distance = abs(q.position - k.position).astype(jnp.float32)
        return -jnp.asarray(self.slopes).astype(jnp.float32) * distance


def _slopes(power: int) -> list[float]:
    return [2.0 ** (-8.0 * (head + 1) / power) for head in range(power)]


@pytree
class RelativeBuckets(Bias):
    """T5's relative position bias: a learned number for each bucket of distances (arXiv:1910.10683).

    Distances below half the buckets have one each; the others have those up to `max_distance` in logarithmic
    steps, and the last all beyond. With `bidirectional` half of the buckets are for keys after the query, as
    in an encoder; without, those keys are all in bucket 0, as in a decoder, whose mask hides them.

    Args:
      table: `[N, buckets]`, floating, or `[1, buckets]` for all heads alike. T5X's `rel_embedding` is so;
        Hugging Face's `relative_attention_bias.weight` is `[buckets, N]`: give `.T`.
      bidirectional: T5's: true in encoders, false in decoders.
      max_distance: 128 in T5.

    Raises:
      TypeError: the table is not floating, or max_distance no whole number.
      ValueError: the table has not two axes, or its buckets are too few, or odd though bidirectional; or
        max_distance is not above the distances that have a bucket each.
    """

    table: Any
    bidirectional: bool = static(default=True)
    max_distance: int = static(default=128)

    def __post_init__(self):
        _check_floating("RelativeBuckets", "table", self.table)
        if jnp.ndim(self.table) != 2:
            raise ValueError(f"RelativeBuckets: table must be [heads, buckets], got {jnp.shape(self.table)}")
        buckets, sides = jnp.shape(self.table)[1], 1 + bool(self.bidirectional)
        if buckets % sides or buckets < 2 * sides:
            raise ValueError(
                f"RelativeBuckets: table must have buckets, a multiple of {sides} and at least {2 * sides}, "
                f"got {buckets}: it is [heads, buckets], the transpose of Hugging Face's"
            )
        check_whole("RelativeBuckets", "max_distance", self.max_distance, least=buckets // sides // 2 + 1)

    def score(self, q, k):
        after, buckets = k.position - q.position, self.table.shape[0]
        if not self.bidirectional:
            return self._by_distance(buckets)[jnp.clip(-after, 0, self.max_distance)]
        limit = self.max_distance
        return self._by_distance(buckets // 2)[jnp.clip(after, -limit, limit) + limit]

    def _by_distance(self, buckets: int):
        """The numbers of all distances that differ: so a pair is a lookup, not a search for its bucket."""
        bucket = bucket_of_distances(buckets, self.max_distance)
        if self.bidirectional:
            bucket = np.concatenate([bucket[::-1], bucket[1:] + buckets])
        return self.table[jnp.asarray(bucket)]


def bucket_of_distances(buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of the distances 0 … max_distance, int32: T5's formula in float32, as its code rounds."""
    exact = buckets // 2
    distance = np.arange(max_distance + 1)
    with np.errstate(divide="ignore"):
        steps = np.log(distance.astype(np.float32) / np.float32(exact)) / np.float32(
            np.log(max_distance / exact)
        )
    far = exact + np.nan_to_num(steps * np.float32(buckets - exact), neginf=0).astype(np.int32)
    bucket = np.where(distance < exact, distance, np.minimum(far, buckets - 1))
    # Of max_distance itself the quotient is 1, whatever rounding makes of it.
    bucket[max_distance] = buckets - 1
    return bucket.astype(np.int32)


@pytree
class BiasFunction(Bias):
    """A bias of one's own, from a function of two tokens.

    Args:
      function: `(q, k, *parameters) -> number`, in `Tokens`. It is part of the bias's structure: define it
        once, not anew in each step, or each step recompiles.
      parameters: numbers and arrays it depends on, as leaves, in which attention is differentiable.

    Raises:
      TypeError: the function is not callable.
      ValueError: it closes over a traced value, which must be a parameter.

    >>> same_document = BiasFunction(lambda q, k, extra: extra * (q.segment == k.segment), 0.5)
    """

    function: Callable = static()
    parameters: tuple = ()

    def __init__(self, function: Callable, *parameters):
        check_function("BiasFunction", function)
        object.__setattr__(self, "function", function)
        object.__setattr__(self, "parameters", parameters)

    def score(self, q, k):
        return self.function(q, k, *self.parameters)

    def __repr__(self):
        name = getattr(self.function, "__name__", repr(self.function))
        return f"BiasFunction({', '.join([name, *map(repr, self.parameters)])})"


def _check_floating(owner: str, name: str, value):
    floating = isinstance(value, float) or jnp.issubdtype(getattr(value, "dtype", np.int32), jnp.floating)
    if not floating or is_boolean(value):
        given = getattr(value, "dtype", type(value).__name__)
        raise TypeError(f"{owner}: {name} must be floating, got {given}")
