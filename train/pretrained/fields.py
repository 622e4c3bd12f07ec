"""The fields of a config.json, read one by one, so that none is overlooked."""

from collections.abc import Mapping
from typing import Any

INFORMATION = frozenset(
    [
        *("architectures", "dtype", "torch_dtype", "transformers_version", "model_type"),
        *("_name_or_path", "_model_name_or_path", "tokenizer_class"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id"),
        *("use_cache", "cache_implementation", "_attn_implementation", "attn_implementation"),
        *("_attn_implementation_autoset", "_flash_attn_2_enabled"),
        *("initializer_range", "_from_model_config", "pretraining_tp"),
        *("is_llama_config", "max_sequence_length", "transformers.js_config"),  # SmolLM2, Vicuna
    ]
)
"""Fields that change nothing of what a model computes from its weights."""

NEUTRAL: Mapping[str, Any] = {
    "partial_rotary_factor": 1.0,
    "mlp_bias": False,
    "attention_bias": False,
    "use_bidirectional_attention": False,
    "use_sliding_window": False,
    "use_mrope": False,  # Qwen 2.5
    "rope_interleaved": False,  # SmolLM2
}
"""The value, beside null, at which a field that is not read changes nothing."""

Number = (int, float)


class Fields:
    """The fields of an object of config.json. A field that was taken is gone.

    Args:
      values: the object.
      prefix: before the names of its fields in messages.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str = ""):
        self._left, self._prefix = dict(values), prefix

    def take(self, name: str, kinds: type | tuple[type, ...], default: Any = None) -> Any:
        """The value of a field; where it is left out or null, the default.

        Raises:
          ValueError: it is of none of the kinds.
        """
        value = self._left.pop(name, None)
        if value is None:
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise ValueError(f"{self._prefix}{name} is {value!r}, which is not of the type that it must have")
        return value

    def need(self, name: str, kinds: type | tuple[type, ...]) -> Any:
        """The value of a field.

        Raises:
          ValueError: it is left out or null, or of none of the kinds.
        """
        value = self.take(name, kinds)
        if value is None:
            raise ValueError(f"{self._prefix}{name} is missing")
        return value

    def need_positive(self, name: str) -> int:
        """The value of a field that is a whole number above zero.

        Raises:
          ValueError: it is left out or null, or anything else.
        """
        if (value := self.need(name, int)) < 1:
            raise ValueError(f"{self._prefix}{name} must be at least 1, got {value}")
        return value

    def refuse_rest(self):
        """Refuses the fields that were not taken, unless they say nothing.

        Raises:
          ValueError: with each such field and its value.
        """
        unread = {
            name: value
            for name, value in sorted(self._left.items())
            if name not in INFORMATION and value is not None and value != NEUTRAL.get(name)
        }
        if unread:
            listed = ", ".join(f"{self._prefix}{name} = {value!r}" for name, value in unread.items())
            raise ValueError(f"fields that are not understood: {listed}")
