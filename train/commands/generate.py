"""The command `generate`: continues prompts."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import jax
import tyro

from train.commands.inference import SamplingOptions, Source, Stopwatch, read_text, unescaped
from train.evaluate.generation import Generator

SHOWN = 400
"""Characters of a prompt that are printed, its last."""


@dataclass(frozen=True)
class Generate:
    """Continues prompts with a trained model. Prints each prompt, quoted with `>`, and its continuation."""

    source: Annotated[Source, tyro.conf.arg(name="")]
    prompt: tuple[str, ...] = ()
    """Texts to continue, one or more."""
    prompt_file: tuple[Path, ...] = ()
    """UTF-8 files, each with one text to continue."""
    sampling: Annotated[SamplingOptions, tyro.conf.arg(name="")] = field(default_factory=SamplingOptions)


def generate(command: Generate):
    """Prints each prompt and its continuation.

    Raises:
      ValueError, OSError: with the reason why it cannot.
    """
    prompts = [*map(unescaped, command.prompt), *map(read_text, command.prompt_file)]
    if not prompts:
        raise ValueError("generate needs a text to go on with: --prompt TEXT or --prompt-file FILE")
    loaded = command.source.load("generate")
    tokenizer, options = loaded.tokenizer, command.sampling.override(loaded.run.generation)
    generator = Generator.of(loaded.program, loaded.params, loaded.ends)
    tokens = list(map(tokenizer.begun, tokenizer.encode(prompts)))
    with Stopwatch() as stopwatch:
        texts = generator.generate(tokens, options, jax.random.key(command.sampling.seed))
    for prompt, before, text in zip(prompts, tokens, texts, strict=True):
        print(f"{_quote(prompt)}\n{tokenizer.decode_after(before, text)}\n")
    stopwatch.print_throughput(sum(map(len, texts)))


def _quote(prompt: str) -> str:
    """The last characters of a prompt, each line after `>`."""
    shown = prompt if len(prompt) <= SHOWN else "… " + prompt[-SHOWN:]
    return "\n".join(f"> {line}" for line in shown.splitlines())
