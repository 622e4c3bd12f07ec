"""What a bias and dropout add to the time of attention: full causal, beside neither."""

from dataclasses import asdict

import jax

from benchmarks.calls import BOTH, FORWARD, WAYS, Size, both_ways, compiled
from benchmarks.markdown import ratio, seconds, table
from benchmarks.timing import compared
from dynmask_jax import ALiBi, Bias, Causal, Dropout, RelativeBuckets, attention

Settings = Size
QUICK, FULL = Size(tokens=2_048), Size(tokens=4_096)
NEITHER, LEARNED = "neither", ", learned"
RATE, BUCKETS = 0.1, 32


def measure(settings: Size, repeats: int) -> dict:
    """Seconds with each, both ways; what is learned is an argument of the gradient, as in training."""
    arrays = settings.arrays()
    key = jax.random.key(0)
    table = jax.random.normal(key, (settings.heads, BUCKETS))
    alibi, t5 = ALiBi.for_heads(settings.heads), RelativeBuckets(table, bidirectional=False)
    calls = {
        NEITHER: both_ways(compiled(lambda q, k, v: attention(q, k, v, Causal())), *arrays),
        f"Dropout({RATE})": both_ways(
            compiled(lambda q, k, v, key: attention(q, k, v, Causal(), dropout=Dropout(RATE, key))),
            *arrays,
            key,
        ),
        "ALiBi": both_ways(compiled(lambda q, k, v: attention(q, k, v, Causal(), bias=alibi)), *arrays),
        f"ALiBi{LEARNED}": both_ways(_learned(), *arrays, alibi),
        f"RelativeBuckets{LEARNED}": both_ways(_learned(), *arrays, t5),
    }
    return {"settings": asdict(settings), "times": compared(calls, repeats)}


def _learned() -> dict:
    """Of (q, k, v, cotangent, bias), as `calls.compiled`, with the gradient of the bias too."""

    def forward(q, k, v, cotangent, bias: Bias):
        return attention(q, k, v, Causal(), bias=bias)

    def both(q, k, v, cotangent, bias: Bias):
        out, pull = jax.vjp(lambda q, k, v, bias: forward(q, k, v, None, bias), q, k, v, bias)
        return out, pull(cotangent)

    return {FORWARD: jax.jit(forward), BOTH: jax.jit(both)}


def section(results: dict) -> str:
    """The results as Markdown."""
    size, times = Size(**results["settings"]), results["times"]
    rows = [
        [
            name,
            *(cell for way in WAYS for cell in (seconds(each[way]), ratio(each[way], times[NEITHER][way]))),
        ]
        for name, each in times.items()
    ]
    columns = ["full causal mask, with", FORWARD, "over neither", BOTH, "over neither"]
    return (
        f"{size}, float32. Slopes or a table that are learned get their gradients in the backward pass; "
        f"the table has {BUCKETS} buckets a head.\n\n{table(columns, rows)}"
    )
