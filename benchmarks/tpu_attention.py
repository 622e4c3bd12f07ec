"""Attention and its gradient, of ours and of splash attention: the programs of `tpu_schedule`."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from dynmask_jax import ALiBi, Causal, Dropout, Tokens, Window, attention
from dynmask_jax.plans import plan_in

HEADS, BLOCK, STRIP = 8, 512, 128


def ours(tokens: int, head_dim: int, scores: str | None = None, strips: str | None = None):
    """Our gradient under a causal window whose length is data: the program of a whole curriculum.

    `scores` adds a "bias", `ALiBi` of constant slopes, or "dropout" of 0.1. With `strips`, the plan tells
    strips of 128 keys apart.
    """
    fine = (STRIP, STRIP) if strips else None

    def attend(q, k, v, window, seed):
        mask, sequence = Causal() & Window(window), Tokens.sequence(tokens)
        how = {"bias": ALiBi.for_heads(HEADS), "dropout": Dropout(0.1, seed)}
        return attention(
            q,
            k,
            v,
            plan_in(mask, sequence, sequence, blocks=(BLOCK, BLOCK), fine=fine),
            backend="tpu",
            **({scores: how[scores]} if scores else {}),
        )

    array = jax.ShapeDtypeStruct((1, tokens, HEADS, head_dim), jnp.bfloat16)
    data = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.uint32)
    return gradient(attend), (array, array, array, *data)


def splash(mask: str, tokens: int, head_dim: int, backward: str):
    """Splash attention's gradient, backward in "one kernel" or "two kernels", and the shapes of q, k, v."""
    shape = (tokens, tokens)
    one_head = splash_mask.CausalMask(shape) if mask == "causal" else splash_mask.FullMask(shape)
    fused = backward == "one kernel"
    sizes = splash_kernel.BlockSizes(
        block_q=BLOCK,
        block_kv=BLOCK,
        block_kv_compute=BLOCK,
        block_q_dkv=BLOCK,
        block_kv_dkv=BLOCK,
        block_kv_dkv_compute=BLOCK,
        block_q_dq=None if fused else BLOCK,
        block_kv_dq=None if fused else BLOCK,
        use_fused_bwd_kernel=fused,
    )
    heads = splash_mask.MultiHeadMask([one_head] * HEADS)
    attend = splash_kernel.make_splash_mha(mask=heads, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    return gradient(attend), (jax.ShapeDtypeStruct((HEADS, tokens, head_dim), jnp.bfloat16),) * 3


def gradient(attend):
    """The gradient of the output's sum by q, k and v."""
    return jax.grad(lambda *args: attend(*args).astype(jnp.float32).sum(), (0, 1, 2))
