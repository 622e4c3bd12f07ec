"""Generation with a cache against generation without one: token by token, under every mask."""

from dataclasses import replace
from functools import partial

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import HEADS, MASKS, UNREADABLE
from slow import mostly

from dynmask_jax import (
    Causal,
    Everything,
    Mask,
    Prefix,
    SameSegment,
    Select,
    Tokens,
    Window,
    growing_chunks,
    growing_window,
    linear,
    plan,
    reveal,
)
from train.config.operation import Generation
from train.config.sections import Model
from train.evaluate.generation import Generator, _Continuation, _follow, rounded_up
from train.evaluate.sampling import next_tokens
from train.model.transformer import Transformer

SHAPE = Model(
    layers=2, width=32, heads=HEADS, kv_heads=2, hidden=48, pattern=("local", "global"), local_window=6
)
VOCABULARY, END, BLOCK = 61, 60, 8
LENGTHS = (11, 3, 1, 16)
GREEDY = Generation(tokens=12, batch=4)
DRAWN = Generation(tokens=12, temperature=1.5, top_k=40, top_p=0.95, batch=4)


def plans(mask: Mask, queries: Tokens, keys: Tokens | None = None, *, window=SHAPE.local_window):
    """Plans of both reaches."""
    own = partial(plan, q_tokens=queries, kv_tokens=keys, block_q=BLOCK, block_k=BLOCK)
    return {"global": own(mask), "local": own(mask & Window(window))}


@pytest.fixture(scope="module")
def model():
    """With a last projection that is not zero, so that logits tell tokens apart."""
    model = Transformer(SHAPE, VOCABULARY, rngs=nnx.Rngs(0))
    model.logits.kernel[...] = jax.random.normal(jax.random.key(1), model.logits.kernel.shape)
    return model


@pytest.fixture(scope="module")
def plain(model):
    return WithoutCache(model)


def generator(model, mask: Mask, **options) -> Generator:
    graph, params = nnx.split(model)
    fields = {"plans": plans, "mask": mask, "ends": (END,), "block": BLOCK}
    return Generator(graph, nnx.to_pure_dict(params), **(fields | options))


def prompts(lengths=LENGTHS) -> list[np.ndarray]:
    return [np.random.default_rng(n).integers(0, END, n).astype(np.int32) for n in lengths]


class WithoutCache:
    """The same by the whole model over the whole text, once for each token: slow, and plain.

    Its mask is `mask & (Causal() | Prefix(prompt))`: a prompt sees all of itself that the mask shows, what is
    made sees only what was there before it.
    """

    def __init__(self, model):
        def logits(mask, text, length, prompt, start):
            place = jnp.arange(len(text), dtype=jnp.int32)
            tokens = Tokens(start + place, (place < length).astype(jnp.int32))
            seen = mask & SameSegment() & (Causal() | Prefix(start + prompt))
            return model.unembed(model(text[None, :], plans(seen, tokens)))[0, length - 1][None, :]

        self.logits = jax.jit(logits)

    def generate(self, mask, prompts, options: Generation, key, boundary=None) -> list[list[int]]:
        own = [jax.random.fold_in(key, number) for number in range(len(prompts))]
        starts = [0 if boundary is None else boundary + 1 - len(prompt) for prompt in prompts]
        return [self._one(mask, *each, options) for each in zip(prompts, starts, own, strict=True)]

    def _one(self, mask, prompt, start, key, options) -> list[int]:
        text = np.zeros(max(LENGTHS) + options.tokens, np.int32)
        text[: len(prompt)] = prompt
        for length in range(len(prompt), len(prompt) + options.tokens):
            logits = self.logits(mask, text, length, len(prompt), start)
            keys = jax.random.fold_in(key, length - len(prompt))[None]
            text[length] = int(next_tokens(logits, keys, options)[0])
            if text[length] == END:
                return text[len(prompt) : length].tolist()
        return text[len(prompt) : len(prompt) + options.tokens].tolist()


CURRICULA = {
    "growing_window": growing_window(linear(2, 20, steps=10)),
    "growing_chunks": growing_chunks(linear(2, 20, steps=10)),
    **{
        f"reveal_{order}": reveal(4, linear(0.0, 1.0, steps=10), order)
        for order in ("nearest", "oldest", "random", "strided", "partial")
    },
    "reveal_everything": reveal(4, linear(0.0, 1.0, steps=10), "nearest", base=Everything()),
    "reveal_prefix": reveal(4, linear(0.0, 1.0, steps=10), "random", base=Causal() | Prefix(7)),
}
EVERY_MASK = (
    MASKS
    | {name: curriculum(5) for name, curriculum in CURRICULA.items()}
    | {"bidirectional": Causal() | Prefix(12)}
)


