"""A config.json of transformers in, the options of the model out."""

from collections.abc import Mapping
from typing import Any

from train.config.model import Activation, Model, Reach
from train.pretrained.families import FAMILIES
from train.pretrained.fields import Fields, Number
from train.pretrained.rope_fields import rope_options

ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""Names of activations in config.json."""
REACHES: dict[str, Reach] = {"full_attention": "global", "sliding_attention": "local"}
"""Names of a layer's reach in config.json."""
GEMMA3_PERIOD = 6
"""Layers of which the last is global, in Gemma 3."""


def model_of(config: Mapping[str, Any]) -> Model:
    """The options of the model that a config.json describes.

    Raises:
      ValueError: the architecture is another; a field is missing, is not understood and not neutral, or has
        a value that the Transformer lacks. The message names it.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(
            f"model_type must be one of {', '.join(FAMILIES)}, got {kind!r}{_text_model_hint(config)}"
        )
    family = FAMILIES[kind]
    fields = Fields({**family.defaults, **config})
    options = _sizes(fields) | _feed_forward(fields, kind) | dict(family.fixed)
    if "attention_bias" in family.defaults:
        biased = fields.take("attention_bias", bool, False)
        options |= {"qkv_bias": biased, "out_bias": biased}
    if kind in ("gemma2", "gemma3_text"):
        options |= _gemma(fields, kind, options["width"])
    options |= _reaches(fields, kind, options["layers"])
    options |= rope_options(fields, kind, options["max_position_embeddings"])
    fields.refuse_rest()
    return Model(**options)


def pattern_of(reaches: tuple[Reach, ...]) -> tuple[Reach, ...]:
    """The shortest pattern whose repetition gives these layers; the last repetition may end early.

    >>> pattern_of(("local", "local", "global", "local", "local"))
    ('local', 'local', 'global')
    """
    lengths = range(1, len(reaches) + 1)
    return next(
        reaches[:length]
        for length in lengths
        if all(reach == reaches[i % length] for i, reach in enumerate(reaches))
    )


def _text_model_hint(config: Mapping[str, Any]) -> str:
    """What to do with a model of texts and images; nothing where the config is of none that helps."""
    text = config.get("text_config")
    kind = text.get("model_type") if isinstance(text, dict) else None
    if not isinstance(kind, str) or kind not in FAMILIES:
        return ""
    return (
        f", a model of more than text: its text model alone is read, from a folder of model_type {kind}, "
        "which transformers writes (docs/training.md, Checkpoints of Hugging Face, says how)"
    )


def _sizes(fields: Fields) -> dict[str, Any]:
    width, heads = fields.need_positive("hidden_size"), fields.need_positive("num_attention_heads")
    return {
        "layers": fields.need_positive("num_hidden_layers"),
        "width": width,
        "heads": heads,
        "kv_heads": fields.take("num_key_value_heads", int, heads),
        "head_dim": fields.take("head_dim", int, width // heads),
        "hidden": fields.need_positive("intermediate_size"),
        "vocab_size": fields.need_positive("vocab_size"),
        "max_position_embeddings": fields.need_positive("max_position_embeddings"),
        "norm_eps": float(fields.take("rms_norm_eps", Number, 1e-6)),
        "tied_embeddings": fields.take("tie_word_embeddings", bool, False),
        "attention_dropout": float(fields.take("attention_dropout", Number, 0.0)),
    }


def _feed_forward(fields: Fields, kind: str) -> dict[str, Any]:
    name = fields.take("hidden_act", str, "silu")
    if kind in ("gemma2", "gemma3_text"):  # whose hidden_act transformers does not read
        name = fields.take("hidden_activation", str, "gelu_pytorch_tanh")
    if name not in ACTIVATIONS:
        raise ValueError(f"the activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return {"activation": ACTIVATIONS[name]}


def _gemma(fields: Fields, kind: str, width: int) -> dict[str, Any]:
    scalar = float(fields.take("query_pre_attn_scalar", Number, 256))
    if not scalar > 0:
        raise ValueError(f"query_pre_attn_scalar must be positive, got {scalar}")
    options: dict[str, Any] = {
        "embedding_scale": float(width) ** 0.5,
        "query_scale": scalar**-0.5,
        "logits_soft_cap": fields.take("final_logit_softcapping", Number),
    }
    # Gemma 3 of transformers has the field and does not read it: only null is understood there.
    if kind == "gemma2":
        options["attention_soft_cap"] = fields.take("attn_logit_softcapping", Number)
    return options


def _reaches(fields: Fields, kind: str, layers: int) -> dict[str, Any]:
    """The pattern of the layers, and the window of local ones."""
    if kind == "llama":  # a window there is refused: transformers does not read it
        return {"pattern": ("global",)}
    window = fields.take("sliding_window", int)
    everywhere: Reach = "global" if window is None else "local"
    reaches: tuple[Reach, ...] = (everywhere,) * layers
    if kind.startswith("qwen"):
        first = fields.take("max_window_layers", int, 28)
        window = window if fields.take("use_sliding_window", bool, False) else None
        reaches = tuple("global" if window is None or i < first else "local" for i in range(layers))
    elif kind.startswith("gemma"):
        if fields.take("sliding_window_size", int, window) != window:  # Gemma 2 has both
            raise ValueError(f"sliding_window_size must be sliding_window, {window}")
        period = _period(fields, kind)
        if window is not None:
            reaches = tuple("local" if (i + 1) % period else "global" for i in range(layers))
    if kind != "mistral" and (types := fields.take("layer_types", list)) is not None:
        if len(types) != layers or any(each not in list(REACHES) for each in types):
            raise ValueError(f"layer_types must be {layers} of {', '.join(REACHES)}, got {types!r}")
        reaches = tuple(REACHES[each] for each in types)
    if "local" not in reaches:
        return {"pattern": ("global",)}
    if window is None:
        raise ValueError("layer_types has sliding_attention, and there is no sliding_window")
    return {"pattern": pattern_of(reaches), "local_window": window}


def _period(fields: Fields, kind: str) -> int:
    """Layers of which the last is global. Of Gemma 2 transformers knows no other than 2."""
    usual = GEMMA3_PERIOD if kind == "gemma3_text" else 2
    period = fields.take("sliding_window_pattern", int, usual)
    period = fields.take("_sliding_window_pattern", int, period)
    if period < 1 or (kind == "gemma2" and period != usual):
        needed = "at least 1" if kind == "gemma3_text" else usual
        raise ValueError(f"sliding_window_pattern must be {needed}, got {period}")
    return period
