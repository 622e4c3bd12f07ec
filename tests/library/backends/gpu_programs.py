"""Programs that the real GPU compiler is given, by name: each returns a function and its arguments' shapes.

Run for `tests/library/backends/test_gpu_compile.py` in a process of its own.
"""

import jax
import jax.numpy as jnp
from cases import HEADS, MASKS
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dynmask_jax import (
    ALiBi,
    BiasFunction,
    Causal,
    Dropout,
    SameSegment,
    Tokens,
    Window,
    attention,
    context_parallel,
    plan,
)
from dynmask_jax.backends.gpu import Grain, Grains, gpu_backend
from dynmask_jax.backends.gpu_lists import lists_of
from train.aot.compile_step import batch_like
from train.config.run import Curriculum, Data, Model, Run
from train.parallel.sharding import Placement
from train.step.program import program_of, state_like

LENGTH = 4_096


def attention_and_gradient(
    dtype: str = "bfloat16",
    head_dim: int = 128,
    value_dim: int | None = None,
    grains: list | None = None,
    busy: int = 256,
    gradient: bool = True,
):
    """Packed documents under a growing window; `grains` are the three kernels', `[line, column, …]` each.

    Without `gradient` the forward pass alone.
    """
    arrays, tokens, window = _shapes(dtype, head_dim, value_dim or head_dim)
    backend = gpu_backend(Grains(*(Grain(*each) for each in grains), busy=busy)) if grains else "gpu"

    def loss(arrays, position, segment, window):
        out, lse = attention(*arrays, _seen(position, segment, window), backend=backend, return_lse=True)
        return out.astype(jnp.float32).sum() + lse.sum()

    return jax.value_and_grad(loss) if gradient else loss, (arrays, tokens, tokens, window)


def scores_and_gradient():
    """Slopes that are learned, a bias of literals, dropout, a soft cap, sinks, and a window for each head."""
    arrays, tokens, window = _shapes("bfloat16", 128, 128)
    slopes, seed = jax.ShapeDtypeStruct((8,), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.uint32)

    def loss(numbers, position, segment, window, seed):
        arrays, slopes = numbers
        bias = ALiBi(slopes) + BiasFunction(_literals)
        how = {"bias": bias, "dropout": Dropout(0.1, seed), "soft_cap": 30.0, "sinks": slopes}
        seen = _seen(position, segment, window + jnp.arange(8, dtype=jnp.int32))
        return attention(*arrays, seen, backend="gpu", **how).astype(jnp.float32).sum()

    return jax.value_and_grad(loss), ((arrays, slopes), tokens, tokens, window, seed)


def decoding(heads: tuple[int, int]):
    """One query of each row over a cache of keys, under vmap, with 64-bit numbers on."""
    jax.config.update("jax_enable_x64", True)
    q = jax.ShapeDtypeStruct((2, 1, 1, heads[0], 80), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((2, 1, 3_000, heads[1], 80), jnp.bfloat16)
    place = jax.ShapeDtypeStruct((), jnp.int32)

    def attend(q, k, v, place):
        seen = plan(Causal(), Tokens(place[None]), Tokens.sequence(3_000), block_k=48)
        return jax.vmap(lambda q, k, v: attention(q, k, v, seen, backend="gpu"))(q, k, v)

    return attend, (q, k, k, place)


def _literals(q, k):
    return jnp.where(q.segment == k.segment, 0.5, 0.0) + jnp.where(q.position % 2 == 1, 1.0, 1)


def masks(names: list[str]):
    """Attention and its gradient under each of these masks of the tests, one after the other."""
    q, k = (jax.ShapeDtypeStruct((1, 512, heads, 64), jnp.bfloat16) for heads in (HEADS, 2))
    tokens = jax.ShapeDtypeStruct((1, 512), jnp.int32)

    def loss(arrays, position, segment):
        tokens, total = Tokens(position, segment), 0.0
        for mask in (MASKS[name] for name in names):
            # Leaves that the compiler cannot know: it must compute the mask, as in training.
            mask = jax.tree.map(
                lambda leaf: leaf + (position[0, 0] * 0).astype(jnp.asarray(leaf).dtype), mask
            )
            out = attention(*arrays, plan(mask, tokens, block_q=128, block_k=128), backend="gpu")
            total += out.astype(jnp.float32).sum()
        return total

    return jax.grad(loss), ((q, k, k), tokens, tokens)


def lists(tokens: int, block: int = 128):
    """The lists of a plan's blocks, both ways."""
    codes = jax.ShapeDtypeStruct((1, tokens // block, tokens // block), jnp.int8)
    return lambda codes: (lists_of(codes), lists_of(codes.swapaxes(1, 2))), (codes,)


def over_cards():
    """A ring of eight cards, forward and backward."""
    arrays, tokens, window = _shapes("bfloat16", 128, 128)

    def loss(arrays, position, segment, window):
        here = jax.sharding.get_abstract_mesh()
        spread = context_parallel(attention, mesh=here)
        out = spread(*arrays, _seen(position, segment, window), backend="gpu")
        return out.astype(jnp.float32).sum()

    spec = P(None, "context")
    specs = (spec,) * 3, spec, spec, P()
    return jax.value_and_grad(loss), (arrays, tokens, tokens, window), {"context": 8}, AxisType.Auto, specs


def train_step():
    """The trainer's whole step: packed rows of 8,192 tokens, of 32,768 words, under a growing window."""
    run = Run(
        name="gpu",
        block=128,
        model=Model(
            layers=8,
            width=1024,
            heads=8,
            kv_heads=2,
            hidden=2048,
            backend="gpu",
            dtype="bfloat16",
            remat="full",
        ),
        data=Data(length=8_192),
        curriculum=Curriculum(start=1024),
    )
    program = program_of(run, 32_768, Placement())
    return program.train_step, (state_like(program, 32_768), batch_like(run, program.placement.mesh))


def _shapes(dtype, head_dim, value_dim):
    q, k, v = (
        jax.ShapeDtypeStruct((1, LENGTH, heads, dim), dtype)
        for heads, dim in ((8, head_dim), (2, head_dim), (2, value_dim))
    )
    return (q, k, v), jax.ShapeDtypeStruct((1, LENGTH), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)


def _seen(position, segment, window):
    mask = Causal() & Window(window) & SameSegment()
    return plan(mask, Tokens(position, segment), block_q=128, block_k=128)
