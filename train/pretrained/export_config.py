"""The options of a model in, a config.json of transformers out."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from train.config.model import Model, RopeScaling
from train.config.run import option_values
from train.model.rope import ntk_theta
from train.pretrained.config import ACTIVATIONS, REACHES, model_of, pattern_of
from train.pretrained.families import FAMILIES
from train.pretrained.rope_fields import read_alone, rope_fields
from train.pretrained.run import COMPUTING

ROTARY = ("rope_parameters", "rope_theta", "rope_scaling", "rope_local_base_freq")
"""Rotary fields of transformers 4 and 5, which replace each other."""
PERIODS = ("sliding_window_pattern", "_sliding_window_pattern")
"""What layer_types replaces."""


def config_of(model: Model, dtype: str, source: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config.json of a model.

    Args:
      model: its options, with vocab_size and max_position_embeddings.
      dtype: of the weights that are written.
      source: the config.json that the model came from, whose other fields stay. None: the first architecture
        that computes the same is taken.

    Raises:
      ValueError: no architecture has these options (or not that of the source); the message names options.
    """
    if source is not None and _same(model_of(source), model):
        named = "dtype" if "dtype" in source else "torch_dtype"
        return {**source, named: dtype}
    kinds = FAMILIES if source is None else (source["model_type"],)
    faults = {}
    for kind in kinds:
        fields = _fields(model, kind) | {"torch_dtype": dtype}
        back = model_of(fields)
        if _same(back, model):
            replaced = {*fields, *ROTARY, *PERIODS, "dtype"}
            kept = {name: value for name, value in (source or {}).items() if name not in replaced}
            return kept | fields
        faults[kind] = _differences(back, model)
    listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in faults.items())
    raise ValueError(f"no architecture of transformers has these options of the model ({listed})")


def canonical(model: Model) -> Model:
    """The model with options that mean the same written in one way, and those of computing left out."""
    scaling, theta, local = read_alone(model.rope_scaling), model.rope_theta, model.rope_local_theta
    if scaling.kind == "ntk":
        scaling, theta = RopeScaling(), ntk_theta(theta, scaling.factor, model.head_size)
    windowed = "local" in model.reaches
    same = scaling == RopeScaling() and local == theta
    return replace(
        model,
        **{name: getattr(Model(), name) for name in COMPUTING},
        head_dim=model.head_size,
        query_scale=model.head_size**-0.5 if model.query_scale is None else model.query_scale,
        pattern=pattern_of(model.reaches),
        local_window=model.local_window if windowed else Model().local_window,
        rope_theta=theta,
        rope_scaling=scaling,
        rope_local_theta=local if windowed and not same else None,
    )


def _same(one: Model, other: Model) -> bool:
    return canonical(one) == canonical(other)


def _differences(one: Model, other: Model) -> list[str]:
    values = option_values(canonical(one)), option_values(canonical(other))
    return [f"model.{name}" for name in values[0] if values[0][name] != values[1][name]]


def _fields(model: Model, kind: str) -> dict[str, Any]:
    """The fields of an architecture that come nearest to the model."""
    family = FAMILIES[kind]
    names = {value: name for name, value in ACTIVATIONS.items()}
    types = {value: name for name, value in REACHES.items()}
    fields: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": kind,
        "hidden_size": model.width,
        "intermediate_size": model.hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied_embeddings,
        "hidden_act": names[model.activation],
        **rope_fields(model, kind),
    }
    windowed = "local" in model.reaches
    if "attention_bias" in family.defaults:
        fields["attention_bias"] = model.qkv_bias
    if kind == "mistral":
        fields["sliding_window"] = model.local_window if set(model.reaches) == {"local"} else None
    elif kind != "llama":
        fields["sliding_window"] = model.local_window
        fields["layer_types"] = [types[reach] for reach in model.reaches]
    if kind.startswith("qwen"):
        fields |= {"use_sliding_window": windowed, "max_window_layers": model.layers}
    if kind.startswith("gemma"):
        fields["hidden_activation"] = fields.pop("hidden_act")
        fields["query_pre_attn_scalar"] = round((model.query_scale or model.head_size**-0.5) ** -2)
        fields["final_logit_softcapping"] = model.logits_soft_cap
    if kind == "gemma2":
        fields["attn_logit_softcapping"] = model.attention_soft_cap
    return fields
