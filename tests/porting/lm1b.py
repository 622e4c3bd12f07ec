"""A decoder that calls attention as Flax's lm1b example does, in Linen; the code is ours.

https://github.com/google/flax/tree/main/examples/lm1b (models.py): packed rows, a `decoder_mask` made by
`nn.combine_masks` and handed to every block, and a cache inside the attention module.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

VOCAB, WIDTH, HIDDEN, HEADS, MAX_LEN = 64, 32, 64, 4, 64


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    num_layers: int = 4
    dtype: jax.typing.DTypeLike = jnp.float32
    attention_dropout_rate: float = 0.0
    deterministic: bool = True
    decode: bool = False


def shift_right(x):
    return jnp.pad(x, ((0, 0), (1, 0)))[:, :-1]


def shift_inputs(x, segment_ids=None):
    """The tokens before, [B, L]; 0 before the first one of a row or, in packed rows, of a segment."""
    shifted = shift_right(x)
    if segment_ids is not None:
        shifted = jnp.where(segment_ids == shift_right(segment_ids), shifted, 0)
    return shifted


class AddPositionEmbs(nn.Module):
    config: TransformerConfig

    @nn.compact
    def __call__(self, inputs, inputs_positions=None):
        pos_embedding = self.param("pos_embedding", nn.initializers.normal(0.5), (MAX_LEN, WIDTH))
        if self.config.decode:
            is_initialized = self.has_variable("cache", "cache_index")
            cache_index = self.variable("cache", "cache_index", jnp.zeros, (), jnp.int32)
            if is_initialized:
                inputs_positions = jnp.broadcast_to(cache_index.value, inputs.shape[:2])
                cache_index.value += 1
        if inputs_positions is None:
            return inputs + pos_embedding[None, : inputs.shape[1]]
        return inputs + jnp.take(pos_embedding, inputs_positions, axis=0)


class MlpBlock(nn.Module):
    config: TransformerConfig

    @nn.compact
    def __call__(self, inputs):
        x = nn.relu(nn.Dense(HIDDEN, dtype=self.config.dtype)(inputs))
        return nn.Dense(WIDTH, dtype=self.config.dtype)(x)


class EncoderDecoder1DBlock(nn.Module):
    config: TransformerConfig

    @nn.compact
    def __call__(self, inputs, decoder_mask=None):
        config = self.config
        x = nn.LayerNorm()(inputs.astype(jnp.float32))
        x = nn.MultiHeadDotProductAttention(
            num_heads=HEADS,
            dtype=config.dtype,
            qkv_features=WIDTH,
            use_bias=False,
            broadcast_dropout=False,
            dropout_rate=config.attention_dropout_rate,
            deterministic=config.deterministic,
            decode=config.decode,
        )(x, mask=decoder_mask)
        x = x + inputs
        return x + MlpBlock(config)(nn.LayerNorm()(x.astype(jnp.float32)))


class TransformerLM(nn.Module):
    config: TransformerConfig

    @nn.compact
    def __call__(self, inputs, inputs_positions=None, inputs_segmentation=None):
        """Logits [B, L, V] of the tokens `inputs`, each from those before it; all arguments are [B, L]."""
        config = self.config
        if config.decode:
            decoder_mask = None
        else:
            decoder_mask = nn.combine_masks(
                nn.make_attention_mask(inputs > 0, inputs > 0, dtype=bool),
                nn.make_causal_mask(inputs, dtype=bool),
                dtype=bool,
            )
        if inputs_segmentation is not None:
            decoder_mask = nn.combine_masks(
                decoder_mask,
                nn.make_attention_mask(inputs_segmentation, inputs_segmentation, jnp.equal, dtype=bool),
                dtype=bool,
            )

        y = inputs if config.decode else shift_inputs(inputs, inputs_segmentation)
        y = nn.Embed(VOCAB, WIDTH)(y)
        y = AddPositionEmbs(config, name="posembed_output")(y, inputs_positions).astype(config.dtype)
        for layer in range(config.num_layers):
            y = EncoderDecoder1DBlock(config, name=f"encoderdecoderblock_{layer}")(y, decoder_mask)
        y = nn.LayerNorm(name="encoderdecoder_norm")(y.astype(jnp.float32))
        return nn.Dense(VOCAB, dtype=config.dtype, name="logitdense")(y)


def make(seed: int, **options):
    """The model and its parameters."""
    model = TransformerLM(TransformerConfig(**options))
    return model, model.init(jax.random.key(seed), jnp.ones((1, MAX_LEN), jnp.int32))["params"]


def loss(model: TransformerLM, params, batch):
    """Mean cross entropy of packed rows; padding is token 0."""
    inputs = batch["inputs"]
    logits = model.apply({"params": params}, inputs, batch["inputs_position"], batch["inputs_segmentation"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), inputs)
    return jnp.average(losses, weights=(inputs > 0).astype(jnp.float32))
