"""A decoder that calls attention as Llama 3 in Tunix does; the code is ours.

https://github.com/google/tunix/blob/main/tunix/models/llama3/model.py: one `attention_mask` array for all
layers, grouped query heads, an optional cache, and layers that are computed again in the backward pass.
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
    rope_theta: float = 500_000.0
    dtype: jax.typing.DTypeLike = jnp.float32
    remat: bool = False


class Einsum(nnx.Module):
    def __init__(self, einsum_str: str, shape: tuple[int, ...], dtype, *, rngs: nnx.Rngs):
        self.einsum_str, self.dtype = einsum_str, dtype
        self.w = nnx.Param(nnx.initializers.normal(0.2)(rngs.params(), shape))

    def __call__(self, x):
        return jnp.einsum(self.einsum_str, x.astype(self.dtype), self.w[...].astype(self.dtype))


def apply_rope(inputs, positions, rope_theta: float):
    """Rotates inputs [B, L, N, H] by their positions [B, L]."""
    timescale = rope_theta ** (jnp.arange(0, HEAD_DIM, 2, dtype=jnp.float32) / HEAD_DIM)
    angle = positions[:, :, None, None].astype(jnp.float32) / timescale[None, None, None, :]
    first, second = jnp.split(inputs.astype(jnp.float32), 2, axis=-1)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(inputs.dtype)


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.q_proj = Einsum("BTD,DNH->BTNH", (WIDTH, HEADS, HEAD_DIM), config.dtype, rngs=rngs)
        self.k_proj = Einsum("BSD,DKH->BSKH", (WIDTH, KV_HEADS, HEAD_DIM), config.dtype, rngs=rngs)
        self.v_proj = Einsum("BSD,DKH->BSKH", (WIDTH, KV_HEADS, HEAD_DIM), config.dtype, rngs=rngs)
        self.o_proj = Einsum("BTNH,NHD->BTD", (HEADS, HEAD_DIM, WIDTH), config.dtype, rngs=rngs)

    def __call__(self, x, segment_pos, cache, attn_mask):
        query_proj = apply_rope(self.q_proj(x), segment_pos, self.config.rope_theta)
        key_proj = apply_rope(self.k_proj(x), segment_pos, self.config.rope_theta)
        value_proj = self.v_proj(x)

        if cache is not None:
            slice_indices = (0, cache["end_index"][0], 0, 0)
            key_proj = jax.lax.dynamic_update_slice(cache["k"], key_proj, slice_indices)
            value_proj = jax.lax.dynamic_update_slice(cache["v"], value_proj, slice_indices)
            cache = {"k": key_proj, "v": value_proj, "end_index": cache["end_index"] + x.shape[1]}

        b, t, qh, d = query_proj.shape
        query_proj = query_proj.reshape((b, t, KV_HEADS, qh // KV_HEADS, d))
        attn = jnp.einsum("BTHGD,BSHD->BHGTS", query_proj, key_proj) * d**-0.5
        if attn_mask is not None:
            attn = jnp.where(attn_mask[:, None, None, :, :], attn, K_MASK)
        attn = jax.nn.softmax(attn.astype(jnp.float32), axis=-1).astype(key_proj.dtype)
        qkv = jnp.einsum("BHGTS,BSHD->BTHGD", attn, value_proj).reshape((b, t, qh, d))
        return cache, self.o_proj(qkv)


class DecoderLayer(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.input_layernorm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.gate_proj = Einsum("BTD,DF->BTF", (WIDTH, HIDDEN), config.dtype, rngs=rngs)
        self.up_proj = Einsum("BTD,DF->BTF", (WIDTH, HIDDEN), config.dtype, rngs=rngs)
        self.down_proj = Einsum("BTF,FD->BTD", (HIDDEN, WIDTH), config.dtype, rngs=rngs)

    def __call__(self, x, segment_pos, cache, attn_mask):
        attn_inputs = self.input_layernorm(x.astype(jnp.float32))
        cache, attn_output = self.attn(attn_inputs, segment_pos, cache, attn_mask)
        x = x + attn_output
        mlp_inputs = self.post_attention_layernorm(x.astype(jnp.float32))
        return cache, x + self.down_proj(nnx.silu(self.gate_proj(mlp_inputs)) * self.up_proj(mlp_inputs))


class Llama3(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedder = nnx.Embed(VOCAB, WIDTH, dtype=config.dtype, rngs=rngs)
        self.layers = nnx.List([DecoderLayer(config, rngs=rngs) for _ in range(config.num_layers)])
        self.final_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.lm_head = Einsum("BTD,DV->BTV", (WIDTH, VOCAB), config.dtype, rngs=rngs)

    def __call__(self, input_tokens, positions, cache, attention_mask):
        """Logits [B, L, V], and the cache; tokens, positions: [B, L]; attention_mask: [B, L, L']."""
        run_layer = nnx.remat(DecoderLayer.__call__) if self.config.remat else DecoderLayer.__call__
        x = self.embedder(input_tokens)
        cache = [None] * len(self.layers) if cache is None else list(cache)
        for i, layer in enumerate(self.layers):
            cache[i], x = run_layer(layer, x, positions, cache[i], attention_mask)
        return self.lm_head(self.final_norm(x.astype(jnp.float32))), cache

    def init_cache(self, batch_size: int, cache_size: int):
        kv = jnp.zeros((batch_size, cache_size, KV_HEADS, HEAD_DIM), self.config.dtype)
        return [{"k": kv, "v": kv, "end_index": jnp.zeros(batch_size, jnp.int32)} for _ in self.layers]


def make(seed: int, **options) -> Llama3:
    return Llama3(ModelConfig(**options), rngs=nnx.Rngs(seed))


def loss(model: Llama3, batch):
    """Mean cross entropy of the next token; input_tokens and input_mask (False at padding) are [B, L]."""
    tokens, input_mask = batch["input_tokens"], batch["input_mask"]
    positions = jnp.maximum(jnp.cumsum(input_mask, axis=-1) - 1, 0)
    causal_mask = jnp.tril(jnp.ones((tokens.shape[1], tokens.shape[1]), bool))
    attention_mask = input_mask[:, None, :] & causal_mask[None, :, :]
    logits, _ = model(tokens, positions, None, attention_mask)
    logits = logits[:, :-1].astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.average(losses, weights=input_mask[:, 1:].astype(jnp.float32))
