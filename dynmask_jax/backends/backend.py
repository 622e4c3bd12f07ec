"""What a backend is: a forward and a backward pass, and from them attention that JAX differentiates."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax

from dynmask_jax.array_typing import Array, Float
from dynmask_jax.finite import bad_rows, emptied, finite_rows
from dynmask_jax.plans import Plan
from dynmask_jax.scores import Scores


def as_they_are(rows: Array) -> Array:
    """Rows as they came, for a backend that looks for bad ones where it copies a block anyway."""
    return rows


def as_summed(scores: Scores, gradients: tuple, saved: tuple) -> tuple:
    """Gradients in the types of their arrays, for a backend that sums them in their shapes."""
    del scores
    *found, d_bias = gradients
    return *(x.astype(of.dtype) for x, of in zip(found, saved[:3], strict=True)), d_bias


@dataclass(frozen=True)
class Backend:
    """What computes attention on one device.

    Rows that are not finite are taken for zeros, and their gradients are zeros; but see `marks_bad`.

    Attributes:
      forward: `(scores, q, k, v, plan) -> (out, lse)`.
      sums: `(scores, (q, k, v, plan, out, lse), (d_out, d_lse)) -> (d_q, d_k, d_v, d_bias)`, the last a
        list as of `bias_algebra.learnable`, the others laid out as the backend sums them. The keys may be a
        part of those that out and lse are about: these are then the part's shares of the gradients, and the
        shares of all parts add up to the whole.
      shaped: `(scores, (d_q, d_k, d_v, d_bias), (q, k, v, plan, out, lse))`, to such gradients in the shapes
        and types of q, k and v. Parts may be added before: whoever does copies a layout once, not for each.
      prepared: of q, k and v before either of them: how the passes take rows.
      differentiable: whether JAX differentiates the forward pass as it is, and `gradients` is for parts
        alone. Else memory is O(T): what is kept is q, k, v, out and lse.
      marks_bad: whether out and lse of a query that sees a key or value that is not finite are NaN already,
        and the backward pass takes nothing from it. Else such queries are looked for afterwards.
      check_vma: whether `jax.shard_map` may check which mesh axes its arrays vary over. JAX's interpreter of
        Pallas kernels loses track of it where the list of blocks varies.
    """

    forward: Callable
    sums: Callable
    shaped: Callable = as_summed
    prepared: Callable[[Array], Array] = finite_rows
    differentiable: bool = False
    marks_bad: bool = False
    check_vma: bool = True

    def gradients(self, scores: Scores, saved: tuple, cotangents: tuple) -> tuple:
        """`(d_q, d_k, d_v, d_bias)` from `(q, k, v, plan, out, lse)` and `(d_out, d_lse)`."""
        return self.shaped(scores, self.sums(scores, saved, cotangents), saved)

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K V"],
        plan: Plan,
        scores: Scores,
    ) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
        """`(out, lse)`: attention of every query over the keys that the plan's mask shows it.

        Raises:
          Unsupported: this backend cannot do it.
        """
        if self.differentiable:
            return _forward(self, scores, q, k, v, plan)
        return _attend(self, scores, q, k, v, plan)


def _forward(backend: Backend, scores, q, k, v, plan):
    return backend.forward(scores, *map(backend.prepared, (q, k, v)), plan)


def _with_residuals(backend: Backend, scores, q, k, v, plan):
    out, lse = _forward(backend, scores, q, k, v, plan)
    return (out, lse), (scores, q, k, v, plan, out, lse)


@functools.partial(jax.jit, static_argnums=0)  # so that the layers of a model trace it once
def _backward(backend: Backend, saved, cotangents):
    scores, *arrays, plan, out, lse = saved
    prepared = *map(backend.prepared, arrays), plan, out, lse
    *gradients, d_bias = backend.gradients(scores, prepared, cotangents)
    return scores.gradient(d_bias), *without_bad(tuple(gradients), tuple(arrays)), None


def without_bad(gradients: tuple, arrays: tuple) -> tuple:
    """Gradients of q, k and v, with zeros for the rows that are not finite."""
    return tuple(emptied(x, bad_rows(of)) for x, of in zip(gradients, arrays, strict=True))


_attend = functools.partial(jax.custom_vjp, nondiff_argnums=(0,))(_forward)
_attend.defvjp(_with_residuals, _backward)
