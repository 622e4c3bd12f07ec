"""The section `model` of a config: the shape of the Transformer and what its layers compute.

The defaults are a Llama without biases. Other options have the names that the field gives them, so that a
checkpoint of another family is a choice of options: see `train/pretrained`.
"""

from dataclasses import dataclass, field
from typing import Literal

from dynmask_jax.dispatch import BACKENDS
from train.config.checks import above_zero, at_least, finite, one_of

Dtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "full", "dots", "dots_no_batch"]
Reach = Literal["global", "local"]
BiasName = Literal["none", "alibi"]
Activation = Literal["silu", "gelu_tanh"]
RopeScalingKind = Literal["none", "linear", "ntk", "yarn", "llama3"]


@dataclass(frozen=True)
class RopeScaling:
    """How rotary positions are scaled, so that a model reads beyond the context that it was trained at."""

    kind: RopeScalingKind = "none"
    """linear: positions are divided by factor (Chen et al. 2023, arXiv:2306.15595); ntk: the base is
    multiplied by factor^(H / (H - 2)) for head dim H ("NTK-aware", bloc97 2023); yarn: slow frequencies are
    divided by factor, fast ones are not (Peng et al. 2023, arXiv:2309.00071); llama3: the same with the
    thresholds of Llama 3.1 (arXiv:2407.21783)."""
    factor: float = 1.0
    """The longer context divided by the original one."""
    original_max_position_embeddings: int | None = None
    """Tokens of the original context, for yarn and llama3."""
    beta_fast: float = 32.0
    """yarn: frequencies of more turns than this in the original context stay as they are."""
    beta_slow: float = 1.0
    """yarn: frequencies of fewer turns than this are divided by factor."""
    attention_factor: float | None = None
    """yarn: what queries and keys are multiplied by. None: 0.1 ln(factor) + 1."""
    low_freq_factor: float = 1.0
    """llama3: frequencies of fewer turns than this in the original context are divided by factor."""
    high_freq_factor: float = 4.0
    """llama3: frequencies of more turns than this stay as they are."""

    def __post_init__(self):
        at_least("model.rope_scaling.", self, factor=1, original_max_position_embeddings=1)
        above_zero(
            "model.rope_scaling.", self, "beta_slow", "beta_fast", "low_freq_factor", "attention_factor"
        )
        finite("model.rope_scaling.", self, "factor", "beta_slow", "beta_fast", "attention_factor")
        finite("model.rope_scaling.", self, "low_freq_factor", "high_freq_factor")
        one_of("model.rope_scaling.", self, kind=RopeScalingKind)
        if self.kind in ("yarn", "llama3") and self.original_max_position_embeddings is None:
            raise ValueError(
                "model.rope_scaling.original_max_position_embeddings must be given for the kind "
                f"{self.kind}, got None"
            )
        for low, high in (("beta_slow", "beta_fast"), ("low_freq_factor", "high_freq_factor")):
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(
                    f"model.rope_scaling.{high} must be above {low} ({getattr(self, low)}), got "
                    f"{getattr(self, high)}"
                )


