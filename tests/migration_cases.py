"""What each row of docs/migration.md must give, by section and by its cell `there`.

Rules that the document only names are written out here pair by pair, as the sources that it cites state them.
"""

import math
from collections.abc import Callable

import jax
import numpy as np
from migration_checks import (
    DOCUMENT,
    Check,
    S,
    T,
    alibi_bias,
    blocks,
    counts,
    every,
    factor,
    flax_mask,
    fragments,
    gives,
    grows,
    jax_nn,
    jax_nn_bias,
    lengths_of,
    linen_layer,
    mask_mod,
    nnx_bias,
    nnx_dropout,
    nnx_layer,
    nothing_visible,
    pairs,
    plans_blocks,
    refuses,
    shows,
    softmax,
    softmax_of,
    splash,
    splash_mask,
    t5_bias,
    tokamax_mask,
)

from dynmask_jax import Unsupported

ENDS_OF_TEXT = [8, 15]
PARTS = [4] * 5 + [5] * 3 + [6] * 4 + [8] * 4 + [9] * 2 + [10] * 3 + [11] * 3


def natten(q: int, k: int) -> bool:
    """A 3 x 3 square in a grid of 4 x 4, whose centre keeps one cell away from the edges."""
    centre = [min(max(index, 1), 2) for index in (q // 4, q % 4)]
    return all(abs(at - key) <= 1 for at, key in zip(centre, (k // 4, k % 4), strict=True))


def shared_prefix(q: int, k: int) -> bool:
    """Causal in one's own document; an answer sees all of its group's prompt too."""
    mine, other = PARTS[q], PARTS[k]
    return (mine == other and q >= k) or (mine % 4 > 0 and other == mine - mine % 4)


def dm8(step: int) -> int:
    return min(8 + step // 8, 24)


def over_40(share: Callable[[float], float], round_to: int = 1) -> Check:
    """8 + int((24 − 8) · share(step / 40)), rounded down, and 24 from step 40 on."""
    return counts(lambda step: 24 if step >= 40 else (8 + int(16 * share(step / 40))) // round_to * round_to)


CAUSAL = pairs(lambda q, k: q >= k)
DOCUMENTS = pairs(lambda q, k: DOCUMENT[q] == DOCUMENT[k])
ALL = np.ones((T, T), bool)
LENGTHS, KV_LENGTHS = [9, 7, 8], [12, 7, 13]

EXPECTED: dict[str, dict[str, Check]] = {
    "PyTorch FlexAttention": {
        "noop_mask": shows(ALL),
        "q_idx >= kv_idx": mask_mod,
        "(q_idx >= kv_idx) & (q_idx - kv_idx <= w)": mask_mod,
        "(q_idx - kv_idx).abs() <= w": mask_mod,
        "(kv_idx < n) | (q_idx >= kv_idx)": mask_mod,
        "(kv_idx <= prefix_length[b]) | (q_idx >= kv_idx)": mask_mod,
        "document_id[q_idx] == document_id[kv_idx]": mask_mod,
        "generate_doc_mask_mod(causal_mask, offsets)": shows(DOCUMENTS & CAUSAL),
        "generate_doc_mask_mod(prefix_lm, offsets)": shows(
            blocks(lambda q, k, *_: k < 3 or q >= k, LENGTHS, LENGTHS)
        ),
        "and_masks(causal, window)": shows(pairs(lambda q, k: 0 <= q - k <= 5)),
        "or_masks(prefix, causal)": shows(pairs(lambda q, k: q >= k or k < 6)),
        "(q_idx >= kv_idx) & (q_idx - kv_idx < n * stride) & ((q_idx - kv_idx) % stride == 0)": mask_mod,
        "(q_idx >= kv_idx) & (q_idx - kv_idx < window[h])": mask_mod,
        "((q_idx - kv_idx).abs() <= w) | is_global[q_idx] | is_global[kv_idx]": mask_mod,
        "generate_natten(4, 4, 3, 3)": shows(pairs(natten, 16, 16)),
        "generate_shared_prefix_mask_mod(offsets, prefix_document_id)": shows(pairs(shared_prefix)),
        "create_block_mask(causal, None, None, T, S)": shows(pairs(lambda q, k: q >= k, T, S)),
        "create_block_mask(causal, None, None, T, T, BLOCK_SIZE=(8, 6))": plans_blocks(CAUSAL, 8, 6),
        "flex_attention(q, k, v, block_mask=causal) with [B, H, T, D]": gives(
            lambda names: softmax(names, CAUSAL)[0].swapaxes(1, 2)
        ),
        "score_mod: 20 * tanh(score / 20)": softmax_of(CAUSAL, soft_cap=20.0),
        "score_mod: where(q_idx >= kv_idx, score, -inf)": softmax_of(CAUSAL),
        "score_mod: score - slope[h] * (q_idx - kv_idx)": softmax_of(CAUSAL, bias=alibi_bias()),
        "score_mod: score + (q_idx - kv_idx)": softmax_of(
            CAUSAL, bias=np.subtract.outer(*[np.arange(T)] * 2)
        ),
        "flex_attention(q, k, v[..., :4], block_mask=causal)": gives(
            lambda names: softmax(names, CAUSAL)[0][..., :4]
        ),
        "flex_attention(..., scale=0.3)": softmax_of(CAUSAL, scale=0.3),
        "flex_attention(..., enable_gqa=True)": softmax_of(ALL),
        "flex_attention(..., return_lse=True)": gives(lambda names: softmax(names, CAUSAL)),
    },
    "JAX splash attention": {
        "FullMask((T, T))": splash_mask,
        "CausalMask((T, T))": splash_mask,
        "CausalMask((T, S))": splash_mask,
        "CausalMask((T, S), offset=offset)": splash_mask,
        "LocalMask((T, T), (left, right), offset=0)": splash_mask,
        "LocalMask((T, T), (left, 0), offset=0)": splash_mask,
        "LocalMask((T, T), (left, None), offset=0)": splash_mask,
        "LocalMask((T, T), (None, right), offset=0)": splash_mask,
        "LocalMask((T, S), (left, right), offset=offset)": splash_mask,
        "ChunkedCausalMask((T, T), n)": splash_mask,
        "CausalMask((T, T)) & LocalMask((T, T), (left, right), offset=0)": splash_mask,
        "LocalMask((T, T), (left, right), offset=0) | ChunkedCausalMask((T, T), n)": splash_mask,
        "MultiHeadMask([LocalMask((T, T), (n - 1, 0), offset=0) for n in (2, 4, 8, 24)])": splash_mask,
        "MultiHeadMask([CausalMask((T, T)), FullMask((T, T))])": splash_mask,
        "CausalMask((T, T)) with SegmentIds(q=document_id, kv=document_id)": shows(DOCUMENTS & CAUSAL),
        "kernel(q * scale, k, v)": splash(scale=0.3),
        "kernel(q, k, v)": splash(),
        "attn_logits_soft_cap=5.0": splash(soft_cap=5.0),
        "kernel(q, k, v, sinks=sinks)": splash(sinks=np.float32([-1, 0, 1, 2])),
        "save_residuals=True": splash(residuals=True),
    },
    "jax.nn.dot_product_attention": {
        "is_causal=True": jax_nn,
        "is_causal=True with T queries and fewer keys": gives(
            lambda names: jax.nn.dot_product_attention(
                names["q"], names["k"][:, :18], names["v"][:, :18], is_causal=True
            )
        ),
        "local_window_size=w": jax_nn,
        "local_window_size=(left, right)": jax_nn,
        "local_window_size=(w - 1, 0)": jax_nn,
        "key_value_seq_lengths=jnp.array([20, 13])": jax_nn,
        "query_seq_lengths=jnp.array([24, 15]), key_value_seq_lengths=jnp.array([20, 13])": jax_nn,
        "mask=jnp.tril(jnp.ones((1, 1, T, T), bool))": jax_nn,
        "mask=jnp.zeros((1, 1, T, T), bool)": gives(nothing_visible),
        "bias=t5_bias": jax_nn_bias(t5_bias),
        "bias=alibi, is_causal=True": jax_nn_bias(lambda _: alibi_bias(), is_causal=True),
        "scale=0.3": jax_nn,
        'implementation="xla"': softmax_of(CAUSAL),
        "is_causal=True, return_residual=True": jax_nn,
    },
    "Flax": {
        "make_causal_mask(x)": flax_mask,
        "make_attention_mask(padding, padding)": flax_mask,
        "make_attention_mask(jnp.ones(T), padding)": flax_mask,
        "make_attention_mask(document_id, document_id, jnp.equal)": flax_mask,
        "make_attention_mask(position, position, lambda q, k: q - k < w)": flax_mask,
        "combine_masks(make_causal_mask(x), make_attention_mask(padding, padding))": flax_mask,
        "nnx.MultiHeadAttention(...)(x, mask=make_causal_mask(x))": gives(nnx_layer),
        "nnx.MultiHeadAttention(...)(x, is_causal=True)": gives(nnx_layer),
        "linen.MultiHeadDotProductAttention(2)(x, mask=make_causal_mask(x))": linen_layer(CAUSAL),
        "linen.MultiHeadDotProductAttention(2)(x, mask=combine_masks(causal, documents))": linen_layer(
            DOCUMENTS & CAUSAL
        ),
        "dot_product_attention(q, k, v, dropout_rng=rng, dropout_rate=0.1)": gives(
            lambda names: softmax(names, ALL, factor=factor(0.1, names["rng"], 4, broadcast=True))[0]
        ),
        "nnx.MultiHeadAttention(..., dropout_rate=0.1)(x, deterministic=False)": gives(nnx_dropout),
        "nnx.MultiHeadAttention(...)(x) with ALiBi": nnx_bias(lambda _: alibi_bias(), CAUSAL),
        "nnx.MultiHeadAttention(...)(x) with T5's learned bias": nnx_bias(t5_bias, ALL),
        "linen.MultiHeadDotProductAttention(4)(x) with T5's learned bias": linen_layer(ALL, 4, t5_bias),
    },
    "tokamax": {
        "Mask(is_causal=True)": tokamax_mask,
        "Mask(k_start=jnp.maximum(0, jnp.arange(T) + 1 - w), is_causal=True)": tokamax_mask,
        "Mask(k_start=document_start, is_causal=True)": tokamax_mask,
        "Mask(k_start=jnp.arange(T) // 3, k_end=jnp.arange(T) // 3 + 7)": tokamax_mask,
        "Mask(q_start=jnp.arange(T) // 2, q_end=jnp.arange(T) // 2 + 9)": tokamax_mask,
        "Mask(is_causal=True) & Mask(k_end=n)": tokamax_mask,
        "is_causal=True, q_indices=jnp.arange(T) * 2, k_indices=jnp.arange(S)": shows(
            pairs(lambda q, k: 2 * q >= k, T, S)
        ),
        "tokamax.dot_product_attention(..., local_window_size=(left, right))": shows(
            pairs(lambda q, k: q - 4 <= k < q + 2 + 1)
        ),
        "tokamax.dot_product_attention(..., logits_soft_cap=5.0)": softmax_of(ALL, soft_cap=5.0),
        "return_residuals=True": gives(lambda names: softmax(names, CAUSAL)),
    },
    "SkyLadder": {
        "get_fragment_lens_fixed_length(chunk, w)": shows(fragments([5, 5, 5, 5, 4])),
        "get_fragment_lens_optimized(chunk, []) (intra-document)": shows(fragments(LENGTHS)),
        "fragments of w that also end where a document does": shows(fragments([5, 4, 1, 5, 1, 4, 4])),
        "get_fragment_lens_fixed_length_intramask(chunk, w)": shows(
            fragments(lengths_of([5, 10, 15, 20, *ENDS_OF_TEXT]))
        ),
        "window_size=w": shows(pairs(lambda q, k: 0 <= q - k <= 5 - 1)),
        "calculate_mask_length_linear_schedule, 8 to 24 over 40": over_40(lambda x: x),
        "calculate_mask_length_sin_schedule, 8 to 24 over 40": over_40(lambda x: math.sin(math.pi / 2 * x)),
        "calculate_mask_length_exp_schedule, 8 to 24 over 40": counts(
            lambda step: 24 if step >= 40 else int(8 * (24 / 8) ** (step / 40))
        ),
        "round_to=4, 8 to 24 over 40": over_40(lambda x: x, round_to=4),
        "dm8, 8 to 24": counts(dm8),
        "tiny_LLaMA_1b_8k_dm8": grows(lambda step: fragments(lengths_of(every(dm8(step))))),
        "tiny_LLaMA_1b_8k_intradm8": grows(
            lambda step: fragments(lengths_of([*every(dm8(step)), *ENDS_OF_TEXT])),
            segment=np.array(DOCUMENT) + 1,
        ),
    },
    "xFormers": {
        "LowerTriangularMask()": shows(CAUSAL),
        "LowerTriangularMask() with T queries and S keys": shows(pairs(lambda q, k: k <= q, T, S)),
        "LowerTriangularMaskWithTensorBias(alibi)": softmax_of(CAUSAL, bias=alibi_bias()),
        "memory_efficient_attention(q, k, v, p=0.1)": gives(
            lambda names: softmax(names, ALL, factor=factor(0.1, names["rng"], 4, broadcast=False))[0]
        ),
        "LowerTriangularFromBottomRightMask()": shows(pairs(lambda q, k: S - k >= T - q, T, S)),
        "LowerTriangularFromBottomRightLocalAttentionMask(w)": shows(
            pairs(lambda q, k: 0 <= (S - k) - (T - q) < 5, T, S)
        ),
        "LocalAttentionFromBottomRightMask(window_left=left, window_right=right)": shows(
            pairs(lambda q, k: q - 4 <= k + T - S <= q + 2, T, S)
        ),
        "BlockDiagonalMask.from_seqlens([9, 7, 8])": shows(blocks(lambda *_: True, LENGTHS, LENGTHS)),
        "BlockDiagonalMask.from_seqlens([9, 7, 8], [12, 7, 13])": shows(
            blocks(lambda *_: True, LENGTHS, KV_LENGTHS)
        ),
        "BlockDiagonalCausalMask.from_seqlens([9, 7, 8])": shows(
            blocks(lambda q, k, *_: k <= q, LENGTHS, LENGTHS)
        ),
        "BlockDiagonalCausalMask.from_seqlens([9, 7, 8], [12, 7, 13])": shows(
            blocks(lambda q, k, *_: k <= q, LENGTHS, KV_LENGTHS)
        ),
        "BlockDiagonalCausalFromBottomRightMask.from_seqlens([9, 7, 8], [12, 7, 13])": shows(
            blocks(lambda q, k, t, s: s - k >= t - q, LENGTHS, KV_LENGTHS)
        ),
        "BlockDiagonalCausalLocalAttentionMask, window w": shows(
            blocks(lambda q, k, *_: q - 5 < k <= q, LENGTHS, LENGTHS)
        ),
        "BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens([2, 1, 3], 6, [4, 6, 5])": (
            shows(blocks(lambda q, k, t, s: s - k >= t - q, [2, 1, 3], [4, 6, 5], room=6))
        ),
    },
    "Not supported": {
        "additive bias, [..., T, S]": refuses(
            TypeError, "got an array (1, 4, 24, 24)", "goes to jax.nn.dot_product_attention"
        ),
        "score_mod as a function": refuses(TypeError, "'score_mod'", "what is added to scores is bias"),
        "an additive bias in Flax": refuses(
            TypeError, "got an array (1, 4, 24, 24)", "RelativeBuckets(table)"
        ),
        "attn_bias=array": refuses(TypeError, "'attn_bias'", "it is bias here, an expression"),
        "NumpyMask(array), mask=array": refuses(TypeError, "masks are expressions", "segment of Tokens"),
        "Mask(bool_mask) beside other masks": refuses(
            TypeError, "masks are expressions", "segment of Tokens"
        ),
        "a mask array in a Flax layer": refuses(Unsupported, "write what it says of pairs as an expression"),
        "a mask_mod that indexes a tensor": refuses(TypeError, "jnp.asarray(table)[q.position]"),
        "is_causal=True, causal=True": refuses(TypeError, "give the mask Causal()"),
        "dropout_rate=0.1 as an option of attention": refuses(TypeError, "it is dropout=Dropout(rate, key)"),
        "sown attention weights, sow_weights=True": refuses(Unsupported, "sow_weights must be False"),
        "a learned or traced scale": refuses(TypeError, "scale must be a Python number"),
        "segments without tokens": refuses(ValueError, "make a plan of the tokens"),
        "segments without tokens in a Flax layer": refuses(ValueError, "set_tokens(model, Tokens("),
        "causal with other numbers of queries and keys": refuses(ValueError, "Tokens.sequence(1, start=23)"),
        "second-order gradients": refuses(ValueError, "Reverse-mode differentiation does not work"),
        "forward-mode derivatives, jax.jvp": refuses(TypeError, "jvp"),
    },
}
"""Section -> `there` -> what its row must be."""
