"""Names and layouts of weights: ours beside those of transformers.

transformers has a matrix as `[out, in]`, of each layer apart, with heads and their features in one axis. Ours
is `[in, out]`, with an axis for each, stacked over the groups of layers.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from train.config.model import Model

Index = tuple[slice, ...]

TOP = {
    "embed.embedding": ("model.embed_tokens.weight", None),
    "norm.scale": ("model.norm.weight", None),
    "logits.kernel": ("lm_head.weight", 1),
}
"""Our name -> theirs, and the number of our axes that are inputs; None: the same layout."""
LAYER = {
    "attention.query.kernel": ("self_attn.q_proj.weight", 1),
    "attention.query.bias": ("self_attn.q_proj.bias", 0),
    "attention.key.kernel": ("self_attn.k_proj.weight", 1),
    "attention.key.bias": ("self_attn.k_proj.bias", 0),
    "attention.value.kernel": ("self_attn.v_proj.weight", 1),
    "attention.value.bias": ("self_attn.v_proj.bias", 0),
    "attention.out.kernel": ("self_attn.o_proj.weight", 2),
    "attention.out.bias": ("self_attn.o_proj.bias", 0),
    "attention.query_norm.scale": ("self_attn.q_norm.weight", None),
    "attention.key_norm.scale": ("self_attn.k_norm.weight", None),
    "feed_forward.gate.kernel": ("mlp.gate_proj.weight", 1),
    "feed_forward.up.kernel": ("mlp.up_proj.weight", 1),
    "feed_forward.down.kernel": ("mlp.down_proj.weight", 1),
    "attention_norm.scale": ("input_layernorm.weight", None),
}
"""The same of a layer's weights, without the number of the layer."""
NORMS = {"feed_forward_norm.scale": ("post_attention_layernorm.weight", None)}
"""The other norms of a layer where only inputs are normalised, and with `model.post_norms`."""
POST_NORMS = {
    "attention_post_norm.scale": ("post_attention_layernorm.weight", None),
    "feed_forward_norm.scale": ("pre_feedforward_layernorm.weight", None),
    "feed_forward_post_norm.scale": ("post_feedforward_layernorm.weight", None),
}


@dataclass(frozen=True)
class Layout:
    """One of our arrays as tensors of transformers.

    Attributes:
      names: of the tensors, one for each group where the array is stacked.
      stacked: whether the array's first axis is that of groups.
      inputs: the number of axes, after that of groups, that are inputs of a matrix; 0 for a bias; None where
        the layout is the same.
    """

    names: tuple[str, ...]
    stacked: bool
    inputs: int | None

    def shape(self, ours: Sequence[int]) -> tuple[int, ...]:
        """The shape of each tensor, by that of the array."""
        part = tuple(ours[self.stacked :])
        if self.inputs is None:
            return part
        out = math.prod(part[self.inputs :])
        return (out, math.prod(part[: self.inputs])) if self.inputs else (out,)

    def index(self, ours: Index, shape: Sequence[int]) -> Iterator[tuple[str, Index]]:
        """The tensors that hold a part of the array, in order, and which part of each it is."""
        part, sizes = ours[self.stacked :], tuple(shape[self.stacked :])
        names = self.names[ours[0]] if self.stacked else self.names
        if self.inputs is None:
            theirs = part
        else:
            theirs = (_merged(part[self.inputs :], sizes[self.inputs :]),)
            if self.inputs:
                theirs += (_merged(part[: self.inputs], sizes[: self.inputs]),)
        for name in names:
            yield name, theirs

    def to_ours(self, part: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """A part of a tensor as the part of the array, of this shape, that it is."""
        return (part.T if self.inputs else part).reshape(shape)

    def to_theirs(self, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Each tensor of the whole array."""
        shape = self.shape(array.shape)
        for name, part in zip(self.names, array if self.stacked else [array], strict=True):
            turned = part.reshape(shape[::-1]).T if self.inputs else part.reshape(shape)
            yield name, np.ascontiguousarray(turned)


def layout_of(path: str, model: Model) -> Layout:
    """The layout of one of a model's weights, by its path joined by dots."""
    if path in TOP:
        name, inputs = TOP[path]
        return Layout((name,), False, inputs)
    stack, _, at, rest = path.split(".", 3)  # groups.layers.0.attention.query.kernel
    suffix, inputs = (LAYER | (POST_NORMS if model.post_norms else NORMS))[rest]
    period, groups = len(model.pattern), model.groups
    stacked = stack == "groups"
    layers = range(int(at), groups * period, period) if stacked else (groups * period + int(at),)
    return Layout(tuple(f"model.layers.{layer}.{suffix}" for layer in layers), stacked, inputs)


def _merged(part: Index, sizes: Sequence[int]) -> slice:
    """The part of several axes that are one: the first may be cut, the others are whole."""
    begin, end, _ = part[0].indices(sizes[0])
    assert all(each.indices(size) == (0, size, 1) for each, size in zip(part[1:], sizes[1:], strict=True))
    rest = math.prod(sizes[1:])
    return slice(begin * rest, end * rest)