@dataclass(frozen=True)
class Model:
    """The decoder-only Transformer."""

    layers: int = 4
    """Number of layers, each attention and a feed-forward layer."""
    width: int = 256
    """D, features of a token between layers."""
    heads: int = 4
    """N, query heads."""
    kv_heads: int = 2
    """K, key and value heads, each shared by heads / kv_heads query heads."""
    hidden: int = 704
    """Hidden features of the feed-forward layer."""
    rope_theta: float = 10_000.0
    """Base of the rotary position embedding; its longest wavelength is about 6 times as many tokens."""
    bias: BiasName = "none"
    """What is added to the scores of attention; rotary positions stay. alibi: minus the distance of query and
    key, times a slope of each head, which is not learned (ALiBi, with the slopes of its paper)."""
    attention_dropout: float = 0.0
    """Share of the attention weights that are dropped in training, drawn anew in each step and layer; the
    others are divided by 1 - attention_dropout."""
    backend: str | None = None
    """Implementation of attention: "xla", "xla_wide", "tpu", "gpu" or "dense". None: the platform's."""
    dtype: Dtype = "float32"
    """Type of the activations. Weights, the accumulators of attention and the loss stay float32."""
    remat: Remat = "none"
    """What a layer recomputes in the backward pass. none: nothing; full: everything from its input; dots:
    all but matrix products; dots_no_batch: all but matrix products with weights."""
    pattern: tuple[Reach, ...] = ("global",)
    """Reach of the layers, repeated: local local local local local global, for example. A global layer sees
    all that the curriculum shows, a local one at most local_window tokens of it. The last repetition may
    end early."""
    local_window: int = 1024
    """Most recent tokens that a local layer sees, with the query's token."""
    head_dim: int | None = None
    """H, features of a head. None: width / heads."""
    vocab_size: int | None = None
    """Rows of the embedding. None: as many as the tokenizer has tokens."""
    max_position_embeddings: int | None = None
    """The longest context that an imported model was trained at; longer texts are not refused. None: not
    known."""
    activation: Activation = "silu"
    """Activation of the feed-forward layer's gate. silu: SwiGLU; gelu_tanh: GeGLU, with the tanh form of GELU
    (Shazeer 2020, arXiv:2002.05202)."""
    tied_embeddings: bool = False
    """Project to logits with the embedding (Press & Wolf 2017, arXiv:1608.05859)."""
    embedding_scale: float = 1.0
    """What embeddings are multiplied by; the square root of width in Gemma (Vaswani et al. 2017,
    arXiv:1706.03762, section 3.4)."""
    qkv_bias: bool = False
    """Add a bias to queries, keys and values (Qwen 2, arXiv:2407.10671)."""
    out_bias: bool = False
    """Add a bias to the output projection of attention."""
    qk_norm: bool = False
    """Normalise queries and keys, head by head, before rotary positions (Henry et al. 2020, arXiv:2010.04245;
    an RMSNorm in Qwen 3 and Gemma 3)."""
    post_norms: bool = False
    """Normalise what a layer computes before it is added, too (Gemma 2, arXiv:2408.00118)."""
    norm_unit_offset: bool = False
    """Norms multiply by 1 + weight instead of weight, so that weight decay pulls towards 1 (Gemma)."""
    norm_eps: float = 1e-6
    """Added to the mean square under the root of a norm."""
    query_scale: float | None = None
    """What products of queries and keys are multiplied by. None: 1 / sqrt(head_dim)."""
    attention_soft_cap: float | None = None
    """Scores of attention are capped: c tanh(score / c) (Gemma 2, arXiv:2408.00118). None: they are not."""
    logits_soft_cap: float | None = None
    """The same of the logits."""
    rope_local_theta: float | None = None
    """Base of the rotary positions of local layers, which are then not scaled (Gemma 3, arXiv:2503.19786).
    None: rope_theta, scaled by rope_scaling."""
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)

    def __post_init__(self):
        at_least("model.", self, layers=1, width=1, heads=1, kv_heads=1, hidden=1, local_window=1)
        at_least("model.", self, head_dim=1, vocab_size=1, max_position_embeddings=1)
        above_zero("model.", self, "rope_theta", "rope_local_theta", "norm_eps", "embedding_scale")
        above_zero("model.", self, "query_scale", "attention_soft_cap", "logits_soft_cap")
        self._check_rope()
        one_of("model.", self, dtype=Dtype, remat=Remat, bias=BiasName, activation=Activation)
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(
                f"model.attention_dropout must lie in 0…1 (1 excluded), got {self.attention_dropout}"
            )
        if self.head_dim is None and self.width % (2 * self.heads):
            raise ValueError(
                f"model.width must be a multiple of 2 * model.heads ({2 * self.heads}), for an even "
                f"head dim, got {self.width}; or give model.head_dim"
            )
        if self.head_dim is not None and self.head_dim % 2:
            raise ValueError(f"model.head_dim must be even, got {self.head_dim}")
        if self.heads % self.kv_heads:
            raise ValueError(f"model.kv_heads must divide model.heads ({self.heads}), got {self.kv_heads}")
        if self.backend is not None and self.backend not in BACKENDS:
            raise ValueError(f"model.backend must be one of {', '.join(BACKENDS)}, got {self.backend!r}")
        if not self.pattern or set(self.pattern) - {"global", "local"}:
            raise ValueError(f"model.pattern must be of 'global' and 'local', got {self.pattern}")
        if self.layers < len(self.pattern):
            raise ValueError(
                f"model.layers must be at least the layers in model.pattern ({len(self.pattern)}), got "
                f"{self.layers}"
            )

    def _check_rope(self):
        finite("model.", self, "rope_theta", "rope_local_theta")
        if self.rope_scaling.kind == "yarn" and self.rope_theta <= 1:
            raise ValueError(
                "model.rope_theta must be above 1 with model.rope_scaling.kind yarn, which divides by its "
                f"logarithm, got {self.rope_theta}"
            )

    @property
    def head_size(self) -> int:
        """H, the features of a head."""
        return self.head_dim or self.width // self.heads

    @property
    def groups(self) -> int:
        """The whole repetitions of the pattern."""
        return self.layers // len(self.pattern)

    @property
    def rest(self) -> tuple[Reach, ...]:
        """The reach of the layers after the whole repetitions."""
        return self.pattern[: self.layers % len(self.pattern)]

    @property
    def reaches(self) -> tuple[Reach, ...]:
        """The reach of each layer."""
        return self.pattern * self.groups + self.rest

    def vocabulary(self, tokens: int) -> int:
        """The rows of the embedding, with a tokenizer of so many tokens."""
        return self.vocab_size or tokens
