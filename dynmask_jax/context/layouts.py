"""Layouts: which tokens of a long row each device holds, as a permutation of the row.

A device holds as many tokens as any other, but not all tokens cost the same: under a causal mask the
last sees the whole row and the first itself alone. A layout evens that out. Masks read positions, so
it is nothing but a permutation of tokens, positions and segments carried along; it may change between
steps, as data.

| layout | a device holds | even for |
|---|---|---|
| contiguous | one run of the row | windows that are short beside the row |
| zigzag | a chunk from the front and its mirror image from the back | the full causal mask |
| striped | stripes dealt in turn, back and forth | whatever changes slowly along the row |
| dealt | stripes dealt by what they cost, the dearest first | any mask |

Zigzag is how Llama 3 was trained (Grattafiori et al. 2024, arXiv:2407.21783) and the default of
ring-flash-attention (Zhu 2024). Stripes are from Striped Attention (Brandon et al. 2023,
arXiv:2311.09431), whose stripes are single tokens, dealt in one direction. Ours are runs of tokens: a
block of single-token stripes spans devices times as many positions, and then no block can be skipped.
Dealing back and forth makes up for the sum that grows along each deal. Dealing by cost is the greedy
rule of Graham 1969, "Bounds on multiprocessing timing anomalies", with as many stripes for each device;
MagiAttention (Tao et al. 2025) balances a static mask by it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynmask_jax.array_typing import Array, Int

LAYOUTS = ("contiguous", "zigzag", "striped", "dealt")
MOST_IN_A_STRIPE = 512
"""Tokens of a stripe where none are said: a block's, so that blocks are skipped as in the row itself."""


