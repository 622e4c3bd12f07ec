"""Tokens that follow prompts: in batches, under the mask of training, with past keys and values kept.

Masks read positions and segments, so the cache may have any layout: `train.model.cache`. A slot is of segment
0, which nobody sees, until its token is there: so no token sees one that is made after it, whatever the mask
shows of later ones. A prompt sees all of itself that the mask shows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dynmask_jax import Mask, SameSegment, Tokens
from dynmask_jax.array_typing import Array, Bool, Float, Int, pytree
from train.config.operation import Generation
from train.config.sections import Reach
from train.evaluate.sampling import next_tokens
from train.model.cache import Cache, slot_tokens, slots_of
from train.model.transformer import Plans, Transformer
from train.step.program import Program

ROUNDED_TO = 128
"""Tokens, of which lengths are multiples where a run leaves the blocks of its plans open."""


@pytree
class Prompts:
    """A batch of prompts, each at its row's beginning.

    Attributes:
      inputs: `[B, P]`, with anything after a prompt's end.
      lengths: tokens in each; 0 for a row without a prompt, for which nothing is made.
      starts: the position of each prompt's first token.
      keys: a random key for each.
    """

    inputs: Int[Array, "B P"]
    lengths: Int[Array, " B"]
    starts: Int[Array, " B"]
    keys: Array

    @property
    def width(self) -> int:
        """P, the slot of the first token that is made."""
        return self.inputs.shape[1]

    def tokens(self, reach: Reach, slots: int, made: int | Int[Array, ""]) -> Tokens:
        """What masks read of so many slots of a reach, once `made` tokens follow each prompt."""
        return slot_tokens(reach, slots, self.starts, self.lengths, self.width, made)

    @property
    def own(self) -> Tokens:
        """What masks read of the prompts themselves, `[B, P]`."""
        return self.tokens("global", self.width, 0)


@dataclass(frozen=True)
class Generator:
    """A model that goes on with prompts.

    Attributes:
      graph, params: the model, `train.model.transformer.Transformer`, in two parts.
      plans: `(mask, queries, keys) -> plans` of every reach, as `Masks.plans`.
      mask: what is seen; that of the end of training, `Masks.full`.
      ends: the tokens that end a text, one at least.
      block: lengths are rounded up to multiples of it: of the blocks of the plans, where the run says which.
      last: the position of a prompt's last token, where the task gives it one (`summarize`); None: prompts
        start at position 0.
    """

    graph: nnx.GraphDef
    params: Any
    plans: Callable
    mask: Mask
    ends: tuple[int, ...]
    block: int
    last: int | None = None

    @classmethod
    def of(cls, program: Program, params: Any, ends: tuple[int, ...], last: int | None = None) -> "Generator":
        """For a run's model, under all that its task shows.

        Args:
          program: of the run.
          params: weights, as `Program.weights` gives them.
          ends: `Tokenizer.end`, and others that end a text.
          last: the position of a prompt's last token: `PairLayout.loss_from` of the task `summarize`.
        """
        masks, block = program.masks, program.run.block or ROUNDED_TO
        return cls(program.graph, params, masks.plans, masks.full, ends, block, last)

    def generate(
        self, prompts: Sequence[np.ndarray], options: Generation = Generation(), key: Array | None = None
    ) -> list[np.ndarray]:
        """The tokens that follow each prompt, up to an end token: int32, at most options.tokens.

        Texts depend neither on the others in their batch nor on the batch's size, but for rounding.

        Args:
          prompts: tokens, as many as wanted; batches of options.batch are of about one length.
          options: fixed when compiled. Lengths are rounded up, so that few of them compile anew.
          key: of what is drawn; needed above temperature 0.

        Raises:
          ValueError: an empty prompt, or no key.
        """
        for number, prompt in enumerate(prompts, start=1):
            if not len(prompt):
                raise ValueError(
                    f"prompt {number} of {len(prompts)} is empty: it must hold one token or more"
                )
        if key is None and options.temperature > 0:
            raise ValueError(f"a key must be given to draw at temperature {options.temperature}")
        texts: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)
        # The longest first: what does not fit memory does not fit it at once.
        order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
        for begin in range(0, len(order), options.batch):
            numbers = order[begin : begin + options.batch]
            batch = self._batch(prompts, numbers, min(options.batch, len(prompts)), key)
            for number, row in zip(numbers, self._follow(batch, options), strict=False):
                texts[number] = _until(row, self.ends)
        return texts

    def _batch(self, prompts, numbers: list[int], rows: int, key: Array | None) -> Prompts:
        """The prompts of these numbers as a batch of `rows` rows; those left over have none."""
        lengths = np.zeros(rows, np.int32)
        lengths[: len(numbers)] = [len(prompts[number]) for number in numbers]
        inputs = np.zeros((rows, rounded_up(int(lengths.max()), self.block)), np.int32)
        for row, number in zip(inputs, numbers, strict=False):
            row[: len(prompts[number])] = prompts[number]
        starts = np.zeros_like(lengths) if self.last is None else self.last + 1 - lengths
        own = jnp.asarray(numbers + [0] * (rows - len(numbers)), jnp.uint32)
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(0) if key is None else key))(own)
        return Prompts(jnp.asarray(inputs), jnp.asarray(lengths), jnp.asarray(starts), keys)

    def _follow(self, batch: Prompts, options: Generation) -> np.ndarray:
        """`[B, options.tokens]`, with an end token from where a text ends."""
        # Whole blocks, which attention takes without a copy.
        slots = -(-(batch.inputs.shape[1] + options.tokens) // self.block) * self.block
        continuation, ends = _Continuation(self.plans, options, slots), jnp.asarray(self.ends, jnp.int32)
        return np.asarray(_follow(continuation, self.graph, self.params, self.mask, batch, ends))


def rounded_up(length: int, block: int) -> int:
    """A multiple of `block`, at most a quarter above `length` but for that: four to each doubling.

    >>> [rounded_up(length, 8) for length in (1, 8, 9, 64, 65, 97, 1000)]
    [8, 8, 16, 64, 80, 112, 1024]
    """
    step = 2 ** max(0, (length - 1).bit_length() - 3)
    step = -(-step // block) * block
    return -(-length // step) * step


@pytree
class _Texts:
    """What has been made so far: `made` tokens of each text, of which the last is not in the cache yet."""

    made: Int[Array, ""]
    tokens: Int[Array, "B most"]
    ended: Bool[Array, " B"]
    cache: Cache


@dataclass(frozen=True)
class _Continuation:
    """What is fixed when compiled, beside shapes and the model's structure."""

    plans: Callable
    options: Generation
    slots: int

    def prefill(self, model: Transformer, mask: Mask, prompts: Prompts) -> tuple[Array, Cache]:
        """What the prompts' last tokens lead to, `[B, 1, D]`, and the cache with the prompts in it."""
        cache = model.begin_cache(len(prompts.lengths), self.slots)
        seen = self.plans(mask, prompts.own)
        hidden, cache = model.prefill(prompts.inputs, seen, cache, prompts.lengths)
        # Logits of every token of a prompt would be far larger than it.
        last = jnp.maximum(prompts.lengths - 1, 0)[:, None, None]
        return jnp.take_along_axis(hidden, last, axis=1), cache

    def decode(self, model: Transformer, mask: Mask, prompts: Prompts, texts: _Texts) -> tuple[Array, Cache]:
        """What the tokens made last lead to, `[B, 1, D]`, and the cache with them in it."""
        last = prompts.lengths + texts.made - 1
        # A text that has ended sees nothing more: its blocks are skipped.
        query = Tokens((prompts.starts + last)[:, None], (~texts.ended).astype(jnp.int32)[:, None])
        seen: Plans = {
            reach: self.plans(mask, query, prompts.tokens(reach, slots, texts.made))[reach]
            for reach, slots in slots_of(model.shape, self.slots).items()
            if reach in model.shape.pattern
        }
        token = lax.dynamic_slice_in_dim(texts.tokens, texts.made - 1, 1, axis=1)
        return model.decode(token, seen, texts.cache, prompts.width + texts.made - 1)

    def draw(self, logits: Float[Array, "B V"], keys: Array, made: Int[Array, ""]) -> Int[Array, " B"]:
        """The next token of each text, drawn with its own key and its number in the text."""
        return next_tokens(logits, jax.vmap(partial(jax.random.fold_in, data=made))(keys), self.options)


