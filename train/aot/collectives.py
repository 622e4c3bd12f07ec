"""The transfers between devices in a compiled program, and the work that goes on meanwhile.

No API of JAX or XLA tells what a compiled program sends, which `python -m train compile` prints. So this
file and `train.aot.hlo` read the program's text: XLA's opcodes, attributes and fusions, JAX's names of
operations, and the named scopes of `train.step` and `train.model`; `train.aot.topology` reads the compiler's
refusals. None of these is stable: where a new JAX changes them, tests/trainer/aot/test_compile.py fails.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from train.aot.hlo import Computation, Instruction, Module, bytes_of, parts

KINDS = (
    "collective-permute",
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
)
_PRODUCTS = ("dot", "convolution")
_LOOPS = ("while", "conditional", "call")
_NOTHING = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id")


@dataclass(frozen=True)
class Loop:
    """One loop around an instruction.

    Attributes:
      source: JAX's name of it.
      times: how often its body runs; None where the data decides.
    """

    source: str
    times: int | None


@dataclass(frozen=True)
class Transfer:
    """One collective of the program, as each device runs it.

    Attributes:
      kind: one of `KINDS`.
      source: JAX's name of what it came from.
      bytes: what each device sends, each time, on a ring of the devices that take part.
      devices: how many take part.
      loops: those around it, the outermost first.
      asynchronous: whether it has a start and an end of its own.
      between: what runs between these: Pallas kernels by their names, and counts of "products" (of
        matrices, alone or in a fusion), "loops" (and conditionals) and "others".
    """

    kind: str
    source: str
    bytes: int
    devices: int
    loops: tuple[Loop, ...]
    asynchronous: bool
    between: dict[str, int]

    @property
    def overlaps(self) -> bool:
        """Whether products, kernels or loops run meanwhile; elementwise work alone does not count."""
        return bool(set(self.between) - {"others"})

    @property
    def times(self) -> int:
        """How often it runs in a step, a loop that the data ends counted once."""
        count = 1
        for loop in self.loops:
            count *= loop.times or 1
        return count

    @property
    def by_data(self) -> bool:
        """Whether the data decides how often it runs, as the mask does of a ring's hops."""
        return any(loop.times is None for loop in self.loops)


def transfers(module: Module) -> list[Transfer]:
    """All transfers of a program, in the order of its text."""
    return list(_of_computation(module, module.entry, ()))


def _of_computation(module: Module, computation: Computation, loops: tuple[Loop, ...]) -> Iterator[Transfer]:
    for place, each in enumerate(computation.instructions):
        if started := _started(module, each):
            end = _end(module, computation, place, started)
            meanwhile = computation.instructions[place + 1 : end]
            yield replace(_transfer(started, loops), asynchronous=True, between=_work(module, meanwhile))
        elif each.opcode in KINDS:
            yield _transfer(each, loops)
        elif each.opcode == "fusion" and (fused := _fused(module, each)) and not _role(module, each):
            yield _transfer(fused, loops)
        elif each.opcode in _LOOPS:
            yield from _inside(module, each, loops)


def _inside(module: Module, each: Instruction, loops: tuple[Loop, ...]) -> Iterator[Transfer]:
    if each.opcode == "while":
        condition, body = (module.computations[each.called[key][0]] for key in ("condition", "body"))
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', each.attributes)
        times = int(known[1]) if known else _times(condition, body)
        yield from _of_computation(module, body, (*loops, Loop(each.source, times)))
        return
    for names in each.called.values():
        for name in names:
            yield from _of_computation(module, module.computations[name], loops)


