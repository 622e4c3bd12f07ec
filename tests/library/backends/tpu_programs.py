"""Programs that the real TPU compiler is given, by name: each returns a function and its arguments' shapes.

Run for `tests/library/backends/test_tpu_compile.py` in a process of its own.
"""

import jax
import jax.numpy as jnp
from cases import HEADS, MASKS
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dynmask_jax import ALiBi, Causal, Dropout, Predicate, SameSegment, Tokens, Window, attention, plan
from train.config.run import Curriculum, Data, Generation, Model, Run
from train.data.batch import Batch
from train.evaluate.generation import Generator, Prompts, _Continuation, _follow
from train.step.program import begin

LENGTH = 32_768


def attention_and_gradient(dtype: str = "bfloat16", head_dim: int = 128, kv_heads: int = 8, **options):
    """Packed documents under a growing window: 32,768 tokens, 8 heads."""
    q = jax.ShapeDtypeStruct((1, LENGTH, 8, head_dim), dtype)
    k = jax.ShapeDtypeStruct((1, LENGTH, kv_heads, head_dim), dtype)
    tokens = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    sinks = jax.ShapeDtypeStruct((8,), jnp.float32)

    def loss(arrays, position, segment, window):
        q, k, v, sinks = arrays
        seen = plan(
            Causal() & Window(window) & SameSegment(), Tokens(position, segment), block_q=512, block_k=512
        )
        out, lse = attention(q, k, v, seen, sinks=sinks, backend="tpu", return_lse=True, **options)
        return out.astype(jnp.float32).sum() + lse.sum()

    return jax.value_and_grad(loss), ((q, k, k, sinks), tokens, tokens, jax.ShapeDtypeStruct((), jnp.int32))


def scores_and_gradient(
    bias: bool, learned: bool, rate: float, keys: int = 128, values: int = 128, soft_cap: float | None = None
):
    """ALiBi, its slopes learned or constants, dropout, and values of another width than keys."""
    q, v = (jax.ShapeDtypeStruct((2, 4096, 8, dim), jnp.bfloat16) for dim in (keys, values))
    slopes, seed = jax.ShapeDtypeStruct((8,), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.uint32)

    def loss(arrays, slopes, seed):
        q, k, v = arrays
        slopes = slopes if learned else jax.lax.stop_gradient(slopes)
        how = {"soft_cap": soft_cap, **({"bias": ALiBi(slopes)} if bias else {})}
        if rate:
            how["dropout"] = Dropout(rate, seed)
        return attention(q, k, v, Causal(), backend="tpu", **how).astype(jnp.float32).sum()

    return jax.value_and_grad(loss, argnums=(0, 1)), ((q, q, v), slopes, seed)


