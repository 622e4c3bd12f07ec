"""Transformers that call attention by `nnx.MultiHeadAttention`, as in Flax's documentation; the code is ours.

https://flax.readthedocs.io/en/latest/api_reference/flax.nnx/nn/attention.html: a mask [B, 1, L or 1, L] that
hides padding and, in decoders, what comes later; layers in an `nnx.List`, or stacked and run by `nnx.scan`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx

VOCAB, WIDTH, HIDDEN, HEADS, MAX_LEN = 64, 32, 64, 4, 64


@dataclasses.dataclass(frozen=True)
class Config:
    num_layers: int = 4
    causal: bool = True  # a decoder; False is an encoder
    dtype: jax.typing.DTypeLike = jnp.float32


class Block(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=HEADS,
            in_features=WIDTH,
            dtype=config.dtype,
            decode=False,
            rngs=rngs,
        )
        self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.linear1 = nnx.Linear(WIDTH, HIDDEN, dtype=config.dtype, rngs=rngs)
        self.linear2 = nnx.Linear(HIDDEN, WIDTH, dtype=config.dtype, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.norm1(x.astype(jnp.float32)), mask=mask)
        return x + self.linear2(nnx.gelu(self.linear1(self.norm2(x.astype(jnp.float32)))))


class Ends(nnx.Module):
    """What comes before and after the layers."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.config = config
        self.tokens = nnx.Embed(VOCAB, WIDTH, dtype=config.dtype, rngs=rngs)
        self.positions = nnx.Embed(MAX_LEN, WIDTH, dtype=config.dtype, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCAB, dtype=config.dtype, rngs=rngs)

    def embed(self, tokens):
        return self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))[None, :, :]

    def logits(self, x):
        return self.head(self.norm(x.astype(jnp.float32)))

    def mask(self, padding_mask):
        """The mask of every layer, from padding_mask [B, L], which is True at tokens."""
        mask = padding_mask[:, None, None, :]
        if self.config.causal:
            mask = nnx.combine_masks(mask, nnx.make_causal_mask(padding_mask, dtype=bool), dtype=bool)
        return mask


class Model(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.ends = Ends(config, rngs=rngs)
        self.layers = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_layers)])

    def __call__(self, tokens, padding_mask):
        """Logits [B, L, V]; tokens and padding_mask (True at tokens) are [B, L]."""
        x, mask = self.ends.embed(tokens), self.ends.mask(padding_mask)
        for layer in self.layers:
            x = layer(x, mask)
        return self.ends.logits(x)


class ScannedModel(nnx.Module):
    """The same, with layers whose parameters are stacked along their first axis."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.ends = Ends(config, rngs=rngs)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make_layers(rngs):
            return Block(config, rngs=rngs)

        self.layers = make_layers(rngs)

    def __call__(self, tokens, padding_mask):
        """Logits [B, L, V]; tokens and padding_mask (True at tokens) are [B, L]."""
        x, mask = self.ends.embed(tokens), self.ends.mask(padding_mask)

        @nnx.scan(in_axes=(0, nnx.Carry, None), out_axes=nnx.Carry)
        def run_layers(layer, x, mask):
            return layer(x, mask)

        return self.ends.logits(run_layers(self.layers, x, mask))


def make(seed: int, *, scanned: bool = False, **options) -> Model | ScannedModel:
    kind = ScannedModel if scanned else Model
    return kind(Config(**options), rngs=nnx.Rngs(seed))


def loss(model: Model | ScannedModel, tokens):
    """Mean cross entropy of the next token; tokens are [B, L], padded with 0."""
    padding_mask = tokens > 0
    logits = model(tokens, padding_mask)[:, :-1].astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.average(losses, weights=padding_mask[:, 1:].astype(jnp.float32))
