"""The table of results, `docs/benchmarks.md`: generated from the JSON, so that the two cannot differ."""

import json
from collections.abc import Callable
from pathlib import Path

from benchmarks import (
    balance,
    card,
    causal,
    compile_time,
    curriculum,
    decode,
    exposure,
    flashmask,
    gpu_cost,
    grain,
    loss,
    memory,
    plans,
    scores,
    topologies,
    tpu_schedule,
    trainer,
)

FOLDER = Path(__file__).parent.parent / "docs" / "benchmarks"
"""Where the results lie that the documentation shows: NAME.json."""

PREAMBLE = """# Benchmarks

Generated from `docs/benchmarks/*.json` by `python -m benchmarks --table`; `make bench` measures the quick
form on your machine, and `python -m benchmarks --full --json docs/benchmarks` writes both anew. Times are
medians of interleaved rounds of one run, so that ratios hold; each section says on what machine.
"""


SECTIONS: dict[str, tuple[str, Callable[[dict], str]]] = {
    "causal": ("Full causal attention", causal.section),
    "exposure": ("Time against exposure", exposure.section),
    "grain": ("The chosen grain beside fixed ones", grain.section),
    "memory": ("Peak memory against tokens", memory.section),
    "curriculum": ("A step over a whole curriculum", curriculum.section),
    "trainer": ("The trainer's loop beside its bare step", trainer.section),
    "loss": ("Memory of the loss against tokens", loss.section),
    "decode": ("Decoding beside transformers", decode.section),
    "flashmask": ("The twelve masks of FlashMask", flashmask.section),
    "scores": ("Bias and dropout", scores.section),
    "plans": ("Finding the blocks to skip", plans.section),
    "compile_time": ("Time to compile six layers", compile_time.section),
    "tpu_schedule": ("Static cost on TPU", tpu_schedule.section),
    "gpu_cost": ("Static cost on GPU", gpu_cost.section),
    "balance": ("Balance over devices", balance.section),
    "topologies": ("Memory and transfers of whole train steps", topologies.section),
    "card": ("On a card", card.section),
}
"""NAME of the JSON file -> the section's title, and how its results read."""


def document(folder: Path) -> str:
    """The whole table, of what results the folder holds.

    Raises:
      ValueError: a JSON file that is of no section.
    """
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}
    if unknown := found.keys() - SECTIONS.keys():
        raise ValueError(f"{folder} holds results of no section: {', '.join(sorted(unknown))}")
    parts = [section(name, found[name]) for name in SECTIONS if name in found]
    return "\n".join([PREAMBLE, *parts])


def section(name: str, results: dict) -> str:
    """One section, from its heading to the machine it was measured on."""
    title, body = SECTIONS[name]
    machine = ", ".join(f"{key} {value}" for key, value in results.get("machine", {}).items())
    measured = f"\n{_sentence(results, machine)}\n" if machine else ""
    return f"## {title}\n\n{body(results)}\n{measured}"


def _sentence(results: dict, machine: str) -> str:
    repeats = results.get("repeats")
    return f"Measured on: {machine}" + (f"; medians of {repeats} rounds." if repeats else ".")


def table_path(folder: Path) -> Path:
    """The table lies beside the folder that holds its JSON: docs/benchmarks.md, docs/benchmarks/."""
    return folder.with_suffix(".md")


def write_table(folder: Path) -> Path:
    """Generates the table, and gives its path."""
    path = table_path(folder)
    path.write_text(document(folder), encoding="utf-8")
    return path
