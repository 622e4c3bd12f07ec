"""The masks, shapes and tolerances that tests and benchmarks share."""

import dataclasses
import re

import jax
import jax.experimental
import jax.numpy as jnp

from dynmask_jax import (
    Causal,
    Chunks,
    Everything,
    Mask,
    Predicate,
    Prefix,
    RandomChunks,
    SameSegment,
    Select,
    Sinks,
    Strided,
    Tokens,
    Window,
    maximum,
)


def _bitwise(q, k):
    return ((q.position ^ k.position) & 3) != 1


# JAX 0.7 has it in `experimental` alone.
enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
HEADS = 4
MASKS: dict[str, Mask] = {
    "everything": Everything(),
    "causal": Causal(),
    "window": Causal() & Window(9),
    "window_both_ways": Window(5, ahead=2),
    "chunks": Causal() & Chunks(11),
    "prefix": Causal() | Prefix(6),
    "sinks": Causal() & (Window(7) | Sinks(3)),
    "same_segment": Causal() & SameSegment(),
    "strided": Causal() & Strided(3),
    "random_chunks": RandomChunks(8, 0.4, seed=3),
    "select": Select(True, Causal() & Window(4), Everything()),
    "not": ~Causal() & ~Chunks(5),
    "nothing": ~Everything(),
    "predicate": Predicate(lambda q, k: (q.position - k.position) % 16 < 5),
    "parameters": Predicate(lambda q, k, n: maximum(q.position, k.position) * 2 < n, 50),
    "per_head_window": Causal() & Window(jnp.array([1, 4, 16, 64])),
    "per_head_select": Select(jnp.array([True, False, True, False]), Causal(), Chunks(6)),
    "unreadable": Predicate(_bitwise),
}
"""Every shipped mask, alone or as it is used; per-head ones have `HEADS` heads."""

UNREADABLE = "cannot be read over blocks"


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of an attention call, and the blocks it is cut into."""

    batch: int = 2
    queries: int = 40
    keys: int = 40
    heads: int = HEADS
    kv_heads: int = 2
    head_dim: int = 8
    block_q: int = 16
    block_k: int = 8

    def qkv(self, dtype=jnp.float32, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Normal queries `[B, T, N, H]`, keys and values `[B, S, K, H]`."""
        keys = jax.random.split(jax.random.key(seed), 3)
        q = (self.batch, self.queries, self.heads, self.head_dim)
        kv = (self.batch, self.keys, self.kv_heads, self.head_dim)
        return tuple(jax.random.normal(key, s, dtype) for key, s in zip(keys, (q, kv, kv), strict=True))

    def tokens(self) -> tuple[Tokens, Tokens]:
        """Queries and keys of three packed documents and padding, shifted in each sequence."""
        return self._packed(self.queries), self._packed(self.keys)

    def _packed(self, length: int) -> Tokens:
        place = jnp.arange(length)[None, :] + 3 * jnp.arange(self.batch)[:, None]
        segment = jnp.where(place < 9 * length // 10, 1 + place // 15, 0)
        return Tokens(jnp.broadcast_to(jnp.arange(length)[None, :], segment.shape), segment)


SHAPES: dict[str, Shape] = {
    "even": Shape(queries=48, keys=48),
    "ragged": Shape(queries=37, keys=53),
    "one_query": Shape(queries=1, keys=29),
    "one_block": Shape(queries=12, keys=12, block_q=64, block_k=64),
    "heads_alike": Shape(kv_heads=4),
    "one_kv_head": Shape(kv_heads=1, batch=1),
    "tall_blocks": Shape(queries=33, keys=20, block_q=32, block_k=4),
}

TOLERANCE = {
    jnp.dtype("float32"): {"rtol": 2e-5, "atol": 4e-6},
    jnp.dtype("bfloat16"): {"rtol": 2.0**-7, "atol": 2.0**-7},
    jnp.dtype("float16"): {"rtol": 2.0**-9, "atol": 2.0**-9},
}
"""By the dtype of q, k and v; sums are float32 in all. Set at 2 to 4 times the errors measured."""


def collectives(compiled) -> set[str]:
    """The shapes and names of a program's collectives that move arrays between devices."""
    moves = "all-gather|all-to-all|collective-permute"
    return {" ".join(found) for found in re.findall(rf"= (\S+) ({moves})(?:-start)?\(", compiled.as_text())}
