"""A backend's forward and backward passes as one function that JAX differentiates, in O(T) memory."""

import functools
from collections.abc import Callable

import jax

from dynmask_jax.finite import bad_rows, emptied


def with_gradients(forward: Callable, gradients: Callable) -> Callable:
    """`attend(scores, q, k, v, plan) -> (out, lse)`, whose residuals are its arguments and results.

    Args:
      forward: `(scores, q, k, v, plan) -> (out, lse)`.
      gradients: `(scores, (q, k, v, plan, out, lse), (d_out, d_lse)) -> (d_q, d_k, d_v)`.

    Both take rows that are not finite for zeros; their gradients are then zeros, here.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def attend(scores, q, k, v, plan):
        return forward(scores, q, k, v, plan)

    def with_residuals(scores, q, k, v, plan):
        out, lse = forward(scores, q, k, v, plan)
        return (out, lse), (q, k, v, plan, out, lse)

    def backward(scores, saved, cotangents):
        of_arrays = zip(gradients(scores, saved, cotangents), saved[:3], strict=True)
        return *(emptied(gradient, bad_rows(x)) for gradient, x in of_arrays), None

    attend.defvjp(with_residuals, backward)
    return attend
