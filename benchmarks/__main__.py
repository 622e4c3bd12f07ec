"""Measures, prints the tables, and writes results and table where asked.

python -m benchmarks                               # the quick form, about ten minutes
python -m benchmarks --only causal plans           # these alone
python -m benchmarks --full --json docs/benchmarks # the full form, and the documentation's table anew
python -m benchmarks --table                       # the table from the results that are there
python -m benchmarks --device gpu                  # on an NVIDIA card: accuracy, times, tiles, memory
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import jax

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
    report,
    scores,
    topologies,
    tpu_schedule,
    trainer,
)
from benchmarks.timing import machine

BENCHMARKS: dict[str, ModuleType] = {
    "causal": causal,
    "exposure": exposure,
    "grain": grain,
    "memory": memory,
    "curriculum": curriculum,
    "trainer": trainer,
    "loss": loss,
    "decode": decode,
    "flashmask": flashmask,
    "scores": scores,
    "plans": plans,
    "compile_time": compile_time,
    "tpu_schedule": tpu_schedule,
    "gpu_cost": gpu_cost,
    "balance": balance,
    "topologies": topologies,
}
ON_A_CARD = {"card": card}
"""With `--device gpu`, in place of those."""


KNOWN = BENCHMARKS | ON_A_CARD


def main(arguments: Sequence[str] | None = None):
    """Runs the command line; by default with the process's own arguments.

    Raises:
      SystemExit: an option or a benchmark that does not exist.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    folder = options.json or (report.FOLDER if options.table else None)
    if not options.table:
        if options.device == "gpu" and jax.default_backend() != "gpu":
            parser.error(f"--device gpu: JAX computes on {jax.default_backend()} here, and finds no card")
        known = ON_A_CARD if options.device == "gpu" else BENCHMARKS
        for name in options.only or known:
            benchmark = KNOWN[name]
            settings = benchmark.FULL if options.full else benchmark.QUICK
            results = measured(name, settings, options.repeats or (5 if options.full else 3))
            print(report.section(name, results), flush=True)
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if folder:
        print(f"The table is {report.write_table(folder)}")


def measured(name: str, settings, repeats: int) -> dict:
    """One benchmark's results, as JSON gives them back."""
    results = KNOWN[name].measure(settings, repeats)
    return json.loads(json.dumps({"machine": machine(), "repeats": repeats, **results}))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="gpu: what a card is asked")
    parser.add_argument("--full", action="store_true", help="the sizes of the documentation; takes long")
    parser.add_argument("--only", nargs="+", choices=KNOWN, metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument(
        "--repeats", type=_positive, help="rounds, of which the median counts: 3, or 5 in full"
    )
    parser.add_argument("--json", type=Path, metavar="DIR", help="write DIR/NAME.json, and the table DIR.md")
    parser.add_argument("--table", action="store_true", help="measure nothing: write the table from the JSON")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    main()
