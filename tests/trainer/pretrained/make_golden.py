"""Writes tiny random models of transformers' own code, with their logits, into the folder `golden` beside it.

    python -m venv v && v/bin/pip install torch==2.13.0 transformers==5.24.0
    v/bin/python tests/trainer/pretrained/make_golden.py

Every option that an architecture uses is on in some model, and texts are longer than the window and the
original context. Weights are random everywhere, norms and biases too, so that none of them is without effect.
"""

import shutil
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"
LENGTH, WINDOW, ORIGINAL = 48, 6, 16
SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": ORIGINAL}


def rope(kind: str = "default", theta: float = 10_000.0, **options) -> dict:
    return {"rope_type": kind, "rope_theta": theta, **options}


MODELS = {
    "llama": {
        "model_type": "llama",
        "head_dim": 8,
        "rope_parameters": rope("llama3", 500.0, factor=4.0, **LLAMA3),
        "rms_norm_eps": 1e-5,
    },
    "llama-bias": {
        "model_type": "llama",
        "rope_parameters": rope("linear", factor=3.0),
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "llama-ntk": {
        "model_type": "llama",
        "rope_parameters": rope("dynamic", factor=2.0),
        "max_position_embeddings": ORIGINAL,
        "num_key_value_heads": 4,
    },
    "mistral": {
        "model_type": "mistral",
        "head_dim": 6,
        "sliding_window": WINDOW,
        "rope_parameters": rope(theta=1_000.0),
    },
    "qwen2": {
        "model_type": "qwen2",
        "num_hidden_layers": 3,
        "head_dim": 8,
        # A base and a context at which the default beta_fast and beta_slow bound features that there are.
        "rope_parameters": rope("yarn", 20.0, factor=4.0, original_max_position_embeddings=512),
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-2,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
    },
    "qwen3": {
        "model_type": "qwen3",
        "head_dim": 8,
        "rope_parameters": rope(
            "yarn",
            200.0,
            factor=4.0,
            original_max_position_embeddings=ORIGINAL,
            beta_fast=4.0,
            beta_slow=0.5,
            attention_factor=1.3,
        ),
        "tie_word_embeddings": True,
        "attention_bias": True,
        "rms_norm_eps": 1e-2,
    },
    "gemma2": {
        "model_type": "gemma2",
        "num_hidden_layers": 3,
        "head_dim": 8,
        "query_pre_attn_scalar": 5,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "rope_parameters": rope(),
    },
    "gemma3_text": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 5,
        "head_dim": 8,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 5,
        "sliding_window": WINDOW,
        "layer_types": [
            *["sliding_attention", "full_attention"] * 2,
            "sliding_attention",
        ],
        "final_logit_softcapping": 4.0,
        "rms_norm_eps": 1e-2,
        "rope_parameters": {
            "full_attention": rope("linear", 2_000.0, factor=4.0),
            "sliding_attention": rope(theta=100.0),
        },
        "dtype": "bfloat16",
    },
}
SHARDED = "gemma2"
"""The model whose weights are in several files."""


def make(name: str, seed: int):
    """Writes one model: its folder as transformers saves it, and `logits.safetensors`."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    options = dict(MODELS[name])
    dtype = getattr(torch, options.pop("dtype", "float32"))
    config = AutoConfig.for_model(options.pop("model_type"), **{**SIZES, **options})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_((0.4 * torch.randn_like(weight)).to(dtype))
    folder = GOLDEN / name
    shutil.rmtree(folder, ignore_errors=True)
    shards = {"max_shard_size": "12KB"} if name == SHARDED else {}
    model.to(dtype).save_pretrained(folder, **shards)
    tokens = torch.randint(0, config.vocab_size, (2, LENGTH))
    # Loaded anew: the model above has its rotary frequencies in the dtype too.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = model(tokens).logits
    save_file({"tokens": tokens.int(), "logits": logits.contiguous()}, folder / "logits.safetensors")
    print(
        f"{name}: {sum(w.numel() for w in model.parameters()):,} weights, logits to {logits.abs().max():.2f}"
    )


if __name__ == "__main__":
    for seed, name in enumerate(MODELS):
        make(name, seed)
