"""A decoder that calls attention as Gemma in Flax's examples does; the code is ours.

https://github.com/google/flax/tree/main/examples/gemma: one `attention_mask` for all layers, which local
layers combine with a sliding window, and a soft cap on logits. It runs on meshes with Explicit axes too.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx

VOCAB, WIDTH, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 64, 32, 64, 4, 2, 8
K_MASK = -2.3819763e38


@dataclasses.dataclass(frozen=True)
class Config:
    attention_types: tuple[str, ...] = ("local_sliding", "local_sliding", "local_sliding", "global")
    sliding_window_size: int = 5
    query_pre_attn_scalar: float = HEAD_DIM**-0.5
    attn_logits_soft_cap: float = 20.0
    dtype: jax.typing.DTypeLike = jnp.float32
    tensor_axis: str | None = None  # the mesh axis over which heads and hidden units are partitioned


class Einsum(nnx.Module):
    def __init__(self, einsum_str: str, shape: tuple[int, ...], sharding: tuple, dtype, *, rngs: nnx.Rngs):
        self.einsum_str, self.dtype = einsum_str, dtype
        init = nnx.with_partitioning(nnx.initializers.normal(0.2), sharding if any(sharding) else None)
        self.w = nnx.Param(init(rngs.params(), shape))

    def __call__(self, x, out_sharding=None):
        x, w = x.astype(self.dtype), self.w[...].astype(self.dtype)
        return jnp.einsum(self.einsum_str, x, w, out_sharding=out_sharding)


def apply_rope(inputs, positions):
    """Rotates inputs [B, L, N, H] by their positions [B, L]."""
    timescale = 10_000.0 ** (jnp.arange(0, HEAD_DIM, 2, dtype=jnp.float32) / HEAD_DIM)
    angle = positions[:, :, None, None].astype(jnp.float32) / timescale[None, None, None, :]
    first, second = jnp.split(inputs.astype(jnp.float32), 2, axis=-1)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(inputs.dtype)


class Attention(nnx.Module):
    def __init__(self, config: Config, attn_type: str, *, rngs: nnx.Rngs):
        self.config, self.attn_type, tp = config, attn_type, config.tensor_axis
        q, kv, vec = (WIDTH, HEADS, HEAD_DIM), (2, WIDTH, KV_HEADS, HEAD_DIM), (HEADS, HEAD_DIM, WIDTH)
        self.q_einsum = Einsum("BTD,DNH->BTNH", q, (None, tp, None), config.dtype, rngs=rngs)
        self.kv_einsum = Einsum("BSD,CDKH->CBSKH", kv, (None, None, tp, None), config.dtype, rngs=rngs)
        self.attn_vec_einsum = Einsum("BTNH,NHD->BTD", vec, (tp, None, None), config.dtype, rngs=rngs)

    def __call__(self, x, segment_pos, cache, attn_mask):
        query_scaled = apply_rope(self.q_einsum(x), segment_pos) * self.config.query_pre_attn_scalar
        key_proj, value_proj = self.kv_einsum(x)
        key_proj = apply_rope(key_proj, segment_pos)

        end_index = 0
        if cache is not None:
            end_index = cache["end_index"][0]
            key_proj = jax.lax.dynamic_update_slice(cache["k"], key_proj, (0, end_index, 0, 0))
            value_proj = jax.lax.dynamic_update_slice(cache["v"], value_proj, (0, end_index, 0, 0))
            cache = {"k": key_proj, "v": value_proj, "end_index": cache["end_index"] + x.shape[1]}

        b, t, n, h = query_scaled.shape
        query_scaled = query_scaled.reshape(b, t, KV_HEADS, n // KV_HEADS, h)
        logits = jnp.einsum("BTKGH,BSKH->BKGTS", query_scaled, key_proj).astype(jnp.float32)
        logits = jnp.tanh(logits / self.config.attn_logits_soft_cap) * self.config.attn_logits_soft_cap
        if self.attn_type == "local_sliding":
            distance = end_index + jnp.arange(t)[:, None] - jnp.arange(key_proj.shape[1])[None, :]
            attn_mask = attn_mask & (jnp.abs(distance) < self.config.sliding_window_size)[None, :, :]
        padded_logits = jnp.where(attn_mask[:, None, None, :, :], logits, K_MASK)
        probs = jax.nn.softmax(padded_logits, axis=-1).astype(key_proj.dtype)
        encoded = jnp.einsum("BKGTS,BSKH->BTKGH", probs, value_proj).reshape(b, t, n, h)
        return cache, self.attn_vec_einsum(encoded, out_sharding=jax.typeof(x).sharding)


class Block(nnx.Module):
    def __init__(self, config: Config, attn_type: str, *, rngs: nnx.Rngs):
        self.pre_attention_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attn = Attention(config, attn_type, rngs=rngs)
        self.pre_ffw_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        gating, tp = (2, WIDTH, HIDDEN), config.tensor_axis
        self.gating_einsum = Einsum("BTD,CDF->CBTF", gating, (None, None, tp), config.dtype, rngs=rngs)
        self.linear = Einsum("BTF,FD->BTD", (HIDDEN, WIDTH), (tp, None), config.dtype, rngs=rngs)

    def __call__(self, x, segment_pos, cache, attn_mask):
        attn_inputs = self.pre_attention_norm(x.astype(jnp.float32))
        cache, attn_output = self.attn(attn_inputs, segment_pos, cache, attn_mask)
        x = x + attn_output
        gate, up = self.gating_einsum(self.pre_ffw_norm(x.astype(jnp.float32)))
        return cache, x + self.linear(nnx.gelu(gate) * up, out_sharding=jax.typeof(x).sharding)


class Transformer(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.config = config
        self.input_embedding = nnx.Param(nnx.initializers.normal(0.2)(rngs.params(), (VOCAB, WIDTH)))
        self.layers = nnx.List([Block(config, attn_type, rngs=rngs) for attn_type in config.attention_types])
        self.final_norm = nnx.RMSNorm(WIDTH, rngs=rngs)

    def __call__(self, tokens, positions, cache, attention_mask):
        """Logits [B, L, V], and the cache; tokens, positions: [B, L]; attention_mask: [B, L, L']."""
        embedding = self.input_embedding[...]
        x = embedding.at[tokens].get(out_sharding=jax.typeof(tokens).sharding).astype(self.config.dtype)
        cache = [None] * len(self.layers) if cache is None else list(cache)
        for i, layer in enumerate(self.layers):
            cache[i], x = layer(x, positions, cache[i], attention_mask)
        return jnp.dot(self.final_norm(x.astype(jnp.float32)), embedding.T), cache

    def init_cache(self, batch_size: int, cache_size: int):
        kv = jnp.zeros((batch_size, cache_size, KV_HEADS, HEAD_DIM), self.config.dtype)
        return [{"k": kv, "v": kv, "end_index": jnp.zeros(batch_size, jnp.int32)} for _ in self.layers]


def make(seed: int, **options) -> Transformer:
    return Transformer(Config(**options), rngs=nnx.Rngs(seed))


def loss(model: Transformer, batch):
    """Mean cross entropy of packed rows; inputs, targets, segments and positions are [B, L], padding is 0."""
    inputs, segments = batch["inputs"], batch["inputs_segmentation"]
    causal = jnp.tril(jnp.ones((inputs.shape[1], inputs.shape[1]), bool))
    attention_mask = causal[None, :, :] & (segments[:, :, None] == segments[:, None, :])
    logits, _ = model(inputs, batch["inputs_position"], None, attention_mask)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return jnp.average(losses, weights=(inputs > 0).astype(jnp.float32))
