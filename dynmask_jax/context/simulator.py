"""The simulator: how evenly a layout spreads a mask's work over devices, and what must travel for it.

It computes no attention. A plan of the laid-out tokens says which blocks each device would compute of
the keys of each other; from that follow the work of each device, the hops of the ring, the bytes sent
and an estimate of the time. A block that is tested costs what a full one does, within 4% in the TPU
compiler's own schedules (docs/benchmarks.md).
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from dynmask_jax.array_typing import Array, Int
from dynmask_jax.block_codes import SKIP
from dynmask_jax.context.costs import Attended, Cost, cost
from dynmask_jax.context.layouts import LAYOUTS, check_length, default_stripe, fits, lay_out, layout_order
from dynmask_jax.context.machines import V5P, Heads, Machine
from dynmask_jax.curricula import Curriculum
from dynmask_jax.find_codes import blocks_of
from dynmask_jax.mask_algebra import Mask
from dynmask_jax.partitioning import STRATEGIES
from dynmask_jax.plans import plan
from dynmask_jax.tokens import Tokens

EVEN = 1.15
"""The greatest work of a device, over the mean, that a pick has where a layout reaches it."""
ALIKE = 1.05
"""Estimates of time that are this close are no reason to send more: they are not better than that."""


@dataclass(frozen=True)
class Choice:
    """A layout with a strategy, and what they cost in one layer, forward and backward.

    Attributes:
      layout: one of `LAYOUTS`.
      stripe: tokens in a stripe of "striped"; group: devices among which "dealt" deals.
      strategy: one of `STRATEGIES`.
      cost: work by device, critical path, hops, bytes, seconds.
      order: `[T]` int32, the layout as `layout_order` gives it.
    """

    layout: str
    stripe: int | None
    group: int | None
    strategy: str
    cost: Cost
    order: np.ndarray = field(repr=False)

    @property
    def name(self) -> str:
        """The layout with the size that it was tried in: "striped by 512"."""
        size = self.stripe or self.group
        return f"{self.layout} by {size:,}" if size else self.layout

    @property
    def imbalance(self) -> float:
        """The work of the device that has most, over the mean: 1 is even."""
        mean = self.cost.work.mean()
        return float(self.cost.work.max() / mean) if mean else 1.0

    @property
    def hops(self) -> int:
        """Of the ring, in both arcs."""
        return self.cost.ahead + self.cost.behind


@dataclass(frozen=True)
class Balance:
    """Every layout with every strategy, for one mask. Made by `balance`; `print` shows the table.

    Attributes:
      choices: in the order of simplicity.
      devices: how many the row is split over.
      machine: what times are estimated for.
    """

    choices: tuple[Choice, ...]
    devices: int
    machine: Machine

    @property
    def pick(self) -> Choice:
        """The fastest of those that are even.

        Of the choices whose most laden device has at most 1.15 of the mean (of the most even ones, where
        none is) the fastest by the estimate; of those within 5% of it the one that sends and holds
        least; of those the simplest. Evenness goes first because it is counted and time is estimated.
        """
        bound = max(EVEN, min(choice.imbalance for choice in self.choices))
        even = [choice for choice in self.choices if choice.imbalance <= bound]
        fastest = min(choice.cost.seconds for choice in even)
        alike = (choice for choice in even if choice.cost.seconds <= ALIKE * fastest)
        return min(alike, key=lambda choice: choice.cost.bytes + choice.cost.held)

    @property
    def fastest(self) -> Choice:
        """By the estimate alone, however uneven."""
        return min(self.choices, key=lambda choice: choice.cost.seconds)

    def best(self, layout: str, strategy: str = "ring") -> Choice:
        """The pick among the choices of one layout and one strategy.

        Raises:
          ValueError: there is none.
        """
        found = tuple(c for c in self.choices if (c.layout, c.strategy) == (layout, strategy))
        if not found:
            raise ValueError(f"no choice of layout {layout!r} and strategy {strategy!r} was simulated")
        return Balance(found, self.devices, self.machine).pick

    def __str__(self) -> str:
        return _text(self)


def balance(
    mask: Mask,
    tokens: Tokens | int,
    devices: int,
    *,
    block: int = 512,
    heads: Heads = Heads(),
    machine: Machine = V5P,
    layouts: Sequence[str] | None = None,
    strategies: Sequence[str] = STRATEGIES,
) -> Balance:
    """What each layout and strategy would cost on these devices.

    Args:
      mask: any mask; a curriculum's at one step.
      tokens: of a row, `[T]`, or of the rows of a device, `[R, T]`; a number T is one document.
      devices: how many each row is split over.
      block: tokens in a block of queries and of keys.
      heads: the shape of the layer.
      machine: whose times are estimated.
      layouts: of `LAYOUTS`; by default all that the length can be cut into.
      strategies: of `STRATEGIES`; one that cannot be is left out: ulysses needs query and key
        heads in multiples of the devices.

    Raises:
      TypeError: a machine that is no `Machine`.
      ValueError: no devices; a length that devices, or a layout that is named, do not divide; nothing to
        choose from.

    >>> print(balance(Causal() & Window(8192), 65536, 8, layouts=["contiguous", "zigzag"]))
    8 devices, TPU v5p: one layer, forward and backward
    layout               strategy   max/mean critical  hops       sent   estimate
    contiguous           ring           1.07     1.07  1+0      96 MiB   18.49 ms <
    contiguous           all_gather     1.07     1.07  0+0     896 MiB   22.51 ms
    contiguous           ulysses        1.00     1.00  0+0     282 MiB   19.66 ms
    zigzag               ring           1.07     1.32  2+2     512 MiB   26.04 ms
    zigzag               all_gather     1.07     1.07  0+0     896 MiB   22.51 ms
    zigzag               ulysses        1.00     1.00  0+0     282 MiB   19.66 ms
    """
    if devices < 1:
        raise ValueError(f"devices must be at least 1, got {devices}")
    if not isinstance(machine, Machine):
        raise TypeError(f"machine must be a Machine, as dynmask_jax.V5E, got {machine!r}")
    tokens = Tokens.sequence(tokens) if isinstance(tokens, int) else tokens
    length = tokens.shape[-1]
    if layouts is None:
        layouts = [name for name in LAYOUTS if fits(name, length, devices)] or LAYOUTS[:1]
    for layout in layouts:
        check_length(layout, length, devices)
    block = min(block, length // devices)
    rows = 1 if len(tokens.shape) == 1 else tokens.shape[0]
    work_of = _Work(mask, tokens, devices, block)
    choices = []
    for layout, options in _tried(work_of, layouts):
        order = layout_order(layout, length, devices, **options)
        attended = Attended(work_of(order), block**2, rows * length // devices, heads, machine)
        costs = {strategy: cost(strategy, attended) for strategy in strategies}
        stripe, group = options.get("stripe"), options.get("group")
        choices += [Choice(layout, stripe, group, s, c, order) for s, c in costs.items() if c is not None]
    if not choices:
        raise ValueError(f"nothing to choose from: {', '.join(strategies)} cannot be on {devices} devices")
    return Balance(tuple(choices), devices, machine)


def balances(curriculum: Curriculum, steps: Iterable[int], *args, **options) -> dict[int, Balance]:
    """`balance` of a curriculum's mask at each of the steps; arguments are those of `balance`."""
    return {step: balance(curriculum(step), *args, **options) for step in steps}


