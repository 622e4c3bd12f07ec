"""What a run shows at each step of its clock, for both tasks: where it begins, grows and ends."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from train_cases import small_run

from dynmask_jax import Causal, Prefix, SameSegment, Tokens, mask_tensor, plan
from train.config.sections import Curriculum, Data, Summarize
from train.step.curriculum import growth

LENGTH = 32
KINDS = ["full", "static", "window", "chunks", "reveal"]
GROWING = ["window", "chunks", "reveal"]
DOCUMENT, SUMMARY = 15, 6


def of(tmp_path, kind, task="lm", prefix="bidirectional", rows="packed", **options):
    run = small_run(tmp_path, curriculum=Curriculum(kind=kind, start=4, chunk=8, share=0.5, **options))
    data = replace(run.data, rows=rows)
    return growth(replace(run, task=task, data=data, summarize=Summarize(prefix=prefix)))


def pairs(mask, tokens):
    return np.asarray(mask_tensor(mask, tokens))


def summarised() -> Tokens:
    """A row with a document of 15 tokens and its summary of 6, one of 3 and 4, and padding."""
    sizes = [(DOCUMENT, SUMMARY), (3, 4)]
    position = [LENGTH + np.arange(-document, summary) for document, summary in sizes]
    segment = [np.full(document + summary, i + 1) for i, (document, summary) in enumerate(sizes)]
    padding = np.zeros(LENGTH - sum(map(sum, sizes)), int)
    return Tokens(*(jnp.asarray(np.concatenate([*x, padding])) for x in (position, segment)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", ["packed", "chunked"])
def test_language_modelling_ends_with_all_earlier_tokens_of_the_document(tmp_path, kind, rows):
    grown = of(tmp_path, kind, rows=rows)
    tokens = Tokens.packed([20, 10], length=LENGTH) if rows == "packed" else Tokens.sequence(LENGTH)
    full = Causal() & SameSegment() if rows == "packed" else Causal()
    np.testing.assert_array_equal(pairs(grown.full, tokens), pairs(full, tokens))
    last = pairs(grown.mask(grown.steps), tokens)
    assert (last == pairs(full, tokens)).all() == (kind != "static")
    if kind in GROWING:
        assert pairs(grown.mask(0), tokens).sum() < 0.7 * pairs(full, tokens).sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", ["bidirectional", "causal"])
def test_the_full_mask_of_summaries(tmp_path, kind, prefix):
    grown = of(tmp_path, kind, "summarize", prefix)
    seen = pairs(grown.full, summarised())
    document, summary = np.arange(DOCUMENT), DOCUMENT + np.arange(SUMMARY)
    both_ways = seen[np.ix_(document, document)]
    assert both_ways.all() if prefix == "bidirectional" else (both_ways == np.tri(DOCUMENT)).all()
    assert seen[np.ix_(summary, document)].all()
    assert not seen[np.ix_(document, summary)].any()
    np.testing.assert_array_equal(seen[np.ix_(summary, summary)], np.tri(SUMMARY))
    assert not seen[: DOCUMENT + SUMMARY, DOCUMENT + SUMMARY :].any(), "no other document"
    assert (pairs(grown.mask(grown.steps), summarised()) == seen).all() == (kind != "static")


@pytest.mark.parametrize("kind", GROWING)
@pytest.mark.parametrize("prefix", ["bidirectional", "causal"])
def test_summaries_see_themselves_always_and_more_and_more_of_the_document(tmp_path, kind, prefix):
    grown = of(tmp_path, kind, "summarize", prefix)
    summary, seen_of_document = DOCUMENT + np.arange(SUMMARY), []
    for clock in range(grown.steps + 1):
        seen = pairs(grown.mask(clock), summarised())
        assert not (seen & ~pairs(grown.full, summarised())).any()
        np.testing.assert_array_equal(seen[np.ix_(summary, summary)], np.tri(SUMMARY))
        assert seen[np.arange(DOCUMENT), np.arange(DOCUMENT)].all(), "each token sees itself"
        seen_of_document.append(seen[summary, :DOCUMENT].sum())
    assert seen_of_document == sorted(seen_of_document)
    assert seen_of_document[0] < seen_of_document[-1] == SUMMARY * DOCUMENT


def test_chunks_of_a_document_are_counted_from_its_end_and_the_summary_has_the_last(tmp_path):
    grown = of(tmp_path, "chunks", "summarize")
    seen = pairs(grown.mask(0), summarised())
    chunk = -(np.arange(DOCUMENT)[::-1] // 4)  # of 4 tokens
    np.testing.assert_array_equal(seen[:DOCUMENT, :DOCUMENT], chunk[:, None] == chunk[None, :])
    assert (seen[DOCUMENT : DOCUMENT + SUMMARY, :DOCUMENT] == (chunk == 0)).all()


@pytest.mark.parametrize("kind", GROWING)
def test_plans_of_summaries_skip_what_is_not_shown_and_nothing_else(tmp_path, kind):
    grown = of(tmp_path, kind, "summarize")
    for clock in range(grown.steps + 1):
        mask = grown.mask(clock)
        made = plan(mask, summarised(), block_q=4, block_k=4)
        assert float(made.visible_pairs()) == pairs(mask, summarised()).sum()
        if clock == 0:
            blocks = pairs(grown.full, summarised()).reshape(8, 4, 8, 4).any((1, 3)).sum()
            assert int(made.active) < blocks


def test_a_prefix_that_is_not_asked_for_is_not_in_the_mask(tmp_path):
    assert "Prefix" not in repr(of(tmp_path, "full", "summarize", "causal").full)
    assert repr(Prefix(LENGTH)) in repr(of(tmp_path, "full", "summarize").full)


def test_reveals_random_order_is_the_runs_seeds(tmp_path):
    curriculum = Curriculum(kind="reveal", start=8, chunk=4, order="random")
    run = small_run(tmp_path, curriculum=curriculum)
    tokens = Tokens.sequence(LENGTH)
    masks = [pairs(growth(replace(run, seed=seed)).mask(0), tokens) for seed in (0, 0, 1)]
    assert (masks[0] == masks[1]).all()
    assert (masks[0] != masks[2]).any()


def test_an_end_that_is_no_multiple_is_refused(tmp_path):
    run = small_run(tmp_path, curriculum=Curriculum(start=6, multiple_of=4))
    with pytest.raises(ValueError, match=r"curriculum\.start must be a multiple of .* \(4\), got 6"):
        growth(run)
    run = small_run(tmp_path, curriculum=Curriculum(start=6, multiple_of=6), data=Data(length=LENGTH))
    with pytest.raises(ValueError, match=r"curriculum\.end must be a multiple of .* \(6\), got 32"):
        growth(run)


@pytest.mark.parametrize("kind", GROWING)
@pytest.mark.parametrize(("steps", "share", "end"), [(8, 1.0, 7), (8, 0.5, 4), (3, 0.99, 2), (100, 1.0, 99)])
def test_the_first_step_shows_the_start_and_the_last_the_full_mask(tmp_path, kind, steps, share, end):
    run = small_run(tmp_path, steps=steps, curriculum=Curriculum(kind=kind, start=4, chunk=8, share=share))
    grown = growth(run)
    assert int(grown.window(0)) == 4
    assert [int(grown.window(step)) for step in (end - 1, end, steps - 1)][1:] == [LENGTH, LENGTH]
    assert int(grown.window(end - 1)) < LENGTH
    tokens = Tokens.sequence(LENGTH)
    assert (pairs(grown.mask(steps - 1), tokens) == pairs(grown.full, tokens)).all()
