"""What a kernel can compute of masks and biases: refused by name before it is built."""

import jax
import jax.numpy as jnp

from dynmask_jax.bias_algebra import Bias, by_group, score_pairs
from dynmask_jax.errors import Unsupported
from dynmask_jax.fields_read import equations_in
from dynmask_jax.mask_algebra import Mask, visible_pairs
from dynmask_jax.tokens import Tokens

REMEDIES = {"tpu": "xla", "gpu": "xla_wide"}
"""backend -> the one that computes what its kernels cannot."""
_LOOKUPS = {"gather", "dynamic_slice", "dynamic_update_slice", "scatter", "sort", "while", "scan"}


def check_kernel_mask(mask: Mask, backend: str, lowered: frozenset[str] | None = None):
    """Refuses a mask that a kernel cannot compute.

    Raises:
      Unsupported: its function closes over an array or looks things up in one, or uses an operation that is
        not among those that are `lowered`, where these are given; or a leaf is of a type that a kernel's
        memory does not hold.
    """
    _check_function(mask, visible_pairs, backend, lowered)


def _check_function(mask: Mask | Bias, function, backend: str, lowered: frozenset[str] | None):
    for leaf in jax.tree.leaves(mask):
        kind = jax.typeof(leaf) if hasattr(leaf, "dtype") else jax.typeof(jnp.asarray(leaf))
        # Under x64 a Python number is traced with 64 bits, which it does not need.
        if kind.dtype not in (jnp.bool_, jnp.int32, jnp.uint32, jnp.float32) and not kind.weak_type:
            raise Unsupported(
                f"backend {backend!r}: {mask!r} has a leaf of {kind.dtype}; a kernel takes bool, int32, "
                "uint32 and float32"
            )
    tokens = Tokens.sequence(2)
    traced = jax.make_jaxpr(function)(mask, tokens, tokens)
    if traced.consts:
        owner = "BiasFunction" if isinstance(mask, Bias) else "Predicate"
        shapes = ", ".join(f"{x.dtype}{list(x.shape)}" for x in traced.consts)
        raise Unsupported(
            f"backend {backend!r}: {mask!r} closes over an array ({shapes}), which a kernel cannot reach; "
            f"give a number as a parameter, {owner}(function, number), or take backend {REMEDIES[backend]!r}"
        )
    used = {each.primitive.name for each in equations_in(traced.jaxpr)}
    if impossible := used & _LOOKUPS if lowered is None else used - lowered:
        raise Unsupported(
            f"backend {backend!r}: {mask!r} uses {', '.join(sorted(impossible))}, which a kernel cannot; "
            f"take backend {REMEDIES[backend]!r}"
        )


def check_kernel_bias(bias: Bias | None, backend: str, lowered: frozenset[str] | None = None):
    """Refuses a bias that a kernel cannot compute.

    Raises:
      Unsupported: it looks numbers up in a table, closes over an array, uses another operation that a kernel
        cannot, or has leaves of other types.
    """
    if bias is None:
        return
    if any(jnp.ndim(leaf) > 1 for leaf in jax.tree.leaves(bias)):
        raise Unsupported(
            f"backend {backend!r}: {bias!r} has a table, which a kernel cannot read; take backend "
            f"{REMEDIES[backend]!r}"
        )

    def pairs(bias, q, k):
        heads = next((jnp.shape(leaf)[0] for leaf in jax.tree.leaves(bias) if jnp.ndim(leaf)), 1)
        return by_group(bias, lambda one_head: score_pairs(one_head, q, k), heads, 1)

    _check_function(bias, pairs, backend, lowered)
