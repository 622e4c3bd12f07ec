"""How far keys travel along a ring: the shortest two arcs that bring every device what it needs."""

import jax.numpy as jnp
import numpy as np

from dynmask_jax.array_typing import Array, Bool, Int


def shortest_arcs(needed: Bool[Array | np.ndarray, " devices"]) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Hops forward and backward, the fewest in all, that bring every device the shards it needs.

    Where several pairs are the fewest, the one with the most hops forward.

    Args:
      needed: whether any device needs the shard of the device so many steps before it. A JAX array, which may
        be traced, or a NumPy array, whose result is NumPy's.

    >>> [int(hops) for hops in shortest_arcs(jnp.array([True, True, False, False, False, True]))]
    [1, 1]
    """
    xp = np if isinstance(needed, np.ndarray) else jnp
    n = needed.shape[0]
    distance = xp.arange(n, dtype=xp.int32)
    # behind[a]: the hops backward that are left to do after a hops forward.
    farther = xp.where(needed[None, :] & (distance[None, :] > distance[:, None]), n - distance[None, :], 0)
    behind = farther.max(axis=1)
    total = distance + behind
    ahead = xp.where(total == total.min(), distance, 0).max()
    return ahead, behind[ahead]
