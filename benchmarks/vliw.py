"""Reads the final schedule of one Pallas TPU kernel: what a grid step costs, path by path.

The TPU compiler schedules a kernel into VLIW bundles. Each unit (MXU, VALU, EUP, XLU, load and store
slots) either has work in a bundle or has not, and a bundle takes one cycle. Its dumps say, per kernel:

- `packed-bundles-post-ra`: every bundle at its address, waits written out as empty bundles, so that
  addresses count cycles; branches name the bundle they go to;
- `pre-delay_hlo-static-per-bundle-utilization`: units in use, one row per address of the above;
- `final_bundles`: the same program after waits were folded into the bundles before them.

Branches cut the program into blocks, blocks form the control flow, and a step's cost is the sum over the
blocks it runs. Not counted, because no schedule knows them: waits for DMA, and what a conflict stalls.
"""

import bisect
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

_BUNDLE = re.compile(r"^ *(0x[0-9a-f]+|0) +(?:[A-Z]{2})? *:[ >]*\{")
_EMPTY = re.compile(_BUNDLE.pattern + r" *\}")
_BRANCH = re.compile(r"sbr\.rel *(\([^)]*\))? *target bundleno = (\d+)")
_END = re.compile(r"\bEnd region \d+")
_MOST_DELAY_SLOTS = 8


@dataclass(frozen=True)
class Block:
    """Bundles `first` to `last` inclusive: entered at the first, left after the last.

    `successors` are indices of blocks; one at or before this block closes a loop, run `trips` times
    (None where the bound is known only at run time). `compares` counts vector comparisons.
    """

    first: int
    last: int
    successors: tuple[int, ...]
    trips: int | None
    compares: int

    @property
    def bundles(self) -> int:
        return self.last - self.first + 1


def blocks_of(text: str) -> tuple[Block, ...]:
    """The control flow of a `packed-bundles-post-ra` dump, blocks in program order.

    Raises ValueError where the text holds no bundles or its branches do not fit together.
    """
    bundles = _bundles(text)
    branches = {
        at: (int(address), predicate)
        for at, bundle in enumerate(bundles)
        for predicate, address in _BRANCH.findall(bundle)
    }
    delay = _delay_slots(bundles, branches)
    ends = {at + delay: branch for at, branch in branches.items()}
    firsts = sorted({0, *(end + 1 for end in ends), *(target for target, _ in branches.values())})
    firsts = [first for first in firsts if first < len(bundles)]
    index = {first: number for number, first in enumerate(firsts)}
    blocks = []
    for first, after in zip(firsts, [*firsts[1:], len(bundles)], strict=True):
        target, predicate = ends.get(after - 1, (None, "none"))
        following = [after] if predicate and after in index else []
        jumps = [] if target is None else [target]
        loop = [] if target is None else bundles[target:after]  # empty where the branch is forward
        trips = _trips("\n".join(loop), predicate.strip("(!)"))
        compares = sum(len(re.findall(r"= vcmp\.", bundle)) for bundle in bundles[first:after])
        successors = tuple(index[at] for at in (*following, *jumps))
        blocks.append(Block(first, after - 1, successors, trips, compares))
    return tuple(blocks)


def folded(blocks: Sequence[Block], text: str, final: str) -> tuple[int, ...]:
    """Bundles of each block once waits are folded, as in the `final_bundles` dump of the same kernel.

    Folding drops empty bundles only, so the bundles with work are the same ones in the same order: they
    place each block in the final program. Raises ValueError where they are not as many.
    """
    working, kept = (
        [at for at, b in enumerate(_bundles(dump)) if not _EMPTY.match(b)] for dump in (text, final)
    )
    if len(working) != len(kept):
        raise ValueError(f"{len(working)} bundles with work became {len(kept)}")
    kept.append(len(_bundles(final)))
    starts = [kept[bisect.bisect_left(working, block.first)] for block in blocks]
    return tuple(after - start for start, after in pairwise([0, *starts[1:], kept[-1]]))


