"""Finding the blocks to skip: our `plan`, beside FlexAttention's `create_block_mask`."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

from benchmarks import block_masks
from benchmarks.markdown import ratio, seconds, table
from benchmarks.timing import Ways, compared
from dynmask_jax import Causal, Mask, SameSegment, Tokens, Window, plan

DOCUMENT = 1_024
MASKS: dict[str, Callable[[int], tuple[Mask, Tokens]]] = {
    "causal": lambda tokens: (Causal(), Tokens.sequence(tokens)),
    "causal window": lambda tokens: (Causal() & Window(tokens // 8), Tokens.sequence(tokens)),
    "packed documents": lambda tokens: (Causal() & SameSegment(), packed(tokens)),
}
BLOCKS: dict[str, tuple[int | None, int | None]] = {
    "plan": (None, None),
    "plan, 128 × 128": (128, 128),
    "plan, 512 × 512": (512, 512),
}
OURS, EAGER, COMPILED = "plan, 128 × 128", "create_block_mask", "create_block_mask, compiled"
TIME = "time"


@dataclass(frozen=True)
class Settings:
    """Lengths at which masks are planned.

    Attributes:
      tokens: lengths at which both are timed.
      ours: lengths at which ours alone is, in its own blocks and in 512 × 512.
      limit: seconds that one `create_block_mask` may take, and is left out beyond.
    """

    tokens: tuple[int, ...]
    ours: tuple[int, ...] = ()
    limit: float = 60.0


QUICK = Settings((4_096, 16_384))
FULL = Settings((4_096, 16_384, 65_536, 131_072), ours=(2**20,))


def measure(settings: Settings, repeats: int) -> dict:
    """For each length and mask, the seconds of each, with a plan jitted as in a train step."""
    rows = []
    for tokens in (*settings.tokens, *settings.ours):
        for name in MASKS:
            times = compared(_calls(name, tokens, settings), repeats)
            flat = {which: ways[TIME] for which, ways in times.items()}
            rows.append({"tokens": tokens, "mask": name, "times": flat})
    return {"settings": asdict(settings), "rows": rows}


def _calls(name: str, tokens: int, settings: Settings) -> dict[str, Ways]:
    calls: dict[str, Ways] = {which: {TIME: _plan(name, tokens, *BLOCKS[which])} for which in BLOCKS}
    if tokens in settings.ours:
        del calls[OURS]
        return calls
    for which in (EAGER, COMPILED):
        calls[which] = {TIME: block_masks.call(name, tokens, which == COMPILED, settings.limit)}
    return calls


def packed(tokens: int) -> Tokens:
    """Documents of 1,024 tokens, or a quarter of a shorter row."""
    each = min(DOCUMENT, tokens // 4)
    return Tokens.packed([each] * (tokens // each))


def _plan(name: str, tokens: int, block_q: int | None, block_k: int | None):
    mask, places = MASKS[name](tokens)
    return lambda: plan(mask, places, block_q=block_q, block_k=block_k)


def section(results: dict) -> str:
    """The results as Markdown."""
    rows = []
    for row in results["rows"]:
        times = row["times"]
        cells = [seconds(times[name]) if name in times else "–" for name in (*BLOCKS, EAGER, COMPILED)]
        against = ratio(times.get(COMPILED, ""), times.get(OURS, ""))
        rows.append([f"{row['mask']}, {row['tokens']:,} tokens", *cells, against])
    columns = ["mask", *BLOCKS, EAGER, COMPILED, "compiled, over ours in the same blocks"]
    limit = results["settings"]["limit"]
    return (
        "A plan of ours is made in each train step, since the mask changes; `create_block_mask` evaluates "
        f"every pair, in blocks of 128 × 128. What would take it over {limit:.0f} s, or more memory than "
        f"there is, is named.\n\n{table(columns, rows)}"
    )