def _times(condition: Computation, body: Computation) -> int | None:
    """How often a loop runs that counts from 0, by a constant, up to a constant."""
    compared = condition.result
    if compared.opcode != "compare" or "direction=LT" not in compared.attributes:
        return None
    count, limit = (_uncopied(condition, name) for name in compared.operands)
    place = re.search(r"index=(\d+)", count.attributes)
    if limit.opcode != "constant" or place is None or body.result.opcode != "tuple":
        return None
    raised = _uncopied(body, body.result.operands[int(place[1])])
    steps = [_uncopied(body, name) for name in raised.operands]
    sizes = [int(step.arguments) for step in steps if step.opcode == "constant"]
    return -(-int(limit.arguments) // sizes[0]) if raised.opcode == "add" and sizes else None


def _uncopied(computation: Computation, name: str) -> Instruction:
    """The instruction of that name, or what it copies from one memory to another."""
    found = computation.by_name[name]
    while found.opcode == "copy":
        found = computation.by_name[found.operands[0]]
    return found


def _started(module: Module, each: Instruction) -> Instruction | None:
    """The collective that an instruction starts: itself (`all-gather-start`), or what is wrapped in it."""
    if each.opcode.removesuffix("-start") in KINDS and each.opcode.endswith("-start"):
        return replace(each, opcode=each.opcode.removesuffix("-start"))
    if each.opcode == "async-start" or _role(module, each) == "AsyncCollectiveStart":
        return _fused(module, each)
    return None


def _end(module: Module, computation: Computation, start: int, started: Instruction) -> int:
    """The place of the instruction that waits for it."""
    name, channel = computation.instructions[start].name, _channel(started)
    for place, each in enumerate(computation.instructions[start + 1 :], start + 1):
        if name in each.operands and each.opcode.endswith("-done"):
            return place
        if _role(module, each) == "AsyncCollectiveDone":
            fused = _fused(module, each)
            if fused is not None and _channel(fused) == channel:
                return place
    raise ValueError(f"{name} in {computation.name} has a start and no end")


def _role(module: Module, each: Instruction) -> str | None:
    """What a fusion is of a transfer: XLA for TPU wraps its start and its end, and puts parts of it in the
    fusions between."""
    if each.opcode != "fusion":
        return None
    inner = list(module.within(each))
    for role in ("AsyncCollectiveStart", "AsyncCollectiveDone"):
        if any(f'custom_call_target="{role}"' in one.attributes for one in inner):
            return role
    if any("async_collective_fusion_config" in one.attributes for one in inner):
        return "part"
    return None


def _fused(module: Module, each: Instruction) -> Instruction | None:
    return next((one for one in module.within(each) if one.opcode in KINDS), None)


def _channel(each: Instruction) -> str | None:
    found = re.search(r"channel_id=(\d+)", each.attributes)
    return found[1] if found else None


def _transfer(each: Instruction, loops: tuple[Loop, ...]) -> Transfer:
    devices = _devices(each)
    return Transfer(each.opcode, each.source, _sent(each, devices), devices, loops, False, {})


def _sent(each: Instruction, devices: int) -> int:
    """Bytes that a device sends where all take part in a ring, as the text's types tell of it."""
    types = parts(each.type)
    if each.opcode == "collective-permute":
        return bytes_of(types[min(1, len(types) - 1)])  # of a start: (what goes, what comes, contexts)
    # A start's type is what goes and what comes; of a sum over all, which are alike, it is once.
    both = "-start" in each.name and each.opcode != "all-reduce"
    size = max(map(bytes_of, types)) if both else each.bytes
    if each.opcode == "reduce-scatter" and not both:
        size *= devices
    return round(size * (devices - 1) / devices * (2 if each.opcode == "all-reduce" else 1))


def _devices(each: Instruction) -> int:
    """How many devices take part in one group: of a permute all that are named."""
    text = each.attributes
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", text):
        return len(set(re.findall(r"\d+", pairs[1])))
    if grid := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", grid[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", grid[2])  # whole, or a part of one
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return listed[1].count(",") + 1
    raise ValueError(f"{each.name} names its devices in a way that is not known: {text}")


def _work(module: Module, instructions: tuple[Instruction, ...]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for each in instructions:
        if each.opcode in _NOTHING or each.opcode.endswith(("-start", "-done")) or each.opcode in KINDS:
            continue
        found[_work_of(module, each)] += 1
    return dict(found)


def _work_of(module: Module, each: Instruction) -> str:
    if 'custom_call_target="tpu_custom_call"' in each.attributes:
        return re.sub(r"(\.\d+)+$", "", each.name)
    if re.search(r'custom_call_target="(__gpu\$xla\.gpu\.triton|mosaic_gpu\w*)"', each.attributes):
        return each.source.split("/")[-2]  # the last is the operation that JAX calls a kernel by
    if each.opcode in _LOOPS:
        return "loops"
    if each.opcode in _PRODUCTS or any(one.opcode in _PRODUCTS for one in module.within(each)):
        return "products"
    return "others"


@dataclass(frozen=True)
class TransferSummary:
    """Transfers of one kind and one place in the step, together.

    Attributes:
      phase: "forward", "forward again" (what rematerialisation repeats), "backward" or "update".
      source: what they are for.
      kind: of the collective.
      meanwhile: what runs meanwhile: "kernels", "products", "loops", or "nothing".
      count: how often they run in a step.
      bytes: what a device sends for them in a step.
      by_data: whether the mask decides how often they run: these count once a layer.
    """

    phase: str
    source: str
    kind: str
    meanwhile: str
    count: int
    bytes: int
    by_data: bool


def summarize_transfers(found: tuple[Transfer, ...]) -> list[TransferSummary]:
    """The transfers of a program by kind, those that send most first."""
    counts: Counter[tuple] = Counter()
    sizes: Counter[tuple] = Counter()
    for each in found:
        # What the partitioner made has no name of its own, but its loop has.
        source = each.source or next((loop.source for loop in reversed(each.loops)), "")
        key = (*_place(source), each.kind, _meanwhile(each), each.by_data)
        counts[key] += each.times
        sizes[key] += each.times * each.bytes
    return [
        TransferSummary(*key[:4], count=counts[key], bytes=size, by_data=key[4])
        for key, size in sizes.most_common()
    ]


def _place(source: str) -> tuple[str, str]:
    """The phase of the step, and what a transfer is for, by JAX's name of its operation.

    The marks are JAX's own, and the named scopes of `train.step.program` and `train.model.transformer`.
    """
    phases = {"rematted_computation": "forward again", "transpose(": "backward", "jvp(": "forward"}
    phase = next((phase for mark, phase in phases.items() if mark in source), "update")
    purposes = {
        "ppermute": "ring of keys",
        "_attend": "attention",
        "_plan": "plan",
        "_visible_pairs": "plan",
        "_travel": "plan",
        "embedding": "embedding",
        "loss": "loss",
        "gathered": "weights",
        "dot_general": "products",
    }
    return phase, next((purpose for mark, purpose in purposes.items() if mark in source), "other")


def _meanwhile(each: Transfer) -> str:
    if not each.overlaps:
        return "nothing"
    kernels = set(each.between) - {"products", "loops", "others"}
    return "kernels" if kernels else "products" if "products" in each.between else "loops"
