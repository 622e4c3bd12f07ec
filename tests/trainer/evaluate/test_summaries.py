"""Summaries: what a model is asked, what it is measured by, and what is left on disk."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_cases import small_run

from dynmask_jax import mask_tensor
from train.config.operation import Generation
from train.config.sections import Data, Summarize
from train.data.pair_layout import PairLayout
from train.data.tokenizers import Bytes
from train.data.words import first_words
from train.evaluate.rouge import rouge
from train.evaluate.summaries import Summarizer, evaluate_summaries
from train.step.program import begin

OPTIONS = Generation(tokens=6, batch=2)
EXAMPLES = [
    ("The mask grows with the step", "mask grows"),
    ("Keys are shown to queries", "keys shown"),
    ("Nobody sees more", "nothing more"),
]


@pytest.fixture(scope="module")
def summarizer(tmp_path_factory) -> Summarizer:
    """Of an untrained model whose predictions are not all alike."""
    folder = tmp_path_factory.mktemp("run")
    data = Data(paths=("none.jsonl",), length=32, batch=2)
    program, state = begin(small_run(folder, task="summarize", data=data), Bytes.vocabulary)
    kernel = state.params["logits"]["kernel"]
    random = jax.random.normal(jax.random.key(1), kernel.shape, kernel.dtype)
    params = state.params | {"logits": {"kernel": random}}
    return Summarizer.of(program, params, Bytes(), PairLayout.of(Summarize(), Bytes()), truncate=False)


def test_a_document_ends_just_before_the_boundary_and_is_seen_from_both_sides(summarizer):
    """The end token stands where it does in training, at data.length."""
    generator, document = summarizer.generator, np.arange(5, dtype=np.int32) + 65
    prompt = summarizer._prompt(document, "a", OPTIONS)
    assert prompt.tolist() == [65, 66, 67, 68, 69, Bytes.end]
    tokens = generator._batch([prompt], [0], 1, None).tokens("global", slots=16, made=2)
    assert tokens.position[0, :6].tolist() == [27, 28, 29, 30, 31, 32]
    assert tokens.position[0, 8:10].tolist() == [33, 34]
    assert tokens.segment[0].tolist() == [1] * 6 + [0] * 2 + [1] * 2 + [0] * 6
    seen = mask_tensor(generator.mask, tokens)[0].astype(jnp.int32).tolist()
    assert seen[0][:6] == [1, 1, 1, 1, 1, 0]
    assert seen[5][:6] == [1] * 6
    assert seen[8] == [1] * 6 + [0, 0, 1, 0] + [0] * 6


def test_rouge_and_lead_beside_each_other(summarizer, tmp_path):
    path = tmp_path / "summaries.jsonl"
    scores = evaluate_summaries(summarizer, EXAMPLES, 2, OPTIONS, path)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    documents, references = zip(*EXAMPLES, strict=True)
    assert [record["document"] for record in records] == list(documents)
    assert [record["reference"] for record in records] == list(references)
    assert [record["lead"] for record in records] == ["The mask", "Keys are", "Nobody sees"]
    assert [record["generated"] for record in records] == summarizer.summaries(documents, OPTIONS)
    generated = rouge([record["generated"] for record in records], references)
    first = rouge([first_words(document, 2) for document in documents], references)
    assert scores == {"model": generated, "lead, 2 words": first}
    assert first["rouge1"] > 0


def test_summaries_differ_with_their_documents_and_with_the_key(summarizer):
    documents = [document for document, _ in EXAMPLES]
    greedy = summarizer.summaries(documents, OPTIONS)
    assert len(set(greedy)) == 3
    drawn = replace(OPTIONS, temperature=1.0)
    texts = [summarizer.summaries(documents, drawn, jax.random.key(seed)) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_documents_that_are_refused(summarizer):
    with pytest.raises(ValueError, match="document 2 is empty: there is nothing to summarise"):
        summarizer.summaries(["a", ""], OPTIONS)
    with pytest.raises(
        ValueError,
        match=r"b\.txt has 32 tokens, too many for a model of rows of 32 \(data\.length\), which hold 31",
    ):
        summarizer.summaries(["a" * 31, "a" * 32], OPTIONS, names=["a.txt", "b.txt"])


def test_documents_that_are_cut(summarizer):
    cutting = replace(summarizer, truncate=True)
    document = "".join(map(chr, range(65, 65 + 32)))
    prompt = cutting._prompt(Bytes().encode([document])[0], "a", OPTIONS)
    assert prompt.tolist() == [*range(65, 65 + 32 - 1 - 6), Bytes.end]
    longest = cutting._prompt(np.ones(31, np.int32), "a", OPTIONS)
    assert len(longest) == 32
