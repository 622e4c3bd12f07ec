"""config.json in, options out, and back: what is understood, and what is refused by name."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from train.config.model import Model, RopeScaling
from train.pretrained.config import model_of
from train.pretrained.export_config import canonical, config_of

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(folder.name for folder in GOLDEN.iterdir() if folder.name != "llama-ntk")
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 128,
}
GEMMA3 = {**LLAMA, "model_type": "gemma3_text", "num_hidden_layers": 8}


def config(name: str) -> dict:
    return json.loads((GOLDEN / name / "config.json").read_text(encoding="utf-8"))


def test_fields_that_are_left_out_have_the_values_of_transformers():
    assert model_of(LLAMA) == Model(
        layers=2,
        width=64,
        heads=4,
        kv_heads=4,
        hidden=96,
        head_dim=16,
        vocab_size=100,
        max_position_embeddings=128,
    )
    gemma = model_of(GEMMA3)
    assert (gemma.head_dim, gemma.kv_heads, gemma.local_window) == (256, 4, 4096)
    assert (gemma.rope_theta, gemma.rope_local_theta) == (1_000_000.0, 10_000.0)
    assert (gemma.embedding_scale, gemma.query_scale) == (8.0, 1 / 16)
    assert gemma.pattern == ("local",) * 5 + ("global",)
    assert gemma.rest == ("local", "local")
    assert gemma.activation == "gelu_tanh"
    assert gemma.post_norms
    assert gemma.qk_norm
    assert gemma.norm_unit_offset
    assert gemma.tied_embeddings
    assert gemma.logits_soft_cap is None


@pytest.mark.parametrize("name", NAMES)
def test_out_and_in_again_are_the_same_options(name):
    model = model_of(config(name))
    for source in (None, config(name)):
        assert canonical(model_of(config_of(model, "float32", source))) == canonical(model)
    assert config_of(model, config(name)["dtype"], config(name)) == config(name)


def test_what_training_changed_replaces_only_its_own_fields():
    source = {**config("llama"), "initializer_range": 0.5}
    model = replace(
        model_of(source),
        max_position_embeddings=512,
        rope_scaling=RopeScaling("yarn", 8.0, 64),
        rope_theta=7.0,
    )
    written = config_of(model, "float32", source)
    assert written["initializer_range"] == 0.5
    assert written["max_position_embeddings"] == 512
    assert "rope_parameters" not in written
    assert model_of(written) == model


def test_static_ntk_is_a_larger_base_to_transformers():
    model = replace(model_of(LLAMA), rope_scaling=RopeScaling("ntk", 4.0))
    written = config_of(model, "float32")
    assert written["rope_scaling"] is None
    assert written["rope_theta"] == pytest.approx(10_000.0 * 4 ** (16 / 14))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ({"type": "linear", "factor": 4}, RopeScaling("linear", 4.0)),
        ({"rope_type": "default"}, RopeScaling()),
        ({"rope_type": "yarn", "factor": 4.0}, RopeScaling("yarn", 4.0, 128)),
        (
            {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0},
            RopeScaling("yarn", 4.0, 128, attention_factor=1.0),
        ),
        (
            {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4},
            RopeScaling("llama3", 8.0, 128),
        ),
    ],
)
def test_rotary_scaling_as_transformers_4_and_5_write_it(kind, expected):
    older = {**LLAMA, "rope_theta": 5e5, "rope_scaling": kind}
    newer = {**LLAMA, "rope_parameters": {**kind, "rope_theta": 5e5}}
    assert model_of(older) == model_of(newer)
    assert (model_of(older).rope_theta, model_of(older).rope_scaling) == (5e5, expected)


def test_rotary_bases_of_gemma_3_as_transformers_4_and_5_write_them():
    older = {
        **GEMMA3,
        "rope_theta": 3e6,
        "rope_local_base_freq": 2e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    parts = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 3e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    assert model_of(older) == model_of({**GEMMA3, "rope_parameters": parts})
    assert model_of(older).rope_scaling == RopeScaling("linear", 8.0)
    assert model_of(older).rope_local_theta == 2e4


def test_windows_where_the_architecture_has_them():
    mistral = {**LLAMA, "model_type": "mistral", "sliding_window": 7, "num_key_value_heads": 4}
    assert (model_of(mistral).pattern, model_of(mistral).local_window) == (("local",), 7)
    assert model_of({**mistral, "sliding_window": None}).pattern == ("global",)
    qwen = {**mistral, "model_type": "qwen2", "max_window_layers": 1}
    assert model_of(qwen).pattern == ("global",)
    assert model_of({**qwen, "use_sliding_window": True}).pattern == ("global", "local")


@pytest.mark.parametrize(
    "more",
    [
        {"model_type": "qwen2", "use_mrope": False, "_attn_implementation_autoset": True},
        {
            "rope_interleaved": False,
            "is_llama_config": True,
            "transformers.js_config": {"kv_cache_dtype": {}},
        },
        {"model_type": "gemma2", "sliding_window": 64, "sliding_window_size": 64},
    ],
    ids=["Qwen2.5-0.5B", "SmolLM2", "gemma-2-9b"],
)
def test_fields_of_published_models_that_say_nothing_more(more):
    config = {**LLAMA, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
    model = model_of(config | more)
    kept = {name: value for name, value in more.items() if name in ("model_type", "sliding_window")}
    assert model == model_of(config | kept)
    assert (model.kv_heads, model.norm_eps) == (2, 1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mamba"}, "model_type must be one of llama, mistral, .*, got 'mamba'"),
        ({"model_type": ["llama"]}, r"model_type must be one of .*, got \['llama'\]"),
        (
            {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}},
            "got 'gemma3', .*: its text model alone is read, from a folder of model_type gemma3_text, which",
        ),
        ({"model_type": "mllama", "text_config": {"model_type": "mllama_text"}}, "got 'mllama'$"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
        ({"sliding_window": 8}, "not understood: sliding_window = 8"),
        ({"model_type": "qwen2", "use_mrope": True}, "not understood: use_mrope = True"),
        ({"rope_interleaved": True}, "not understood: rope_interleaved = True"),
        ({"model_type": "mistral", "max_window_layers": 1}, "not understood: max_window_layers = 1"),
        (
            {"model_type": "gemma2", "sliding_window_size": 8},
            "sliding_window_size must be sliding_window, 4096",
        ),
        ({"model_type": "gemma2", "sliding_window_pattern": 3}, "sliding_window_pattern must be 2, got 3"),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, "pattern must be at least 1, got 0"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 0}, "scalar must be positive, got 0"),
        (
            {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 0}},
            r"rope_parameters\.original_max_position_embeddings must be at least 1, got 0",
        ),
        (
            {"rope_theta": 1.0, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            r"model\.rope_theta must be above 1 with model\.rope_scaling\.kind yarn, .*, got 1\.0",
        ),
        ({"rope_theta": float("inf")}, r"model\.rope_theta must be finite, got inf"),
        ({"mlp_bias": True}, "fields that are not understood: mlp_bias = True"),
        ({"partial_rotary_factor": 0.5}, "not understood: partial_rotary_factor = 0.5"),
        (
            {"quantization_config": {"bits": 4}, "x": 1},
            "not understood: quantization_config = {'bits': 4}, x = 1",
        ),
        ({"hidden_act": "relu"}, "the activation must be one of silu, gelu_pytorch_tanh, got 'relu'"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size is '64', which is not of the type"),
        ({"hidden_size": True}, "hidden_size is True, which is not of the type"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "'dynamic' is not understood; give --model.rope-sc",
        ),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope' is not understood"),
        ({"rope_scaling": {"type": "linear"}}, "rope_parameters.factor is missing"),
        (
            {"rope_parameters": {"type": "linear", "factor": 2, "y": 3}},
            "not understood: rope_parameters.y = 3",
        ),
        ({"num_key_value_heads": 3}, r"model.kv_heads must divide model.heads \(4\), got 3"),
        (
            {"model_type": "gemma3_text", "attn_logit_softcapping": 5.0},
            "understood: attn_logit_softcapping = 5.0",
        ),
        (
            {"model_type": "qwen3", "layer_types": ["full_attention"]},
            "layer_types must be 2 of full_attention, ",
        ),
        ({"model_type": "qwen3", "layer_types": [[], "full_attention"]}, "layer_types must be 2 of full_att"),
    ],
)
def test_what_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        model_of(LLAMA | change)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bias": "alibi"}, r"no architecture .*\(llama: model\.bias; mistral: "),
        ({"post_norms": True}, "llama: model.post_norms"),
    ],
)
def test_a_model_that_no_architecture_has_is_not_written(options, words):
    with pytest.raises(ValueError, match=words):
        config_of(replace(model_of(LLAMA), **options), "float32")


def test_our_own_model_is_a_llama():
    model = Model(vocab_size=31, max_position_embeddings=64)
    assert config_of(model, "float32")["model_type"] == "llama"
    local = replace(model, pattern=("local",))
    assert config_of(local, "float32")["model_type"] == "mistral"
    assert (
        config_of(replace(model, layers=4, pattern=("local", "global"), qk_norm=True), "x")["model_type"]
        == "qwen3"
    )