def attention_over_rows_and_heads(axes: dict[str, int], kind: str, sharding: list | None = None):
    """Plain attention and its gradient in a batch that is partitioned over devices, as a model calls it.

    The first axis of the mesh partitions rows, the second, if there is one, heads.
    """
    rows, heads = (*axes, None)[:2]
    q = jax.ShapeDtypeStruct((4, 2048, 8, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((4, 2048, 4, 128), jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct((4, 2048), jnp.int32)

    def loss(qkv, position, segment, window):
        seen = plan(Causal() & Window(window) & SameSegment(), Tokens(position, segment))
        told = None if sharding is None else P(*sharding)
        return attention(*qkv, seen, backend="tpu", sharding=told).astype(jnp.float32).sum()

    shapes = (q, k, k), tokens, tokens, jax.ShapeDtypeStruct((), jnp.int32)
    specs = (P(rows, None, heads),) * 3, P(rows), P(rows), P()
    return jax.value_and_grad(loss), shapes, axes, AxisType[kind], specs


def masks(names: list[str]):
    """Attention and its gradient under each of these masks of the tests, one after the other, in one."""
    q = jax.ShapeDtypeStruct((1, 512, HEADS, 64), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 512, 2, 64), jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct((1, 512), jnp.int32)

    def loss(arrays, position, segment):
        tokens, total = Tokens(position, segment), 0.0
        for mask in (MASKS[name] for name in names):
            # Leaves that the compiler cannot know: it must compute the mask, as in training.
            mask = jax.tree.map(
                lambda leaf: leaf + (position[0, 0] * 0).astype(jnp.asarray(leaf).dtype), mask
            )
            out = attention(*arrays, plan(mask, tokens, block_q=256, block_k=128), backend="tpu")
            total += out.astype(jnp.float32).sum()
        return total

    return jax.grad(loss), ((q, k, k), tokens, tokens)


def under_a_setting(name: str, value):
    """Attention and its gradient where JAX is configured so: the interpreter would not notice."""
    jax.config.update(name, value)
    q = jax.ShapeDtypeStruct((2, 300, 4, 64), jnp.bfloat16)

    def loss(q, window):
        seen = plan(Causal() & Window(window) & Window(200), Tokens.sequence(300), block_q=128, block_k=100)
        return attention(q, q, q, seen, backend="tpu").astype(jnp.float32).sum()

    return jax.grad(loss), (q, jax.ShapeDtypeStruct((), jnp.int32))


def under_vmap():
    """Over arrays and masks together; one of the masks has blocks that are the same for all."""
    q = jax.ShapeDtypeStruct((3, 1, 256, 4, 64), jnp.bfloat16)
    numbers = jax.ShapeDtypeStruct((3,), jnp.int32)

    def loss(q, n):
        masks = Causal() & Window(n), Predicate(lambda q, k, n: ((q.position ^ k.position) & n) != 1, n)
        outs = [attention(q, q, q, mask, backend="tpu").astype(jnp.float32).sum() for mask in masks]
        return outs[0] + outs[1]

    return jax.vmap(jax.grad(loss)), (q, numbers)


def train_step():
    """The trainer's whole step: packed rows of 32,768 tokens, of 32,768 words, under a growing window."""
    run = Run(
        name="tpu",
        block=512,
        model=Model(
            layers=8,
            width=1024,
            heads=8,
            kv_heads=2,
            hidden=2048,
            backend="tpu",
            dtype="bfloat16",
            remat="full",
        ),
        data=Data(length=LENGTH),
        curriculum=Curriculum(start=1024),
    )
    program, state = begin(run, vocabulary=32_768)
    row = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    batch = Batch(row, row, jax.ShapeDtypeStruct((1, LENGTH), jnp.float32), row, row, row, row)
    return program.train_step, (jax.eval_shape(lambda: state), batch)


def decoding():
    """One query of each text over its keys so far, in blocks of another size than they fill."""
    q, k = (
        jax.ShapeDtypeStruct((2, length, heads, 64), jnp.bfloat16) for length, heads in ((1, 8), (1_536, 4))
    )

    def attend(q, k, v, place):
        seen = plan(Causal(), Tokens(place[None]), Tokens.sequence(1_536))
        return attention(q, k, v, seen, backend="tpu")

    return attend, (q, k, k, jax.ShapeDtypeStruct((), jnp.int32))


def generation():
    """Summaries of prompts of 1,024 tokens: the prompts, then one token of each text at a time."""
    run = Run(
        task="summarize",
        block=512,
        model=Model(layers=8, width=512, heads=8, kv_heads=4, hidden=1408, backend="tpu", dtype="bfloat16"),
        data=Data(length=LENGTH),
    )
    program, state = begin(run, vocabulary=512)
    generator = Generator.of(program, None, (0,), LENGTH)
    numbers = jax.ShapeDtypeStruct((2,), jnp.int32)
    keys = jax.eval_shape(lambda: jax.random.key_data(jax.random.split(jax.random.key(0), 2)))

    def follow(params, inputs, lengths, starts, keys):
        prompts = Prompts(inputs, lengths, starts, jax.random.wrap_key_data(keys))
        continuation = _Continuation(generator.plans, Generation(tokens=512, temperature=1.0), 1_536)
        ends = jnp.asarray(generator.ends)
        return _follow(continuation, generator.graph, params, generator.mask, prompts, ends)

    prompts = jax.ShapeDtypeStruct((2, 1_024), jnp.int32), numbers, numbers, keys
    return follow, (jax.eval_shape(lambda: state.params), *prompts)