def _bundles(text: str) -> list[str]:
    """Each bundle's text (comments may run over several lines), at its address."""
    bundles: list[str] = []
    for line in text.splitlines():
        found = _BUNDLE.match(line)
        if found and int(found[1], 0) == len(bundles):
            bundles.append(line)
        elif bundles:
            bundles[-1] += "\n" + line
    if not bundles:
        raise ValueError("no bundles in the text: is it a dump of scheduled bundles?")
    return bundles


def _delay_slots(bundles: Sequence[str], branches: Collection[int]) -> int:
    """Bundles that still run after a branch: 1 on v4, 4 on v5e, v5p and v6e, 6 on tpu7x.

    The compiler ends the region of the branch's condition with them, which is where they are read from.
    """
    for delay in range(1, _MOST_DELAY_SLOTS):
        if all(at + delay < len(bundles) and _END.search(bundles[at + delay]) for at in branches):
            return delay
    raise ValueError("the branches' regions do not all end the same number of bundles after them")


def _trips(loop: str, predicate: str) -> int | None:
    """How often a loop from zero runs, by the test that leaves it; None where its bound is not a constant."""
    test = re.search(rf"{predicate} = scmp\.ge\.s32\.totalorder (%\w+), (\d+) /\* loop exit test", loop)
    step = test and re.search(rf"{test[1]} = sadd\.s32 (\d+),", loop)
    return math.ceil(int(test[2]) / int(step[1])) if test and step else None


@dataclass(frozen=True)
class Utilization:
    """Units by name: how many can be used in a bundle, and how many are, a row per bundle."""

    capacity: dict[str, int]
    rows: tuple[tuple[int, ...], ...]


def utilization_of(text: str) -> Utilization:
    """Reads a `static-per-bundle-utilization` dump."""
    lines = [line for line in text.splitlines() if line.strip()]
    names = [name.strip() for name in lines[1].split(",")]
    capacity = dict(zip(names, map(int, lines[2].split()), strict=True))
    return Utilization(capacity, tuple(tuple(map(int, line.split())) for line in lines[4:]))


@dataclass(frozen=True)
class Step:
    """One way through a grid step: what it costs, and what each unit does meanwhile.

    `cycles` counts waits, `bundles` does not; `idle_cycles` is the same step with its matmuls skipped
    (None where nothing lets it skip them). `mxu_bound` is the cycles its matmuls alone keep the MXUs busy.
    `units` are slots used over the path, `use` the share of what the path's cycles offer.
    """

    cycles: int
    bundles: int
    idle_cycles: int | None
    mxu_bound: float
    compares: int
    units: dict[str, int]
    use: dict[str, float]


