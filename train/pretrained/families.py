"""The architectures of transformers that the Transformer computes, one row each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """An architecture of transformers.

    Attributes:
      architecture: the class of its language model.
      fixed: the options of `train.config.model.Model` that all its models have.
      defaults: fields of config.json and their values where they are left out, as in transformers 5.24.
    """

    architecture: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)


GEMMA: Mapping[str, Any] = {"post_norms": True, "norm_unit_offset": True}
GEMMA_FIELDS: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "attention_bias": False,
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        defaults={"max_position_embeddings": 2048, "attention_bias": False},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        fixed={"qkv_bias": True},
        defaults={"num_key_value_heads": 32, "max_position_embeddings": 32_768},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        fixed={"qk_norm": True},
        defaults={
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_position_embeddings": 32_768,
            "attention_bias": False,
        },
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        fixed=GEMMA,
        defaults={
            **GEMMA_FIELDS,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        fixed={**GEMMA, "qk_norm": True},
        defaults={**GEMMA_FIELDS, "max_position_embeddings": 131_072, "final_logit_softcapping": None},
    ),
}
"""By the `model_type` of config.json."""