BY_DEFAULT = [
    *("causal", "same_segment", "random_chunks", "per_head_window", "unreadable", "nothing"),
    *("growing_window", "reveal_prefix", "bidirectional"),
]
"""Kinds of masks; their program is compiled apart from that of the others, which takes minutes."""


def chosen(name: str) -> Mask:
    """One of many masks, chosen by data: so that they are one compilation."""
    some: Mask = Causal()
    for other, mask in EVERY_MASK.items():
        if (other in BY_DEFAULT) == (name in BY_DEFAULT):
            some = Select(jnp.array(other == name), mask, some)
    return some


@pytest.mark.filterwarnings(f"ignore:.*{UNREADABLE}")
@pytest.mark.parametrize("name", mostly(EVERY_MASK, BY_DEFAULT))
def test_with_the_cache_as_without(model, plain, name):
    same_as_without(model, plain, chosen(name), GREEDY)


def test_drawn_with_the_cache_as_without(model, plain):
    same_as_without(model, plain, Everything(), DRAWN)


@pytest.mark.filterwarnings(f"ignore:.*{UNREADABLE}")
@pytest.mark.parametrize("name", ["causal", "bidirectional", "reveal_prefix"])
def test_prompts_that_end_at_a_boundary(model, plain, name):
    """As documents do before their summaries; one of them begins before position 0."""
    same_as_without(model, plain, chosen(name), GREEDY, boundary=12)


def same_as_without(model, plain, mask: Mask, options: Generation, boundary=None):
    """Texts of several lengths, made together with the cache and one by one without."""
    key = jax.random.key(7)
    texts = generator(model, mask, last=boundary).generate(prompts(), options, key)
    expected = plain.generate(mask, prompts(), options, key, boundary)
    assert [text.tolist() for text in texts] == expected
    assert len({tuple(text) for text in texts}) == len(texts)


@pytest.mark.filterwarnings(f"ignore:.*{UNREADABLE}")
def test_a_text_does_not_depend_on_its_batch(model):
    """Batches of three: the longest prompts together, then one that is shorter, and rows left over."""
    parted = generator(model, Causal()).generate(prompts(), replace(GREEDY, batch=3))
    together = generator(model, chosen("causal")).generate(prompts(), GREEDY)
    assert [text.tolist() for text in parted] == [text.tolist() for text in together]


@pytest.mark.filterwarnings(f"ignore:.*{UNREADABLE}")
def test_a_text_ends_before_its_first_end_token(model):
    """Whatever token that is, the other texts go on; one whose first token ends it is empty."""
    mask = chosen("causal")
    endless = [text.tolist() for text in generator(model, mask, ends=(-1,)).generate(prompts(), GREEDY)]
    end = endless[1][0]
    cut = [text.tolist() for text in generator(model, mask, ends=(-1, end)).generate(prompts(), GREEDY)]
    assert cut == [text[: text.index(end)] if end in text else text for text in endless]
    assert cut[1] == []
    assert max(map(len, cut)) == GREEDY.tokens


def test_local_layers_keep_no_more_than_their_window(model):
    for slots, local in ((56, 6), (4, 4)):
        cache = jax.eval_shape(lambda slots=slots: model.begin_cache(3, slots))
        assert {reach: x.shape for reach, x in cache.keys.items()} == {
            "global": (1, 3, slots, 2, 8),
            "local": (1, 3, local, 2, 8),
        }


def test_logits_are_never_those_of_a_whole_prompt(model):
    asked = generator(model, Causal())
    batch = asked._batch(prompts((40,)), [0], 1, None)
    traced = _follow.trace(
        _Continuation(plans, GREEDY, 56), asked.graph, asked.params, asked.mask, batch, jnp.array([END])
    )
    text = str(traced.jaxpr)
    assert f"f32[1,40,{SHAPE.width}]" in text
    assert f"[1,1,{VOCABULARY}]" in text
    assert f"40,{VOCABULARY}]" not in text


def test_what_cannot_be_gone_on_with_is_refused(model):
    with pytest.raises(ValueError, match="prompt 2 of 3 is empty: it must hold one token or more"):
        generator(model, Causal()).generate(prompts((3, 0, 1)), GREEDY)
    with pytest.raises(ValueError, match=r"a key must be given to draw at temperature 1\.5"):
        generator(model, Causal()).generate(prompts(), DRAWN)


@pytest.mark.parametrize("block", [1, 8, 100, 256])
def test_few_lengths_compile_and_none_is_much_longer_than_needed(block):
    rounded = {n: rounded_up(n, block) for n in range(1, 33_000, 7)}
    assert all(n <= to <= 1.25 * n + 2 * block and to % block == 0 for n, to in rounded.items())
    assert len(set(rounded.values())) < 70
