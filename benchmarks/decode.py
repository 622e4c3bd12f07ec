"""Decoding with a cache, beside transformers of the same weights; and the choice of the next token.

Each generation is timed to one token and to several: the difference is what decoding takes, without the
prompt.
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import transformers_peer
from benchmarks.markdown import ratio, seconds, table
from benchmarks.timing import Ways, compared
from train.config import operation
from train.config.run import Run
from train.config.sections import Model, Reach
from train.evaluate.generation import Generator
from train.evaluate.sampling import next_tokens
from train.model.transformer import Transformer
from train.pretrained.export_config import config_of
from train.pretrained.write import Contents, write_folder
from train.step.program import program_of

OURS, THEIRS = "dynmask_jax", "transformers"
NO_END = -1
"""A token that no vocabulary has, so that no text ends."""


@dataclass(frozen=True)
class Settings:
    """A model like Gemma 3 270M, with random weights, and what it goes on with.

    Attributes:
      prompt: tokens in each prompt.
      tokens: made after each.
      batches: texts at once.
    """

    layers: int = 18
    width: int = 640
    heads: int = 4
    kv_heads: int = 1
    head_dim: int = 256
    hidden: int = 2_048
    vocabulary: int = 262_144
    pattern: tuple[Reach, ...] = ("local", "local", "local", "local", "local", "global")
    window: int = 512
    prompt: int = 128
    tokens: int = 129
    batches: tuple[int, ...] = (1, 8)

    def model(self) -> Model:
        """The options of the model."""
        return Model(
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            hidden=self.hidden,
            vocab_size=self.vocabulary,
            max_position_embeddings=32_768,
            activation="gelu_tanh",
            tied_embeddings=True,
            embedding_scale=float(self.width) ** 0.5,
            qk_norm=True,
            post_norms=True,
            norm_unit_offset=True,
            query_scale=self.head_dim**-0.5,
            pattern=tuple(self.pattern),
            local_window=self.window,
            rope_theta=1_000_000.0,
            rope_local_theta=10_000.0,
        )


QUICK, FULL = Settings(layers=6, vocabulary=32_768, tokens=33, batches=(1,)), Settings()


def measure(settings: Settings, repeats: int) -> dict:
    """Seconds of generation for each batch, ours and theirs, and of the choice of a token."""
    model = settings.model()
    draw = np.random.default_rng(0)
    prompts = draw.integers(2, settings.vocabulary, (max(settings.batches), settings.prompt)).astype(np.int32)
    start = Transformer(model, settings.vocabulary, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.split(start)[1])
    del start
    with tempfile.TemporaryDirectory() as folder:
        hub = Path(folder) / "hub"
        theirs = transformers_peer.generate(lambda: _written(model, params, hub))
        ours = _ways(settings, _ours(model, params), prompts)
        calls: dict[str, Ways] = {OURS: ours, THEIRS: dict.fromkeys(ours, theirs)}
        if callable(theirs):
            calls[THEIRS] = _ways(settings, theirs, prompts)
        times = compared(calls, repeats)
    sampling = compared({name: {"seconds": call} for name, call in _choices(settings).items()}, repeats)
    return {"settings": asdict(settings), "times": times, "sampling": sampling}


def _ways(settings: Settings, generate: Callable, prompts: np.ndarray) -> Ways:
    return {
        way: lambda rows=prompts[:batch], count=count: generate(rows, count)
        for batch in settings.batches
        for way, count in zip(_names(batch), (1, settings.tokens), strict=True)
    }


def _names(batch: int) -> tuple[str, str]:
    texts = f"{batch} text{'s' if batch > 1 else ''}"
    return f"prompt, {texts}", f"prompt and tokens, {texts}"


def _ours(model: Model, params: Any) -> Callable:
    program = program_of(Run(model=model), model.vocabulary(0))
    generator = Generator.of(program, params, (NO_END,))

    def generate(prompts: np.ndarray, count: int):
        return generator.generate(list(prompts), operation.Generation(tokens=count, batch=len(prompts)))

    return generate


def _written(model: Model, params: Any, folder: Path) -> Path:
    write_folder(Contents(model, params, config_of(model, "float32"), "float32", {}), folder)
    return folder


def _choices(settings: Settings) -> dict[str, Callable]:
    """The choice of one token, by its name."""
    logits = 3 * jax.random.normal(jax.random.key(0), (1, settings.vocabulary))
    keys = jax.random.split(jax.random.key(1), 1)

    def choice(logits, **options) -> Callable:
        chosen = jax.jit(lambda logits, keys: next_tokens(logits, keys, operation.Generation(**options)))
        return lambda: chosen(logits, keys)

    return {
        "greedy": choice(logits),
        "temperature 1": choice(logits, temperature=1.0),
        "top-k 50": choice(logits, temperature=1.0, top_k=50),
        "top-p 0.95, a nucleus of few tokens": choice(4 * logits, temperature=1.0, top_p=0.95),
        "top-p 0.95, of all tokens alike": choice(jnp.zeros_like(logits), temperature=1.0, top_p=0.95),
    }


def section(results: dict) -> str:
    """The results as Markdown."""
    settings = Settings(**results["settings"])
    rows = [_row(settings, results["times"], batch) for batch in settings.batches]
    columns = ["tokens a second", OURS, THEIRS, "ours over theirs", "the prompt", f"the prompt, {THEIRS}"]
    sampled = [[name, seconds(times["seconds"])] for name, times in results["sampling"].items()]
    heads = f"{settings.heads} heads of {settings.head_dim}, key heads {settings.kv_heads}"
    return (
        f"{settings.layers} layers of width {settings.width}, {heads}; a window of {settings.window} in all "
        f"but each {len(settings.pattern)}th layer; a vocabulary of {settings.vocabulary:,}; random weights, "
        f"float32. Greedy, after prompts of {settings.prompt} tokens: the seconds of {settings.tokens} "
        "tokens without those of the first, which are the prompt's.\n\n"
        f"{table(columns, rows)}\n\n"
        "The next token, from the logits of one text:\n\n"
        f"{table(['choice', 'time'], sampled)}"
    )


def _row(settings: Settings, times: dict, batch: int) -> list[str]:
    prompt, both = _names(batch)
    speeds = [_speed(times[name][prompt], times[name][both], settings, batch) for name in (OURS, THEIRS)]
    shown = [speed if isinstance(speed, str) else f"{speed:.2f}" for speed in speeds]
    prompts = [seconds(times[name][prompt]) for name in (OURS, THEIRS)]
    return [prompt.removeprefix("prompt, "), *shown, ratio(*speeds), *prompts]


def _speed(prompt: float | str, both: float | str, settings: Settings, batch: int) -> float | str:
    """Tokens a second of all texts, or why there are none."""
    if isinstance(prompt, str) or isinstance(both, str):
        return str(prompt)
    return batch * (settings.tokens - 1) / (both - prompt)
