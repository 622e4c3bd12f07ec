"""A GPU kernel's machine code, as `nvdisasm` prints it: its loops, and what their instructions work with."""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

UNITS = {
    "tensor": r"[HIDQ]G?MMA",
    "special": r"MUFU",
    "float": r"FADD|FMUL|FFMA|FMNMX|FSEL|FSETP|FSET|HADD2|HMUL2|HFMA2|F2FP|F2F|FCHK",
    "memory": r"(LD|ST)([GSLC]|SM|GSTS|GDEPBAR)?|ULDC|UBLKCP|UTMA\w+|ATOM\w*|RED|DEPBAR",
}
"""unit -> the operations that use it; all others are integers, control and moves."""
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)((?:\.\w+)*)\s*([^;]*);")
_LABEL = re.compile(r"^\s*(\.L_\w+):")


@dataclass(frozen=True)
class Instruction:
    """One line: its operation (`HMMA`), its variant (`.16816.F32.BF16`), and the rest."""

    operation: str
    variant: str
    operands: str

    @property
    def unit(self) -> str:
        """Of `UNITS`, or "other"."""
        return next((unit for unit, names in UNITS.items() if re.fullmatch(names, self.operation)), "other")

    @property
    def multiply_adds(self) -> int:
        """Of 16-bit numbers, that a warp does by it on the tensor cores."""
        if shape := re.match(r"\.64x(\d+)x16\.", self.variant):
            return 64 * int(shape[1]) * 16 // 4  # four warps do it together
        if shape := re.match(r"\.168(16|8)\.", self.variant):
            return 16 * 8 * int(shape[1])
        return 0


@dataclass(frozen=True)
class Code:
    """A kernel's instructions, and where its labels stand among them."""

    instructions: list[Instruction]
    labels: dict[str, int]

    @classmethod
    def of(cls, text: str) -> "Code":
        """From what nvdisasm prints."""
        instructions, labels = [], {}
        for line in text.splitlines():
            if label := _LABEL.match(line):
                labels[label[1]] = len(instructions)
            elif found := _LINE.match(line):
                instructions.append(Instruction(found[2], found[3], found[4]))
        return cls(instructions, labels)

    @cached_property
    def loops(self) -> list[list[Instruction]]:
        """The bodies of innermost loops with tensor instructions, in their order."""
        spans = []
        for place, each in enumerate(self.instructions):
            target = re.search(r"\.L_\w+", each.operands) if each.operation == "BRA" else None
            start = self.labels.get(target[0]) if target else None
            if start is not None and start <= place:
                spans.append((start, place + 1))
        inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
        bodies = [self.instructions[slice(*span)] for span in sorted(inner)]
        return [body for body in bodies if any(each.unit == "tensor" for each in body)]

    def without_branch(self, body: list[Instruction]) -> list[Instruction]:
        """A body of `loops` without the longest part that a branch in it jumps over."""
        start = next(place for place, each in enumerate(self.instructions) if each is body[0])
        jumps = [(0, 0)]
        for place, each in enumerate(body):
            target = re.search(r"\.L_\w+", each.operands) if each.operation == "BRA" else None
            end = self.labels[target[0]] - start if target else 0
            if place < end < len(body):
                jumps.append((place + 1, end))
        first, end = max(jumps, key=lambda jump: jump[1] - jump[0])
        return body[:first] + body[end:]

    def count(self, *operations: str) -> int:
        """How often any of these operations stands in the code."""
        return sum(each.operation in operations for each in self.instructions)


def by_unit(body: list[Instruction]) -> dict[str, int]:
    """How many instructions of a loop's body use each unit."""
    found = Counter(each.unit for each in body)
    return {unit: found[unit] for unit in (*UNITS, "other")}
