"""A decoder that calls attention as Qwen3 in JAX's Bonsai does; the code is ours.

https://github.com/jax-ml/bonsai/blob/main/bonsai/models/qwen3/modeling.py: rows padded on the left, a mutable
`LayerCache` for prefill and decoding, and a mask that every layer makes from segment ids and the cache.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx

VOCAB, WIDTH, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 64, 32, 64, 4, 2, 8
K_MASK = -2.3819763e38


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    num_layers: int = 4
    rope_theta: float = 1_000_000.0
    dtype: jax.typing.DTypeLike = jnp.float32


class LayerCache(nnx.Module):
    def __init__(self, batch_size: int, cache_size: int, dtype):
        self.k_cache = nnx.Cache(jnp.zeros((batch_size, cache_size, KV_HEADS, HEAD_DIM), dtype))
        self.v_cache = nnx.Cache(jnp.zeros((batch_size, cache_size, KV_HEADS, HEAD_DIM), dtype))
        self.start_ind = nnx.Cache(jnp.full((batch_size,), -1, jnp.int32))  # first token after the padding
        self.cur_ind = nnx.Cache(jnp.zeros((), jnp.int32))


class Einsum(nnx.Module):
    def __init__(self, einsum_str: str, shape: tuple[int, ...], dtype, *, rngs: nnx.Rngs):
        self.einsum_str, self.dtype = einsum_str, dtype
        self.w = nnx.Param(nnx.initializers.normal(0.2)(rngs.params(), shape))

    def __call__(self, x):
        return jnp.einsum(self.einsum_str, x.astype(self.dtype), self.w[...].astype(self.dtype))


def apply_rope(x, positions, config: ModelConfig):
    """Rotates x [B, T, N, H] by its positions [B, T]."""
    timescale = config.rope_theta ** (jnp.arange(0, HEAD_DIM, 2, dtype=jnp.float32) / HEAD_DIM)
    angle = positions[:, :, None, None].astype(jnp.float32) / timescale[None, None, None, :]
    x1, x2 = jnp.split(x, 2, axis=-1)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(config.dtype)


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.q_proj = Einsum("BTD,DNH->BTNH", (WIDTH, HEADS, HEAD_DIM), config.dtype, rngs=rngs)
        self.k_proj = Einsum("BSD,DKH->BSKH", (WIDTH, KV_HEADS, HEAD_DIM), config.dtype, rngs=rngs)
        self.v_proj = Einsum("BSD,DKH->BSKH", (WIDTH, KV_HEADS, HEAD_DIM), config.dtype, rngs=rngs)
        self.o_proj = Einsum("BTNH,NHD->BTD", (HEADS, HEAD_DIM, WIDTH), config.dtype, rngs=rngs)
        self.q_norm = nnx.RMSNorm(HEAD_DIM, rngs=rngs)
        self.k_norm = nnx.RMSNorm(HEAD_DIM, rngs=rngs)

    def __call__(self, x, cache: LayerCache, segment_ids):
        t = x.shape[1]
        start_ind, cur_ind = cache.start_ind[...], cache.cur_ind[...]
        start_ind = jnp.where(start_ind < 0, jnp.argmax(segment_ids != 0, axis=1), start_ind)
        q_pos = cur_ind + jnp.arange(t)[None, :] - start_ind[:, None]
        query_proj = apply_rope(self.q_norm(self.q_proj(x).astype(jnp.float32)), q_pos, self.config)
        key_proj = apply_rope(self.k_norm(self.k_proj(x).astype(jnp.float32)), q_pos, self.config)
        value_proj = self.v_proj(x)

        slice_indices = (0, cur_ind, 0, 0)
        cache.k_cache[...] = jax.lax.dynamic_update_slice(cache.k_cache[...], key_proj, slice_indices)
        cache.v_cache[...] = jax.lax.dynamic_update_slice(cache.v_cache[...], value_proj, slice_indices)
        cache.start_ind[...], cache.cur_ind[...] = start_ind, cur_ind + t

        query_proj = query_proj.reshape((-1, t, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM))
        attn_logits = jnp.einsum("BTHGD,BSHD->BHGTS", query_proj, cache.k_cache[...]) * HEAD_DIM**-0.5
        k_pos = jnp.arange(cache.k_cache.shape[1])[None, :] - start_ind[:, None]
        causal_mask = k_pos[:, None, :] <= q_pos[:, :, None]  # [B, T, cache size]
        final_mask = causal_mask & ((k_pos >= 0)[:, None, :] == (segment_ids != 0)[:, :, None])
        attn_logits = jnp.where(final_mask[:, None, None, :, :], attn_logits, K_MASK)
        attn_weights = jax.nn.softmax(attn_logits.astype(jnp.float32), axis=-1).astype(attn_logits.dtype)
        qkv = jnp.einsum("BHGTS,BSHD->BTHGD", attn_weights, cache.v_cache[...])
        return self.o_proj(qkv.reshape((-1, t, HEADS, HEAD_DIM)))


class DecoderLayer(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.input_layernorm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.gate_proj = Einsum("BTD,DF->BTF", (WIDTH, HIDDEN), config.dtype, rngs=rngs)
        self.up_proj = Einsum("BTD,DF->BTF", (WIDTH, HIDDEN), config.dtype, rngs=rngs)
        self.down_proj = Einsum("BTF,FD->BTD", (HIDDEN, WIDTH), config.dtype, rngs=rngs)

    def __call__(self, x, cache: LayerCache, segment_ids):
        x = x + self.attn(self.input_layernorm(x.astype(jnp.float32)), cache, segment_ids)
        mlp_inputs = self.post_attention_layernorm(x.astype(jnp.float32))
        return x + self.down_proj(nnx.silu(self.gate_proj(mlp_inputs)) * self.up_proj(mlp_inputs))


class Qwen3(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedder = nnx.Embed(VOCAB, WIDTH, dtype=config.dtype, rngs=rngs)
        self.layers = nnx.List([DecoderLayer(config, rngs=rngs) for _ in range(config.num_layers)])
        self.final_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.lm_head = Einsum("BTD,DV->BTV", (WIDTH, VOCAB), config.dtype, rngs=rngs)

    def __call__(self, tokens, segment_ids, cache):
        """Logits [B, T, V]; tokens and segment_ids (0 at padding, which is on the left) are [B, T]."""
        x = self.embedder(tokens)
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x = layer(x, layer_cache, segment_ids)
        return self.lm_head(self.final_norm(x.astype(jnp.float32)))

    def init_cache(self, batch_size: int, cache_size: int):
        return nnx.List([LayerCache(batch_size, cache_size, self.config.dtype) for _ in self.layers])


def make(seed: int, **options) -> Qwen3:
    return Qwen3(ModelConfig(**options), rngs=nnx.Rngs(seed))


def loss(model: Qwen3, tokens):
    """Mean cross entropy of the next token; tokens are [B, T], padded on the left with 0."""
    segment_ids = (tokens != 0).astype(jnp.int32)
    logits = model(tokens, segment_ids, model.init_cache(*tokens.shape))[:, :-1].astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.average(losses, weights=segment_ids[:, :-1].astype(jnp.float32))