def _tried(work_of: "_Work", layouts: Sequence[str]) -> Iterator[tuple[str, dict]]:
    """Every layout with the options of `layout_order` that are tried.

    Stripes are tried from a block's size on, twice as large each time, down to four for each device
    (two are zigzag): fewer keep keys near the queries that see them, more share the work more evenly.
    Groups are tried from all devices down, half as large each time.
    """
    devices, finest = work_of.devices, work_of.stripe
    for layout in layouts:
        if layout == "striped":
            stripes = work_of.tokens.shape[-1] // devices // finest
            sizes = [finest * n for n in _powers(stripes) if 4 * n <= stripes or n == 1]
            yield from (("striped", {"stripe": size}) for size in sizes)
        elif layout == "dealt":
            groups = [devices // n for n in _powers(devices)]
            work = work_of.stripes()
            yield from (("dealt", {"work": work, "group": n}) for n in groups if n > 1 or devices == 1)
        else:
            yield layout, {}


def _powers(n: int) -> list[int]:
    """The powers of two that divide n: 1, 2, 4, …."""
    return [2**power for power in range(n.bit_length()) if n % 2**power == 0]


class _Work:
    """`work_of(order)`: `[N, N]`, the blocks that device i computes of the keys of device j, over all rows.

    Layouts that move whole blocks, which are most, are counted from one plan of the row in its own order.
    """

    def __init__(self, mask: Mask, tokens: Tokens, devices: int, block: int):
        self.mask, self.tokens, self.devices, self.block = mask, tokens, devices, block
        self.stripe = default_stripe(tokens.shape[-1], devices, most=block)

    def __call__(self, order: np.ndarray) -> np.ndarray:
        if (blocks := _whole_blocks(order, self.devices, self.block)) is None:
            return np.asarray(_work(self.mask, self.tokens, order, devices=self.devices, block=self.block))
        by_device = self.active[blocks].reshape(self.devices, -1, blocks.size).sum(axis=1)
        return by_device[:, blocks].reshape(self.devices, self.devices, -1).sum(axis=2)

    def stripes(self) -> np.ndarray:
        """Blocks of keys that each stripe of queries computes."""
        if self.stripe == self.block:
            return self.active.sum(axis=1)
        codes = plan(self.mask, self.tokens, block_q=self.stripe, block_k=self.block).codes
        return np.asarray((codes != SKIP).sum(axis=(0, 2)))

    @functools.cached_property
    def active(self) -> np.ndarray:
        """`[Tb, Sb]`, in how many rows a block is computed, the row in its own order."""
        codes = plan(self.mask, self.tokens, block_q=self.block, block_k=self.block).codes
        return np.asarray((codes != SKIP).sum(axis=0), np.int32)


def _whole_blocks(order: np.ndarray, devices: int, block: int) -> np.ndarray | None:
    """Which block goes where, or None where some are cut."""
    if order.size // devices % block:
        return None
    runs = order.reshape(-1, block)
    whole = (runs[:, :1] % block == 0).all() and (runs == runs[:, :1] + np.arange(block)).all()
    return runs[:, 0] // block if whole else None


@functools.partial(jax.jit, static_argnames=("devices", "block"))
def _work(mask, tokens: Tokens, order: Int[Array, " T"], *, devices: int, block: int) -> Int[Array, "N N"]:
    """The same for any order: a plan of the laid-out tokens, each device's share in blocks of its own."""
    laid_out = lay_out(tokens, order)

    def shares(field):
        """Each filled up to whole blocks by its last token, which widens no block's span."""
        share = field.reshape(-1, field.shape[-1] // devices)
        return blocks_of(share, block).reshape(*field.shape[:-1], -1)

    codes = plan(mask, jax.tree.map(shares, laid_out), block_q=block, block_k=block).codes
    each = codes.shape[1] // devices
    return (codes != SKIP).reshape(-1, devices, each, devices, each).sum(axis=(0, 2, 4))


def _text(found: Balance) -> str:
    pick = found.pick
    lines = [
        f"{found.devices} devices, {found.machine.name}: one layer, forward and backward",
        f"{'layout':20} {'strategy':10} max/mean critical  hops       sent   estimate",
    ]
    return "\n".join([*lines, *(_line(choice) + " <" * (choice is pick) for choice in found.choices)])


def _line(choice: Choice) -> str:
    cost = choice.cost
    critical = cost.critical / max(cost.work.mean(), 1e-9)
    return (
        f"{choice.name:20} {choice.strategy:10} {choice.imbalance:8.2f} {critical:8.2f} "
        f"{cost.ahead:2}+{cost.behind:<2} {cost.bytes / 2**20:6,.0f} MiB {1e3 * cost.seconds:7.2f} ms"
    )
