"""What each strategy of context parallelism moves, and an estimate of the time that it takes.

The model of each is what `context_parallel` does:

- ring: keys and values travel in two arcs, `ahead` hops forward and then `behind` hops backward, each
  hop while the shard that came before is attended to. The backward pass brings the shards home from
  where the forward pass left them, and the gradients of their keys a hop behind, in float32: of each arc
  the first hop of keys and the last of gradients are waited for, and an arc of one hop moves no keys.
- all_gather: all keys and values are gathered, before either pass; gradients are summed and scattered.
- ulysses: heads are sharded instead of tokens, by an all-to-all of q, k, v before and of the output and
  its lse after; query heads and key heads must be multiples of the devices.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from dynmask_jax.context.arcs import shortest_arcs
from dynmask_jax.context.machines import BACKWARD, FORWARD, Heads, Machine, Pass
from dynmask_jax.partitioning import STRATEGIES


@dataclass(frozen=True)
class Attended:
    """One layer's attention over devices, as a layout spreads it.

    Attributes:
      work: `[N, N]`, blocks that device i computes of the keys of device j.
      pairs: query-key pairs in a block.
      tokens: of a device, over all rows.
      heads, machine: what they are weighed with.
    """

    work: np.ndarray
    pairs: int
    tokens: int
    heads: Heads
    machine: Machine

    @property
    def devices(self) -> int:
        """How many."""
        return self.work.shape[0]

    def seconds(self, each: Pass) -> float:
        """To compute a block in all heads, forward or backward."""
        return self.pairs * self.heads.flops(each) / (self.machine.flops * self.machine.share)

    @property
    def shard(self) -> int:
        """Bytes of one device's keys and values."""
        return self.heads.bytes(self.tokens, self.heads.key)

    @property
    def gradients(self) -> int:
        """Bytes of one device's dk and dv in float32."""
        return self.heads.bytes(self.tokens, self.heads.key, dtype=jnp.float32)


@dataclass(frozen=True)
class Cost:
    """What a strategy costs in one layer, forward and backward.

    Attributes:
      work: `[N]`, blocks that each device computes.
      critical: blocks on the critical path of a ring, whose devices wait for one another; of others the
        greatest work.
      ahead, behind: hops of the ring's two arcs; 0 for others.
      forward_bytes, backward_bytes: that each device sends.
      held: bytes of other devices' keys, values and their gradients that a device holds at once.
      seconds: the estimate.
    """

    work: np.ndarray
    critical: float
    ahead: int
    behind: int
    forward_bytes: int
    backward_bytes: int
    held: int
    seconds: float

    @property
    def bytes(self) -> int:
        """That each device sends in both passes."""
        return self.forward_bytes + self.backward_bytes


