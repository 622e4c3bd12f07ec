"""What a PyTorch user would call: SDPA, and FlexAttention with the same masks as ours.

Torch is imported when it is first used, and takes all cores, as XLA does.
"""

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import peers
from benchmarks.calls import BOTH, FORWARD
from benchmarks.timing import Call, Ways, attempt
from dynmask_jax import Everything, Mask, Tokens
from dynmask_jax.array_typing import Array
from dynmask_jax.masks import And, Not, Or

NO_BACKWARD = "no CPU backward"


def torch() -> Any:
    """PyTorch, with as many threads as there are cores, and room for every mask we compile."""
    module: Any = importlib.import_module("torch")
    module.set_num_threads(os.cpu_count() or 1)
    return module


def device() -> str:
    """Where PyTorch computes: on the card, if it finds one."""
    return "cuda" if torch().cuda.is_available() else "cpu"


def _done(call: Callable) -> Callable:
    """The call, that returns once its results are there: a card works on when the call is over."""

    def done():
        result = call()
        if device() == "cuda":
            torch().cuda.synchronize()
        return result

    return done


def sdpa(arrays: tuple[Array, ...], mask: Array | None = None) -> Ways:
    """`scaled_dot_product_attention` both ways: causal by its own argument, or under a dense mask."""
    if reason := peers.missing("torch"):
        return peers.of_no_use(reason)
    module = torch()
    *qkv, cotangent = (_tensor(x) for x in arrays)
    inputs = [x.requires_grad_() for x in qkv]
    dense = None if mask is None else module.from_numpy(np.array(mask)).to(device())

    def attend():
        return module.nn.functional.scaled_dot_product_attention(
            *inputs, attn_mask=dense, is_causal=dense is None
        )

    def forward():
        with module.no_grad():
            return attend()

    def both():
        return module.autograd.grad(attend(), inputs, cotangent)

    return {FORWARD: _done(forward), BOTH: _done(both)}


def flex_attention(arrays: tuple[Array, ...], mask: Mask, tokens: Tokens) -> Ways:
    """FlexAttention, compiled, under a block mask made beforehand: forward, and on a card backward too."""
    if reason := peers.missing("torch"):
        return peers.of_no_use(reason)
    *qkv, cotangent = (_tensor(x) for x in arrays)
    inputs = [x.requires_grad_() for x in qkv] if device() == "cuda" else qkv

    @functools.cache
    def prepared() -> Callable:
        _forget_compiled()
        flex = importlib.import_module("torch.nn.attention.flex_attention")
        blocks = block_mask(mask, tokens)()
        # In one graph or not at all: FlexAttention that is broken in two runs dense and says nothing.
        compiled = torch().compile(flex.flex_attention, fullgraph=True)
        return functools.partial(compiled, *inputs, block_mask=blocks)

    def forward():
        with torch().no_grad():
            return prepared()()

    def both():
        return torch().autograd.grad(prepared()(), inputs, cotangent)

    backward = attempt(_done(both)) if device() == "cuda" else NO_BACKWARD
    return {FORWARD: attempt(_done(forward)), BOTH: backward}


def block_mask(mask: Mask, tokens: Tokens, *, compile: bool = False) -> Call:
    """A call of FlexAttention's `create_block_mask`, eager or compiled, with its blocks of 128."""
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    create = torch().compile(flex.create_block_mask) if compile else flex.create_block_mask
    modifier, length = mask_mod(mask, tokens), tokens.shape[0]
    return lambda: create(modifier, None, None, length, length, device=device())


def mask_mod(mask: Mask, tokens: Tokens) -> Callable:
    """Our mask as FlexAttention's `mask_mod(batch, head, query, key)`: the same expression, on tensors."""
    token = _token_at(tokens)
    return lambda batch, head, query, key: _visible(mask, token(query), token(key))


def _visible(mask: Mask, q, k):
    match mask:
        case And():
            return _visible(mask.a, q, k) & _visible(mask.b, q, k)
        case Or():
            return _visible(mask.a, q, k) | _visible(mask.b, q, k)
        case Not():
            return ~_visible(mask.mask, q, k)
        case Everything():
            return q.position == q.position
        case _:
            return mask.visible(q, k)


class _Token:
    """A token on tensors. A plain class: FlexAttention's compiler follows no record type that we know of."""

    def __init__(self, position, segment):
        self.position, self.segment = position, segment


def _token_at(tokens: Tokens) -> Callable:
    """index -> token; positions that count from 0 are the index itself, which spares a look-up."""
    position, segment = (np.array(field) for field in (tokens.position, tokens.segment))
    counted = bool(np.array_equal(position, np.arange(len(position))))
    position, segment = (torch().from_numpy(field).to(device()) for field in (position, segment))
    return lambda index: _Token(index if counted else position[index], segment[index])


def _tensor(array: Array):
    """`[B, T, N, H]` as torch wants it, `[B, N, T, H]`, laid out so."""
    tensor = torch().from_numpy(np.array(array.swapaxes(1, 2), np.float32))
    return tensor.to(device(), getattr(torch(), str(array.dtype)))


def _forget_compiled():
    """Each mask is a program of its own: without this, the ninth would no longer be compiled."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch._dynamo").reset()
