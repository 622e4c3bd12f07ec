"""Queries and keys as the GPU kernels take them: arrays, tokens, and the words of dropout."""

from dynmask_jax.backends.gpu_blocks import filled, filled_tokens
from dynmask_jax.backends.gpu_lines import Side
from dynmask_jax.plans import Plan
from dynmask_jax.scores import Scores


def query_side(scores: Scores, plan: Plan, arrays: tuple) -> Side:
    """Of arrays `[B, T, N, …]` that are filled up."""
    drop = scores.dropout
    words = () if drop is None else drop.of_queries(plan.q_tokens)
    return Side(
        filled_tokens(plan.q_tokens, plan.block_q), tuple(filled(x, plan.block_q) for x in words), arrays
    )


def key_side(scores: Scores, plan: Plan, arrays: tuple) -> Side:
    """Of arrays `[B, S, K, …]` that are filled up."""
    drop = scores.dropout
    words = () if drop is None else (filled(drop.of_keys(plan.kv_tokens), plan.block_k),)
    return Side(filled_tokens(plan.kv_tokens, plan.block_k), words, arrays)
