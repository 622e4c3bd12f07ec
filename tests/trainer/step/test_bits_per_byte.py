"""Bits per byte of a run: equal to a computation from the model's logits and the held-out bytes alone."""

import json
import math
from pathlib import Path

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from train_cases import small_run

from dynmask_jax import Causal, SameSegment, Tokens, plan
from train.config.operation import Evaluation
from train.config.sections import Data
from train.data.bpe import train_bpe
from train.data.corpus import read_corpus
from train.evaluate.validation import Validator
from train.step.program import begin

ENGLISH = "the quick brown fox sees the lazy dog, and the dog sees the fox\n" * 60
RUSSIAN = "быстрая лиса видит ленивую собаку, а собака видит лису\n" * 20
MIXED = "".join(f"the fox 狐狸 sees the dog 狗 number {n}\n" for n in range(60))


def letters_bpe(text: str, path: Path) -> str:
    """A BPE over the letters of a text, to which all others are unknown; white space is dropped."""
    library = Tokenizer(models.BPE(unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    known = "".join(letter for letter in text if letter.isascii())
    library.train_from_iterator(
        [known], trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "<eos>"], show_progress=False)
    )
    library.save(str(path))
    return str(path)


def bytes_bpe(text: str, path: Path) -> str:
    """A byte-level BPE, which spells everything."""
    path.with_suffix(".txt").write_text(text, encoding="utf-8")
    train_bpe([str(path.with_suffix(".txt"))], 300, {}, path)
    return str(path)


CORPORA = {
    "one language": (ENGLISH, None, lambda path: "bytes"),
    "two languages": (ENGLISH, RUSSIAN, lambda path: bytes_bpe(ENGLISH, path)),
    "unknown letters": (MIXED, None, lambda path: letters_bpe(MIXED, path)),
}


def spelled_by_hand(tokenizer, id: int) -> bytes:
    """What a token spells, read off the tokenizer's file: letters as they are, bytes by GPT-2's alphabet."""
    if tokenizer == "bytes":
        return bytes([id]) if id else b""
    facts = json.loads(Path(tokenizer).read_text(encoding="utf-8"))
    token = {id: token for token, id in facts["model"]["vocab"].items()}[id]
    if token in ("<unk>", "<eos>", "<|endoftext|>"):
        return b""
    if facts["model"]["unk_token"]:
        return token.encode()
    library = Tokenizer.from_file(tokenizer)
    # A byte alone may be no text: between two letters the decoder shows how long it is.
    letters = token.replace("Ġ", " ").replace("Ċ", "\n")
    return library.decode([id]).encode() if "�" not in library.decode([id]) else b"?" * len(letters)


@pytest.mark.parametrize("name", CORPORA)
def test_it_is_the_nats_of_targets_over_the_bytes_of_the_same_targets(name, tmp_path):
    train, held_out, tokenizer_of = CORPORA[name]
    paths = {"paths": (str(tmp_path / "train.txt"),)}
    (tmp_path / "train.txt").write_text(train, encoding="utf-8")
    if held_out is not None:
        (tmp_path / "held_out.txt").write_text(held_out, encoding="utf-8")
        paths["held_out_paths"] = (str(tmp_path / "held_out.txt"),)
    tokenizer = tokenizer_of(tmp_path / "tokenizer.json")
    data = Data(**paths, tokenizer=tokenizer, length=32, batch=2, rows="packed", unknown=1.0)
    run = small_run(tmp_path, data=data, evaluation=Evaluation(rows=6))
    corpus = read_corpus(run)
    program, state = begin(run, corpus.tokenizer.vocabulary)
    kernel = state.params["logits"]["kernel"]
    state.params["logits"]["kernel"] = jax.random.normal(jax.random.key(5), kernel.shape)

    nats = count = 0.0
    model = nnx.merge(program.graph, state.params)
    for batch in corpus.held_out:
        seen = plan(Causal() & SameSegment(), Tokens(batch.positions, batch.segments))
        logits = model.unembed(model(jnp.asarray(batch.inputs), {"global": seen}))
        logits = np.asarray(logits, np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        chosen = np.take_along_axis(log_p, batch.targets[..., None], axis=-1)[..., 0]
        nats -= (chosen * batch.weights).sum()
        count += sum(
            len(spelled_by_hand(tokenizer, int(id))) for id in batch.targets[np.asarray(batch.weights) > 0]
        )
    found = Validator(program, corpus)(state)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / count, rel=1e-6)
