"""The command `compile`: whether a run fits TPUs or NVIDIA cards, and what travels, before there are any."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from train.aot.collectives import TransferSummary, summarize_transfers
from train.aot.compile_step import Compiled, compile_step
from train.aot.target import EXAMPLES
from train.config.presets import PRESETS, TOPOLOGIES
from train.config.run import Run
from train.data.tokenizers import load_tokenizer
from train.disk import write_atomically
from train.loop.source import preset_run
from train.parallel.mesh import AXES

SHARE = 0.002
"""Transfers that send less than this share of all bytes are summed up in one line."""


@dataclass(frozen=True)
class Compile:
    """Compiles a run's train step for TPUs or NVIDIA cards, without them: does it fit, what travels?"""

    run: Annotated[Run, tyro.conf.arg(name="")] = field(default_factory=Run)
    topology: str | None = None
    """A TPU's generation and its chips (v5e:4x4, v5p:8x8x4, v6e:16x16), or NVIDIA cards and how many (h100:8,
    a100:1, l4:4). None: what the preset is made for."""
    vocabulary: int | None = None
    """How many different tokens there are. None: those of data.tokenizer, and 32,768 where that is bytes."""
    json: Path | None = None
    """A file for what is found, as JSON."""


def with_preset(arguments: Sequence[str]) -> tuple[Compile, list[str]]:
    """The preset that the first word names, as options, and the words after it.

    Without one, that for the topology if there is one, else `run`. With `--init-from` the model is that of
    the source.

    Raises:
      OSError, ValueError: there is no such preset, or the source cannot be read.
    """
    words = list(arguments)
    if words and not words[0].startswith("-"):
        name = words.pop(0)
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; the presets are {', '.join(PRESETS)}")
        topology = next((place for place, preset in TOPOLOGIES.items() if preset == name), None)
        return Compile(preset_run(name, words)[0], topology), words
    named = [word.split("=", 1)[-1] for word in words]  # --topology NAME and --topology=NAME
    name = next((TOPOLOGIES[word] for word in named if word in TOPOLOGIES), "run")
    return Compile(preset_run(name, words)[0]), words


def compile_for(command: Compile):
    """Prints what the compiler found, and writes it where a file is named.

    Raises:
      ImportError: the compiler is not installed.
      ValueError, OSError: what is asked for cannot be done, and why.
      SystemExit: with status 1, once it is printed: the step does not fit.
    """
    if command.topology is None:
        raise ValueError(f"compile needs --topology: a generation of TPU and its chips, as {EXAMPLES}")
    vocabulary = command.vocabulary
    if vocabulary is None:
        data = command.run.data
        vocabulary = 32_768
        if data.tokenizer != "bytes":
            vocabulary = load_tokenizer(data.tokenizer, data.end_token, data.begin_token).vocabulary
    found = compile_step(command.run, command.topology, vocabulary)
    if command.json is not None:
        write_atomically(command.json, found.to_json())
    print(describe(found))
    if not found.fits:
        raise SystemExit(1)


def describe(found: Compiled) -> str:
    """What there is to know of a compiled step, for a terminal."""
    axes = " × ".join(str(found.mesh[axis]) for axis in AXES)
    of_each = found.rows * found.length // found.devices * found.mesh["tensor"]
    return "\n".join(
        [
            f"{found.name} for {found.topology}: {found.devices} × {found.device}, mesh {axes} "
            f"({' × '.join(AXES)})",
            f"{found.weights:,} weights{_trained(found)} over {found.vocabulary:,} tokens; a step of "
            f"{found.rows:,} × {found.length:,} tokens, {of_each:,} on each device; "
            f"{found.operations:.2g} operations at the full mask",
            "",
            *_memory(found),
            "",
            *_transfers(found),
            f"Lowered in {found.lowering:.0f} s, compiled in {found.compiling:.0f} s.",
        ]
    )


def _trained(found: Compiled) -> str:
    return "" if found.trained == found.weights else f", of which {found.trained:,} train,"


def _memory(found: Compiled) -> list[str]:
    memory = found.memory
    verdict = "it fits, {} are left" if found.fits else "it does not fit, {} are missing"
    parts = {
        "weights and optimizer's state": memory.state,
        "rows": memory.rows,
        "temporaries": memory.temporaries,
        "results": memory.results,
        "program": memory.program,
    }
    return [
        "Memory of each device:",
        *(f"  {name:<30} {_size(size):>10}" for name, size in parts.items()),
        f"  {'in all':<30} {_size(memory.total):>10} of {_size(memory.limit)}: "
        + verdict.format(_size(abs(memory.left))),
    ]


def _transfers(found: Compiled) -> list[str]:
    """The transfers by kind, the small ones summed."""
    every = summarize_transfers(found.transfers)
    if not every:
        return []
    large = [kind for kind in every if kind.bytes >= SHARE * sum(each.bytes for each in every)]
    rest = [kind for kind in every if kind not in large]
    return [
        "Transfers of a step, and what each device sends for them:",
        f"  {'':<38} {'collective':<20} {'times':>6} {'sent':>11}  meanwhile",
        *map(_line, large),
        f"  {f'{len(rest)} smaller kinds':<66} {_size(sum(each.bytes for each in rest)):>11}",
        "  * counted once for a layer: the mask decides how often",
        "",
    ]


def _line(kind: TransferSummary) -> str:
    times = f"{kind.count:,}{'*' if kind.by_data else ''}"
    what = f"{kind.source}, {kind.phase}"
    return f"  {what:<38} {kind.kind:<20} {times:>6} {_size(kind.bytes):>11}  {kind.meanwhile}"


def _size(count: float) -> str:
    """Bytes, in the unit that suits them."""
    if abs(count) < 2**10:
        return f"{count:,.0f} bytes"
    power = min(3, int(math.log2(abs(count))) // 10)
    return f"{count / 2 ** (10 * power):,.2f} {'KMG'[power - 1]}iB"
