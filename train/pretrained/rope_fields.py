"""The rotary fields of a config.json, as transformers 4 and 5 write them, and the options that they mean."""

from typing import Any

from train.config.model import Model, RopeScaling
from train.model.rope import ntk_theta, yarn_factor
from train.pretrained.fields import Fields, Number

LOCAL_THETA = 10_000.0
"""Base of Gemma 3's local layers, where its config.json leaves it out."""


def rope_options(fields: Fields, model_type: str, longest: int) -> dict[str, Any]:
    """The rotary options of a model.

    Args:
      fields: of config.json; the rotary ones are taken.
      model_type: of config.json.
      longest: max_position_embeddings.

    Raises:
      ValueError: a field or a kind of scaling is not understood.
    """
    parameters = fields.take("rope_parameters", dict, {})
    scaling = fields.take("rope_scaling", dict, {})
    theta = fields.take("rope_theta", Number)
    if model_type != "gemma3_text":
        return _options(_object({"rope_theta": theta} | (scaling or parameters)), 10_000.0, longest)
    local_theta = fields.take("rope_local_base_freq", Number, LOCAL_THETA)
    whole = parameters.get("full_attention") or {}
    part = _object(parameters.get("sliding_attention") or {}, "sliding_attention.")
    if unknown := sorted(parameters.keys() - {"full_attention", "sliding_attention"}):
        raise ValueError(f"fields that are not understood: rope_parameters.{unknown[0]}")
    options = _options(_object({"rope_theta": theta} | whole | scaling), 1_000_000.0, longest)
    local = _options(part, local_theta, longest)
    if local["rope_scaling"] != RopeScaling():
        raise ValueError(
            "rope_parameters.sliding_attention scales local layers "
            f"({local['rope_scaling'].kind}), which is not understood"
        )
    return options | {"rope_local_theta": local["rope_theta"]}


SCALING_FIELDS = {
    "none": (),
    "linear": ("factor",),
    "ntk": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
"""Kinds of rotary scaling, and the options that each reads."""


def read_alone(scaling: RopeScaling) -> RopeScaling:
    """The scaling, with the options that its kind does not read at their defaults."""
    return RopeScaling(
        scaling.kind, **{name: getattr(scaling, name) for name in SCALING_FIELDS[scaling.kind]}
    )


def rope_fields(model: Model, model_type: str) -> dict[str, Any]:
    """The rotary fields of config.json for a model, in the form that transformers 4 and 5 read."""
    scaling, theta = model.rope_scaling, model.rope_theta
    if scaling.kind == "ntk":  # a base, to transformers
        scaling, theta = RopeScaling(), ntk_theta(theta, scaling.factor, model.head_size)
    local = {"rope_local_base_freq": model.rope_local_theta} if model_type == "gemma3_text" else {}
    return {"rope_theta": theta, "rope_scaling": _scaling_fields(scaling), **local}


def _scaling_fields(scaling: RopeScaling) -> dict[str, Any] | None:
    if scaling.kind == "none":
        return None
    values = {name: getattr(scaling, name) for name in SCALING_FIELDS[scaling.kind]}
    kept = {name: value for name, value in values.items() if value is not None}
    return {"rope_type": scaling.kind, **kept}


def _object(values: dict[str, Any], where: str = "") -> Fields:
    return Fields(values, f"rope_parameters.{where}")


def _options(fields: Fields, theta: float, longest: int) -> dict[str, Any]:
    """The base and the scaling that an object of rotary fields means."""
    theta = float(fields.take("rope_theta", Number, theta))
    kind = fields.take("type", str, "default")
    kind = fields.take("rope_type", str, kind)
    scaling = _scaling(fields, "none" if kind == "default" else kind, longest)
    fields.refuse_rest()
    return {"rope_theta": theta, "rope_scaling": scaling}


def _scaling(fields: Fields, kind: str, longest: int) -> RopeScaling:
    if kind == "none":
        fields.take("factor", Number)  # means nothing there
        return RopeScaling()
    if kind == "linear":
        return RopeScaling("linear", float(fields.need("factor", Number)))
    if kind not in ("yarn", "llama3"):
        hint = "; give --model.rope-scaling.kind ntk with a fixed factor" if kind == "dynamic" else ""
        raise ValueError(f"the rotary scaling {kind!r} is not understood{hint}")
    original = fields.take("original_max_position_embeddings", int, longest)
    if original < 1:
        raise ValueError(
            f"rope_parameters.original_max_position_embeddings must be at least 1, got {original}"
        )
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            float(fields.need("factor", Number)),
            original,
            low_freq_factor=float(fields.need("low_freq_factor", Number)),
            high_freq_factor=float(fields.need("high_freq_factor", Number)),
        )
    factor = float(fields.take("factor", Number, longest / original))
    if not fields.take("truncate", bool, True):
        raise ValueError("rope_parameters.truncate = False is not understood")
    return RopeScaling(
        "yarn",
        factor,
        original,
        beta_fast=float(fields.take("beta_fast", Number, 32.0)),
        beta_slow=float(fields.take("beta_slow", Number, 1.0)),
        attention_factor=_attention_factor(fields, factor),
    )


def _attention_factor(fields: Fields, factor: float) -> float | None:
    """YaRN's factor of queries and keys: given, or as DeepSeek gives it; None: that of the paper."""
    given = fields.take("attention_factor", Number)
    scale, all_dim = (fields.take(name, Number) for name in ("mscale", "mscale_all_dim"))
    if given is None and scale and all_dim:
        return yarn_factor(factor, scale) / yarn_factor(factor, all_dim)
    return None if given is None else float(given)
