"""What each strategy of context parallelism moves, and an estimate of the time that it takes.

The model of a strategy is what `context_parallel` does:

- ring: keys and values travel in two arcs, `ahead` hops forward and `behind` hops backward, and every
  visit is computed while the next is on its way. In the backward pass float32 gradients travel with
  them, and then home in one transfer for each arc. Devices go in lock step, so a visit takes as long as
  its slowest device: the critical path.
- all_gather: all keys and values are gathered, then attended to; gradients are reduced and scattered.
- ulysses: heads are spread instead of tokens, by an all-to-all of q, k, v before and of the output after.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from dynmask_jax.machines import BACKWARD, FORWARD, TOKEN_BYTES, Heads, Machine

STRATEGIES = ("ring", "all_gather", "ulysses")


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

    def seconds(self, operations: int) -> float:
        """To compute a block in all heads, forward or backward."""
        flops = self.pairs * self.heads.query * self.heads.dim * operations
        return flops / (self.machine.flops * self.machine.share)

    @property
    def shard(self) -> int:
        """Bytes of one device's keys and values, with their tokens."""
        return 2 * self.heads.bytes(self.tokens, self.heads.key) + TOKEN_BYTES * self.tokens

    @property
    def gradients(self) -> int:
        """Bytes of one device's dk and dv in float32."""
        return 2 * self.heads.bytes(self.tokens, self.heads.key, dtype=jnp.float32)


@dataclass(frozen=True)
class Cost:
    """What a strategy costs in one layer, forward and backward.

    Attributes:
      work: `[N]`, blocks that each device computes.
      critical: blocks on the critical path: of the slowest device at every point where all must wait.
      ahead, behind: hops of the ring's two arcs; 0 for others.
      bytes: that each device sends.
      held: bytes of other devices' keys, values and their gradients that a device holds at once.
      seconds: the estimate.
    """

    work: np.ndarray
    critical: float
    ahead: int
    behind: int
    bytes: int
    held: int
    seconds: float


def cost(strategy: str, attended: Attended) -> Cost | None:
    """What the strategy costs; None where it cannot be: ulysses needs heads for every device."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(map(repr, STRATEGIES))}, got {strategy!r}")
    return {"ring": _ring, "all_gather": _all_gather, "ulysses": _ulysses}[strategy](attended)


def arcs(needed: np.ndarray) -> tuple[int, int]:
    """Hops ahead and behind, the fewest in all that bring every device the keys it needs.

    Args:
      needed: `[N, N]`, whether device i needs keys of device j. They are (i − j) mod N hops ahead.

    Where several do, the two that are closest to each other: the arcs travel at the same time.
    """
    n = needed.shape[0]
    distances = sorted({int(i - j) % n for i, j in zip(*np.nonzero(needed), strict=True)} | {0})
    ends = [*distances[1:], n]
    pairs = [(ahead, n - end) for ahead, end in zip(distances, ends, strict=True)]
    return min(pairs, key=lambda pair: (sum(pair), abs(pair[0] - pair[1]), -pair[0]))


def _ring(a: Attended) -> Cost:
    ahead, behind = arcs(a.work > 0)
    rounds = _rounds(a.work, ahead, behind)
    crowded = [1 + (a.machine.switched and hop <= min(ahead, behind)) for hop in range(1, len(rounds))]
    sent = {FORWARD: a.shard, BACKWARD: a.shard + a.gradients}
    seconds = 0.0
    for way, each in sent.items():
        transfers = [share * each / a.machine.link for share in crowded]
        seconds += _lock_step(rounds * a.seconds(way), transfers)
    home = a.gradients * ((ahead > 0) + (behind > 0))
    return Cost(
        work=a.work.sum(axis=1),
        critical=_lock_step(rounds, [0.0] * (len(rounds) - 1)),
        ahead=ahead,
        behind=behind,
        bytes=(ahead + behind) * sum(sent.values()) + home,
        # In each arc, the keys at work and those on their way.
        held=2 * ((ahead > 0) + (behind > 0)) * (a.shard + a.gradients),
        seconds=seconds + _home(a, ahead, behind),
    )


def _rounds(work: np.ndarray, ahead: int, behind: int) -> np.ndarray:
    """`[rounds, N]`: what each device computes between two hops, of the keys that both arcs brought."""
    n = work.shape[0]
    device = np.arange(n)
    rounds = np.zeros((1 + max(ahead, behind), n))
    for hop in range(ahead + 1):
        rounds[hop] += work[device, (device - hop) % n]
    for hop in range(1, behind + 1):
        rounds[hop] += work[device, (device + hop) % n]
    return rounds


def _lock_step(rounds: np.ndarray, transfers: list[float]) -> float:
    """When the last device ends. A round begins where the one before is computed and its keys are there.

    They are there a transfer after both the device and its neighbours began the round before: a device
    may run ahead of its neighbour by one round, of the next by two.
    """
    begin = np.zeros(rounds.shape[1])
    for work, transfer in zip(rounds[:-1], transfers, strict=True):
        arrived = np.maximum(begin, np.maximum(np.roll(begin, 1), np.roll(begin, -1))) + transfer
        begin = np.maximum(begin + work, arrived)
    return float((begin + rounds[-1]).max())


def _home(a: Attended, ahead: int, behind: int) -> float:
    """Gradients return in one transfer: over a torus it passes every link on the way."""
    if a.machine.switched:
        return a.gradients * ((ahead > 0) + (behind > 0)) / a.machine.link
    return a.gradients * max(ahead, behind) / a.machine.link


def _all_gather(a: Attended) -> Cost:
    others = a.devices - 1
    sent = others * (2 * a.shard + a.gradients)
    held = others * (a.shard + a.gradients)
    return _at_once(a, sent, held, sent / (a.machine.link * (1 if a.machine.switched else 2)))


def _ulysses(a: Attended) -> Cost | None:
    n, heads = a.devices, a.heads
    if heads.query % n or (heads.key % n and n % heads.key):
        return None
    key_heads = max(heads.key, n)  # fewer than devices: each is sent to all that share it
    moved = 2 * heads.bytes(a.tokens, heads.query) + 2 * heads.bytes(a.tokens, key_heads)
    sent = 2 * moved * (n - 1) // n + TOKEN_BYTES * a.tokens * (n - 1)
    # On a ring a message passes a quarter of the devices, over links both ways.
    passed = sent if a.machine.switched else sent * n / 8
    even = Attended(np.full((n, n), a.work.sum() / n**2), a.pairs, a.tokens, heads, a.machine)
    return _at_once(even, sent, moved, passed / a.machine.link)


def _at_once(a: Attended, sent: int, held: int, transfer: float) -> Cost:
    """All is there before the first block: nothing overlaps."""
    work = a.work.sum(axis=1)
    most = float(work.max())
    seconds = transfer + most * (a.seconds(FORWARD) + a.seconds(BACKWARD))
    return Cost(work, most, ahead=0, behind=0, bytes=sent, held=held, seconds=seconds)
