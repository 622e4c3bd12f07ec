"""Memory of the loss against tokens, with a large vocabulary: in chunks, and with all logits at once.

What the compiler plans for loss and gradient of the last layer; nothing is run.
"""

from dataclasses import asdict, dataclass

import flax.nnx as nnx
import jax
import jax.numpy as jnp

from benchmarks.markdown import megabytes, table
from train.config import sections
from train.model.loss import token_losses


@dataclass(frozen=True)
class Settings:
    """Lengths, and the layer from features to logits."""

    tokens: tuple[int, ...]
    vocabulary: int = 32_768
    width: int = 256
    chunk: int = 1_024


QUICK = FULL = Settings(tuple(2**n for n in range(11, 18)))


def measure(settings: Settings, repeats: int) -> dict:
    """For each length the bytes of temporaries, in chunks and with all logits at once."""
    rows = [
        {
            "tokens": tokens,
            "chunked": _temporary_bytes(settings, tokens, settings.chunk),
            "whole": _temporary_bytes(settings, tokens, tokens),
            "hidden": 4 * tokens * settings.width,
        }
        for tokens in settings.tokens
    ]
    return {"repeats": None, "settings": asdict(settings), "rows": rows}


def _temporary_bytes(settings: Settings, tokens: int, chunk: int) -> int | None:
    """Of loss and gradient, for the features and the layer, compiled."""
    layer = nnx.Linear(settings.width, settings.vocabulary, use_bias=False, rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)
    options = sections.Loss(chunk=chunk)

    def loss(params, hidden, targets, weights):
        logits = nnx.merge(graph, params)
        return (weights * token_losses(hidden, logits, targets, weights, options).nats).sum()

    hidden = jax.ShapeDtypeStruct((1, tokens, settings.width), jnp.float32)
    targets = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    weights = jax.ShapeDtypeStruct((1, tokens), jnp.float32)
    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    program = gradient.lower(params, hidden, targets, weights).compile()
    analysis = program.memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)


def section(results: dict) -> str:
    """The results as Markdown."""
    settings = results["settings"]
    rows = [
        [f"{row['tokens']:,} tokens", *(megabytes(row[name]) for name in ("hidden", "chunked", "whole"))]
        for row in results["rows"]
    ]
    columns = ["loss and gradient", "features", "temporaries, in chunks", "with all logits"]
    return (
        f"A vocabulary of {settings['vocabulary']:,}, width {settings['width']}, logits of "
        f"{settings['chunk']:,} tokens at a time, float32; XLA's own plan of temporaries on this device.\n\n"
        f"{table(columns, rows)}"
    )
