"""Full causal attention, beside what else computes it on this machine; and in bfloat16."""

from dataclasses import asdict

from benchmarks import peers, torch_peers
from benchmarks.calls import BOTH, FORWARD, WAYS, Size, both_ways, compiled
from benchmarks.markdown import ratio, seconds, table
from benchmarks.timing import compared
from dynmask_jax import Causal, Tokens, attention, mask_tensor

Settings = Size
QUICK, FULL = Size(tokens=2_048), Size(tokens=4_096)
OURS = "dynmask_jax"


def measure(settings: Size, repeats: int) -> dict:
    """Seconds of ours and of each peer, both ways."""
    arrays = settings.arrays()
    causal = Causal(), Tokens.sequence(settings.tokens)
    ours = compiled(lambda q, k, v: attention(q, k, v, Causal()))
    calls = {
        OURS: both_ways(ours, *arrays),
        f"{OURS}, bfloat16": both_ways(ours, *settings.arrays("bfloat16")),
        **peers.jax_nn(arrays),
        **peers.tokamax(arrays),
        "PyTorch SDPA, is_causal": torch_peers.sdpa(arrays),
        "PyTorch SDPA, dense mask": torch_peers.sdpa(arrays, mask_tensor(*causal)),
        "PyTorch FlexAttention": torch_peers.flex_attention(arrays, *causal),
    }
    return {"settings": asdict(settings), "times": compared(calls, repeats)}


def section(results: dict) -> str:
    """The results as Markdown."""
    ours = results["times"][OURS]
    rows = [
        [name, *(cell for way in WAYS for cell in (seconds(times[way]), ratio(times[way], ours[way])))]
        for name, times in results["times"].items()
    ]
    columns = ["full causal mask", FORWARD, "over ours", BOTH, "over ours"]
    size = Size(**results["settings"])
    return f"{size}, float32 save where it says otherwise.\n\n{table(columns, rows)}"
