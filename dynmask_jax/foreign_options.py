"""What other libraries' attention takes as options, and what it is here."""

from collections.abc import Iterable

REMEDIES = {
    "is_causal": "give the mask Causal(), or & Causal()",
    "mask": "the mask is the fourth argument, an expression such as Causal() & Window(512)",
    "causal": "give the mask Causal(), or & Causal()",
    "mask_mod": "the fourth argument is a mask: Predicate(lambda q, k: …), over positions and segments",
    "score_mod": "a soft cap is soft_cap, what hides pairs is a mask, and what is added to scores is bias",
    "attn_bias": "it is bias here, an expression over positions and segments: ALiBi, BiasFunction, …",
    "dropout_rate": "it is dropout=Dropout(rate, key)",
    "dropout_rng": "it is dropout=Dropout(rate, key)",
    "dropout_p": "it is dropout=Dropout(rate, key)",
    "alibi_slopes": "it is bias=ALiBi(slopes)",
    "return_residual": "it is return_lse here, and differentiable",
    "return_residuals": "it is return_lse here, and differentiable",
    "query_seq_lengths": "padding is segment 0: plan(mask & SameSegment(), Tokens(position, segment))",
    "key_value_seq_lengths": "padding is segment 0: plan(mask & SameSegment(), Tokens(position, segment))",
    "attn_logits_soft_cap": "it is soft_cap here",
    "logits_scale": "it is scale here",
    "local_window_size": "give the mask Window(n), which counts the query's own token",
    "window_size": "give the mask Window(n), which counts the query's own token",
    "attn_mask": "the mask is the fourth argument, an expression such as Causal() & Window(512)",
    "block_mask": "the fourth argument is a mask's expression, or a plan, which has its blocks",
    "key_padding_mask": "padding is segment 0: plan(mask & SameSegment(), Tokens(position, segment))",
    "enable_gqa": "it is so wherever k has fewer heads than q",
    "s_aux": "it is sinks here",
    "logit_cap": "it is soft_cap here",
    "segment_ids": "give a plan: plan(mask & SameSegment(), Tokens(position, segment))",
    "logits_soft_cap": "it is soft_cap here",
    "softcap": "it is soft_cap here",
    "sm_scale": "it is scale here",
    "softmax_scale": "it is scale here",
    "implementation": "it is backend here: {backends}",
}
"""What other libraries call an option -> what it is here."""


def no_option(name: str, backends: Iterable[str]) -> str:
    """The message for an option that `attention` has not."""
    remedy = REMEDIES.get(
        name, "its options are scale, soft_cap, sinks, bias, dropout, backend, sharding and return_lse"
    )
    return f"attention has no option {name!r}: {remedy.format(backends=', '.join(backends))}"