def layout_order(
    layout: str, length: int, devices: int, *, stripe: int | None = None, work=None, group: int | None = None
) -> np.ndarray:
    """Which token goes where: `[length]` int32; place p of the laid-out row holds token order[p].

    Device d of the context axis holds places d·length/devices and on. `lay_out` applies an order and
    `restore` undoes it.

    Args:
      layout: one of `LAYOUTS`.
      length: tokens in a row.
      devices: how many the row is split over.
      stripe: tokens in a stripe of "striped", which must give each device whole stripes; by default
        `default_stripe`.
      work: of "dealt" alone, which needs it: what each stripe of the row costs, `[stripes]` numbers.
        `balance` finds them from a mask.
      group: of "dealt" alone: devices in a group, by default all of them. Each group holds one run of
        the row and deals it among its devices, so that keys stay near the queries that see them.

    Raises:
      ValueError: an unknown layout; a length, stripe, work or group that does not divide.
      TypeError: an argument that is of another layout.

    >>> layout_order("zigzag", 8, 2).tolist()
    [0, 1, 6, 7, 2, 3, 4, 5]
    >>> layout_order("striped", 8, 2, stripe=1).tolist()
    [0, 3, 4, 7, 1, 2, 5, 6]
    >>> layout_order("dealt", 8, 2, work=[9, 8, 1, 1]).tolist()
    [0, 1, 6, 7, 2, 3, 4, 5]
    """
    check_length(layout, length, devices)
    _check_options(layout, length // devices, {"stripe": stripe, "work": work, "group": group})
    if layout == "dealt":
        _check_deal(length, devices, work, group)
    match layout:
        case "contiguous":
            pieces = np.arange(devices)
        case "zigzag":
            pieces = _zigzag(devices)
        case "striped":
            stripe = default_stripe(length, devices) if stripe is None else stripe
            pieces = _striped(length // stripe, devices)
        case _:
            pieces = _dealt(np.asarray(work, np.float64), devices, group or devices)
    return np.arange(length, dtype=np.int32).reshape(len(pieces), -1)[pieces].reshape(-1)


def default_stripe(length: int, devices: int, *, most: int = MOST_IN_A_STRIPE) -> int:
    """Tokens in a stripe: as many as `most` allows that cut each device's share into an even number.

    Even, because a deal and the deal back are level under a causal mask. An odd share is cut into an odd
    number, of at least 3 where it can be.

    >>> [default_stripe(8 * share, 8) for share in (16_384, 512, 1_500, 9, 1)]
    [512, 256, 375, 3, 1]
    """
    share = length // devices
    halves = share // 2 if share % 2 == 0 else share
    fitting = [n for n in range(1, min(halves, most) + 1) if halves % n == 0 and n < share]
    return max(fitting, default=1)


def fits(layout: str, length: int, devices: int) -> bool:
    """Whether a row of this length can be laid out so."""
    return length % (2 * devices if layout == "zigzag" else devices) == 0


def lay_out(values: Any, order: Int[Array, " T"], *, axis: int = -1) -> Any:
    """The arrays of a pytree in the layout's order, along the axis that holds the row's tokens.

    Args:
      values: arrays, NumPy's or JAX's, each with T tokens along `axis`; `Tokens` too.
      order: from `layout_order`.
      axis: -1 for tokens, positions, segments `[B, T]`; 1 for q, k, v `[B, T, N, H]`.

    Raises:
      ValueError: an array has not T tokens along `axis`.
    """
    return jax.tree.map(lambda x: _taken(x, order, axis), values)


def restore(values: Any, order: Int[Array, " T"], *, axis: int = -1) -> Any:
    """Undoes `lay_out`: tokens in the row's own order again."""
    inverse = (jnp if isinstance(order, jax.Array) else np).argsort(order)
    return lay_out(values, inverse, axis=axis)


def _taken(x, order, axis):
    if x.shape[axis] != order.shape[0]:
        raise ValueError(f"order is of {order.shape[0]} tokens, and axis {axis} of {x.shape} is not")
    numpy = isinstance(x, np.ndarray) and not isinstance(order, jax.Array)
    return (np if numpy else jnp).take(x, order, axis=axis)


def _zigzag(devices: int) -> np.ndarray:
    front = np.arange(devices)
    return np.stack([front, 2 * devices - 1 - front], axis=1).reshape(-1)


def _striped(stripes: int, devices: int) -> np.ndarray:
    deals = np.arange(stripes).reshape(-1, devices)
    deals[1::2] = deals[1::2, ::-1].copy()
    return deals.T.reshape(-1)


def _dealt(work: np.ndarray, devices: int, group: int) -> np.ndarray:
    """Of each run of the row that a group holds, the dearest stripes first, each deal to the least laden."""
    runs = work.reshape(devices // group, -1)
    dealt = [_dealt_in_group(run, group) + n * run.size for n, run in enumerate(runs)]
    return np.concatenate(dealt).reshape(-1)


def _dealt_in_group(work: np.ndarray, devices: int) -> np.ndarray:
    """`[devices, stripes each]`: in the order of the row, which is how blocks are best skipped."""
    load = np.zeros(devices)
    held = np.empty((devices, work.size // devices), np.int64)
    for deal, stripes in enumerate(np.argsort(-work, kind="stable").reshape(-1, devices)):
        takers = np.argsort(load, kind="stable")
        held[takers, deal] = stripes
        load[takers] += work[stripes]
    return np.sort(held, axis=1)


def check_length(layout: str, length: int, devices: int):
    """Refuses what cannot be laid out.

    Raises:
      ValueError: an unknown layout, a length that does not divide, none at all.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
    if devices < 1 or length < 1:
        raise ValueError(f"length and devices must be at least 1, got {length} and {devices}")
    if not fits(layout, length, devices):
        times = "2 · " if layout == "zigzag" else ""
        raise ValueError(f"{layout}: length must be a multiple of {times}{devices} devices, got {length}")


def _check_options(layout: str, share: int, options: dict):
    taken_by = {"stripe": "striped", "work": "dealt", "group": "dealt"}
    for name, value in options.items():
        if value is not None and layout != taken_by[name]:
            raise TypeError(f"{name} is for {taken_by[name]!r} alone, got it for {layout!r}")
    stripe = options["stripe"]
    if stripe is not None and (stripe < 1 or share % stripe):
        raise ValueError(f"stripe must divide the {share} tokens of a device, got {stripe}")


def _check_deal(length: int, devices: int, work, group: int | None):
    if work is None:
        raise ValueError("dealt: work must say what each stripe of the row costs; balance() finds it")
    work = np.asarray(work)
    if work.ndim != 1 or work.size % devices or length % work.size:
        raise ValueError(
            f"work must hold one number a stripe, as many stripes for each of {devices} devices and as many "
            f"of {length} tokens in each; got shape {work.shape}"
        )
    if group is not None and (group < 1 or devices % group):
        raise ValueError(f"group must divide the {devices} devices, got {group}")
