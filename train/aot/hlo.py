"""The text of a compiled program: its computations, and their instructions in the order they run.

XLA prints what it compiled for a TPU as scheduled HLO: `compiled.as_text()`. It is read as it stands, with
no more of its grammar than is needed: an instruction a line, `%name = type opcode(operands), attributes`,
and computations between braces.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

_HEAD = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%(?P<name>[\w.-]+) = (?P<rest>.*)")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|\w+_computations?)=\{?((?:%[\w.-]+(?:, )?)+)")
_NAMES = re.compile(r"%([\w.-]+)")


@dataclass(frozen=True)
class Instruction:
    """One operation.

    Attributes:
      name: within the program, without `%`.
      type: what it gives: an array's type, or a tuple's in parentheses.
      opcode: what it does, "fusion" say.
      arguments: what stands in the opcode's parentheses: instructions whose results it takes, or a constant.
      attributes: the rest of the line, its metadata included.
    """

    name: str
    type: str
    opcode: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        """The names of the instructions whose results it takes."""
        return _NAMES.findall(self.arguments)

    @property
    def bytes(self) -> int:
        """Of all arrays that it gives."""
        return bytes_of(self.type)

    @property
    def source(self) -> str:
        """JAX's name of the operation that it came from, "jit(step)/while/body/dot_general"; "" for none."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @cached_property
    def called(self) -> dict[str, tuple[str, ...]]:
        """The computations that it runs: `body` and `condition` of a loop, `calls` of a fusion."""
        return {key: tuple(_NAMES.findall(names)) for key, names in _CALLED.findall(self.attributes)}


@dataclass(frozen=True)
class Computation:
    """Instructions in the order they run; the last gives the result."""

    name: str
    instructions: tuple[Instruction, ...]

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        """The instructions, by their names."""
        return {each.name: each for each in self.instructions}

    @property
    def result(self) -> Instruction:
        """The instruction whose result is the computation's."""
        return self.instructions[-1]


@dataclass(frozen=True)
class Module:
    """A whole program.

    Attributes:
      entry: where it begins.
      computations: all, by name.
    """

    entry: Computation
    computations: dict[str, Computation]

    def within(self, instruction: Instruction) -> Iterator[Instruction]:
        """All instructions of the computations that one runs, and of those that these run."""
        for names in instruction.called.values():
            for name in names:
                for each in self.computations[name].instructions:
                    yield each
                    yield from self.within(each)


def parse(text: str) -> Module:
    """The program of a scheduled text.

    Raises:
      ValueError: it is not scheduled, so that its order would mean nothing, or has no entry.
    """
    if "is_scheduled=true" not in text.split("\n", 1)[0]:
        raise ValueError("this program's text is not scheduled: its first line lacks is_scheduled=true")
    found: dict[str, list[Instruction]] = {}
    entry, into = None, []
    for line in text.splitlines():
        if head := _HEAD.match(line):
            into = found.setdefault(head["name"], [])
            entry = head["name"] if head["entry"] else entry
        elif instruction := _INSTRUCTION.match(line):
            into.append(_instruction(instruction["name"], instruction["rest"]))
    if entry is None:
        raise ValueError("this program's text has no ENTRY")
    computations = {name: Computation(name, tuple(lines)) for name, lines in found.items()}
    return Module(computations[entry], computations)


def bytes_of(type_: str) -> int:
    """The bytes of a type's arrays, without the padding of their layout.

    >>> bytes_of("(bf16[1,8,128]{2,1,0:T(8,128)(2,1)S(1)}, /*index=5*/ pred[3], u32[]{:S(2)})")
    2055
    """
    total = 0
    for _, bits, sizes in _ARRAY.findall(type_):
        count = 1
        for size in filter(None, sizes.split(",")):
            count *= int(size)
        total += -(-count * int(bits or 8) // 8)
    return total


def parts(type_: str) -> list[str]:
    """The types in a tuple's type; of an array's, itself.

    >>> parts("(bf16[2,3]{1,0:T(8,128)(2,1)}, (u32[], s32[4]))")
    ['bf16[2,3]{1,0:T(8,128)(2,1)}', '(u32[], s32[4])']
    """
    if not type_.startswith("("):
        return [type_]
    found, rest = [], type_[1:-1]
    while rest:
        end = _closed(rest, ",")
        found.append(re.sub(r"/\*.*?\*/", "", rest[:end]).strip())
        rest = rest[end + 1 :]
    return found


def _instruction(name: str, rest: str) -> Instruction:
    end = _closed(rest, " ")
    type_, rest = rest[:end], rest[end + 1 :]
    opcode, rest = rest.split("(", 1)
    end = _closed(rest, ")")
    return Instruction(name, type_, opcode, rest[:end], rest[end + 1 :])


def _closed(text: str, mark: str) -> int:
    """Where a mark first stands outside all brackets, or the text's end."""
    depth = 0
    for at, letter in enumerate(text):
        if letter == mark and depth == 0:
            return at
        depth += (letter in "([{") - (letter in ")]}")
    return len(text)