def cost(strategy: str, attended: Attended) -> Cost | None:
    """What the strategy costs; None where it cannot be: ulysses needs heads for every device."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(map(repr, STRATEGIES))}, got {strategy!r}")
    return {"ring": _ring, "all_gather": _all_gather, "ulysses": _ulysses}[strategy](attended)


def arcs(needed: np.ndarray) -> tuple[int, int]:
    """Hops ahead and behind, the fewest in all that bring every device the keys it needs.

    Args:
      needed: `[N, N]`, whether device i needs keys of device j: they are (i − j) mod N hops ahead.
    """
    n = needed.shape[0]
    query, key = np.nonzero(needed)
    by_distance = np.zeros(n, bool)
    by_distance[(query - key) % n] = True
    ahead, behind = shortest_arcs(by_distance)
    return int(ahead), int(behind)


def _ring(a: Attended) -> Cost:
    ahead, behind = arcs(a.work > 0)
    out = [*range(ahead + 1), *range(-1, -behind - 1, -1)]
    going = _visits(a.work, out)
    hops = np.full(len(out), a.shard / a.machine.link)
    hops[-1] = 0
    home, sent_home = _home(ahead, behind)
    bytes_home = sent_home @ [a.shard, a.gradients]
    seconds = _lock_step(going * a.seconds(FORWARD), hops)
    seconds += _lock_step(_visits(a.work, home) * a.seconds(BACKWARD), bytes_home / a.machine.link)
    return Cost(
        work=a.work.sum(axis=1),
        critical=_lock_step(going, np.zeros(len(out))),
        ahead=ahead,
        behind=behind,
        forward_bytes=(ahead + behind) * a.shard,
        backward_bytes=int(bytes_home.sum()),
        # Those at work and those on their way, and of a second arc those that wait for their turn.
        held=(2 + (ahead > 0 < behind)) * (a.shard + a.gradients),
        seconds=seconds,
    )


def _home(ahead: int, behind: int) -> tuple[list[int | None], np.ndarray]:
    """The turns of the backward pass: how far ahead the keys are that it visits, or None for no visit.

    And what is sent meanwhile, `[turns, 2]`: shards of keys and of gradients.
    """
    arcs_home = [
        [sign * hop for hop in range(hops, 0, -1)] for sign, hops in ((1, ahead), (-1, behind)) if hops
    ]
    turns: list[tuple[int | None, tuple[int, int]]] = [(0, (0, 0))]
    turns += [(farthest, (0, 0)) for farthest, *_ in arcs_home]
    for _, *nearer in arcs_home:
        if nearer:
            turns += [(None, (1, 0)), *((distance, (1, 1)) for distance in nearer)]
        turns += [(None, (0, 1))]
    distances, sent = zip(*turns, strict=True)
    return list(distances), np.array(sent)


def _visits(work: np.ndarray, distances: Sequence[int | None]) -> np.ndarray:
    """`[visits, N]`: what each device computes of the keys that many hops ahead of it, in turn."""
    device, nothing = np.arange(len(work)), np.zeros_like(work[0])
    return np.stack([nothing if d is None else work[device, (device - d) % len(work)] for d in distances])


def _lock_step(visits: np.ndarray, transfers: np.ndarray) -> float:
    """When the last device ends. A visit begins where the one before is done and its keys have come.

    They have come a transfer after both the device and its neighbours began the visit before. So a
    device may run ahead of its neighbour by one visit, and of the next one by two.
    """
    begin = np.zeros(visits.shape[1])
    for work, transfer in zip(visits, transfers, strict=True):
        arrived = np.maximum(begin, np.maximum(np.roll(begin, 1), np.roll(begin, -1))) + transfer
        begin = np.maximum(begin + work, arrived)
    return float(begin.max())


def _all_gather(a: Attended) -> Cost:
    others = a.devices - 1
    there, back = others * a.shard, others * (a.shard + a.gradients)
    lanes = 1 if a.machine.switched else 2  # round a torus both ways at once
    return _at_once(a, (there, back), back, (there + back) / (a.machine.link * lanes))


def _ulysses(a: Attended) -> Cost | None:
    n, heads = a.devices, a.heads
    if heads.query % n or heads.key % n:
        return None
    lse = 4 * a.tokens * heads.query
    moved = (heads.bytes(a.tokens, heads.query) + a.shard + lse) * (n - 1) // n
    # Round a ring a message goes over a quarter of the devices, and there are links both ways.
    passed = 2 * moved * (1 if a.machine.switched else n / 8)
    even = replace(a, work=np.full((n, n), a.work.sum() / n**2))
    return _at_once(even, (moved, moved), moved, passed / a.machine.link)


def _at_once(a: Attended, sent: tuple[int, int], held: int, transfer: float) -> Cost:
    """All is there before the first block: nothing overlaps, and nobody waits for another meanwhile."""
    work = a.work.sum(axis=1)
    most = float(work.max())
    seconds = transfer + most * (a.seconds(FORWARD) + a.seconds(BACKWARD))
    return Cost(work, most, 0, 0, *sent, held=held, seconds=seconds)