@dataclass(frozen=True)
class Kernel:
    """A scheduled kernel: blocks (a bundle per cycle), their final bundles, and units in use per cycle."""

    blocks: tuple[Block, ...]
    final: tuple[int, ...]
    utilization: Utilization

    def __post_init__(self):
        if len(self.utilization.rows) != self.blocks[-1].last + 1:
            raise ValueError(
                f"{len(self.utilization.rows)} rows of utilization for {self.blocks[-1].last + 1} bundles"
            )

    def used(self, number: int) -> dict[str, int]:
        """Slots used in a block, by unit."""
        block = self.blocks[number]
        rows = self.utilization.rows[block.first : block.last + 1]
        return dict(zip(self.utilization.capacity, map(sum, zip(*rows, strict=True)), strict=True))

    def steps(self, trips: int | None = None) -> tuple[Step, ...]:
        """The cheapest step through each block of matmuls, in program order.

        Where branches exclude each other (a full block, a partial one) these are those branches' steps,
        without what only a row's first and last steps do. `trips` stands in for loops of unknown length.
        """
        matmul = {number for number in range(len(self.blocks)) if self.used(number)["MXU"]}
        first, last = self._grid_loop(matmul)
        times = self._times(first, last, trips)
        costs = [block.bundles * times[number] for number, block in enumerate(self.blocks)]
        flow = _Flow(self.blocks, costs, first, last)
        paths: dict[tuple[int, ...], None] = {}
        for number in sorted(matmul):
            paths[flow.through(number) or ()] = None
        found = []
        for path in filter(None, paths):
            guard = path[max(0, next(i for i, number in enumerate(path) if number in matmul) - 1)]
            idle = flow.through(guard, matmul)
            found.append(self._step(path, times, None if idle is None else sum(costs[n] for n in idle)))
        return tuple(found)

    def _step(self, path: Sequence[int], times: dict[int, int], idle_cycles: int | None) -> Step:
        units = dict.fromkeys(self.utilization.capacity, 0)
        for number in path:
            for unit, used in self.used(number).items():
                units[unit] += used * times[number]
        cycles = sum(self.blocks[number].bundles * times[number] for number in path)
        capacity = self.utilization.capacity
        return Step(
            cycles=cycles,
            bundles=sum(self.final[number] * times[number] for number in path),
            idle_cycles=idle_cycles,
            mxu_bound=units["MXU"] / capacity["MXU"],
            compares=sum(self.blocks[number].compares * times[number] for number in path),
            units=units,
            use={unit: used / (cycles * capacity[unit]) for unit, used in units.items()},
        )

    def _grid_loop(self, matmul: set[int]) -> tuple[int, int]:
        """First and last block of the outermost loop around the matmuls; all blocks where there is none."""
        around = [(first, last) for first, last in _loops(self.blocks) if matmul & {*range(first, last + 1)}]
        return max(around, key=lambda loop: loop[1] - loop[0], default=(0, len(self.blocks) - 1))

    def _times(self, first: int, last: int, trips: int | None) -> dict[int, int]:
        """How often each block runs in one step: the product over the loops inside the step."""
        times = dict.fromkeys(range(len(self.blocks)), 1)
        for start, stop in _loops(self.blocks):
            if first <= start and stop <= last and (start, stop) != (first, last):
                count = self.blocks[stop].trips or trips
                if count is None:
                    at = self.blocks[start].first
                    raise ValueError(f"the loop at {at:#x} has a bound known only at run time: give trips")
                times |= {number: times[number] * count for number in range(start, stop + 1)}
        return times


def _loops(blocks: Sequence[Block]) -> list[tuple[int, int]]:
    """First and last block of each loop."""
    return [
        (target, number)
        for number, block in enumerate(blocks)
        for target in block.successors
        if target <= number
    ]


class _Flow:
    """Cheapest ways from a loop's first block to its last, along forward branches."""

    def __init__(self, blocks: Sequence[Block], costs: Sequence[int], first: int, last: int):
        self.first, self.last = first, last
        self.costs = costs
        self.edges = [
            (number, following)
            for number in range(first, last + 1)
            for following in blocks[number].successors
            if number < following <= last
        ]

    def through(self, block: int, avoiding: Collection[int] = ()) -> tuple[int, ...] | None:
        """The cheapest path that runs `block` and none of `avoiding`; None where there is none."""
        before = self._path(self.first, block, avoiding)
        after = self._path(block, self.last, avoiding)
        return None if before is None or after is None else (*before, *after[1:])

    def _path(self, start: int, stop: int, avoiding: Collection[int]) -> tuple[int, ...] | None:
        best: dict[int, tuple[int, tuple[int, ...]]] = {}
        if start not in avoiding:
            best[start] = (self.costs[start], (start,))
        for number, following in self.edges:  # in program order, so each start is settled before it is left
            if number in best and following not in avoiding:
                cost, path = best[number]
                offer = (cost + self.costs[following], (*path, following))
                best[following] = min(best.get(following, offer), offer)
        return best[stop][1] if stop in best else None