@partial(jax.jit, static_argnames=("fixed", "graph"))
def _follow(
    fixed: _Continuation, graph, params, mask: Mask, prompts: Prompts, ends: Int[Array, " E"]
) -> Int[Array, "B most"]:
    """What follows each prompt; an end from where a text ends, all of it where there is no prompt."""
    model, mask = nnx.merge(graph, params), mask & SameSegment()

    def add(texts: _Texts, hidden, cache) -> _Texts:
        token = fixed.draw(model.unembed(hidden)[:, 0], prompts.keys, texts.made)
        token = jnp.where(texts.ended, ends[0], token)
        tokens = texts.tokens.at[:, texts.made].set(token)
        ended = (token[:, None] == ends[None, :]).any(axis=1)
        return _Texts(texts.made + 1, tokens, texts.ended | ended, cache)

    hidden, cache = fixed.prefill(model, mask, prompts)
    nothing = jnp.full((len(prompts.lengths), fixed.options.tokens), ends[0], jnp.int32)
    texts = add(_Texts(jnp.int32(0), nothing, prompts.lengths == 0, cache), hidden, cache)
    texts = lax.while_loop(
        lambda texts: (texts.made < fixed.options.tokens) & ~texts.ended.all(),
        lambda texts: add(texts, *fixed.decode(model, mask, prompts, texts)),
        texts,
    )
    return texts.tokens


def _until(row: np.ndarray, ends: tuple[int, ...]) -> np.ndarray:
    """The row's tokens before the first end."""
    (places,) = np.nonzero(np.isin(row, ends))
    return row[: places[0]] if len(places) else row
