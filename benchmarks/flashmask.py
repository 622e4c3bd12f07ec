"""The twelve masks of FlashMask's kernel benchmark, beside FlexAttention with the same expressions."""

from dataclasses import asdict, dataclass

from benchmarks import torch_peers
from benchmarks.calls import BOTH, FORWARD, Size, both_ways, compiled
from benchmarks.flashmask_masks import PATTERNS, lengths
from benchmarks.markdown import ratio, seconds, share, table
from benchmarks.timing import compared
from dynmask_jax import attention, plan

ROUNDED = 2_540, 1_720, 3_932
"""The documents of results from before they were recorded."""
OURS, FLEX = "dynmask_jax", "PyTorch FlexAttention"


@dataclass(frozen=True)
class Settings(Size):
    """One sequence under each of these patterns."""

    patterns: tuple[str, ...] = tuple(PATTERNS)


QUICK, FULL = Settings(tokens=2_048), Settings(tokens=8_192)


def measure(settings: Settings, repeats: int) -> dict:
    """For each pattern: what it shows, and the seconds of ours and of FlexAttention.

    Ours make the plan in each call; FlexAttention's block mask is made beforehand.
    """
    arrays, rows = settings.arrays(), []
    ours = compiled(lambda q, k, v, mask, tokens: attention(q, k, v, plan(mask, tokens)))
    for name in settings.patterns:
        pattern = PATTERNS[name](settings.tokens)
        calls = {
            OURS: both_ways(ours, *arrays, pattern.mask, pattern.tokens),
            FLEX: torch_peers.flex_attention(arrays, pattern.mask, pattern.tokens),
        }
        exposure = float(plan(pattern.mask, pattern.tokens).exposure())
        rows.append({"pattern": name, "exposure": exposure, "times": compared(calls, repeats)})
    return {"settings": asdict(settings), "documents": lengths(settings.tokens), "rows": rows}


def section(results: dict) -> str:
    """The results as Markdown."""
    rows = []
    for row in results["rows"]:
        ours, flex = row["times"][OURS], row["times"][FLEX]
        cells = [seconds(ours[FORWARD]), seconds(ours[BOTH]), seconds(flex[FORWARD])]
        rows.append([row["pattern"], share(row["exposure"]), *cells, ratio(flex[FORWARD], ours[FORWARD])])
    columns = ["mask", "pairs visible", FORWARD, BOTH, f"{FLEX}, {FORWARD}", "over ours"]
    size = Settings(**results["settings"])
    documents = ", ".join(f"{length:,}" for length in results.get("documents", ROUNDED))
    words = (
        f"{size}, float32. Our time includes the plan; the block mask is not in {FLEX}'s. Documents have "
        f"{documents} tokens (FlashMask's: 2,538, 1,742 and 3,213, and 699 of padding). Random eviction is "
        "drawn by a rule of ours; the other masks are FlashMask's."
    )
    return f"{words}\n\n{table(columns, rows)}"
