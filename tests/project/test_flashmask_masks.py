"""FlashMask's twelve patterns against their definitions in NumPy, pair by pair, and the blocks skipped."""

import jax
import numpy as np
import pytest

from benchmarks.flashmask_masks import GAPS, PATTERNS, PREFIXES, eviction, lengths
from dynmask_jax import mask_tensor, plan

TOKENS = 256
BLOCK = 16
DOCUMENTS = [79, 55, 122]


def grid(tokens=TOKENS):
    """Queries down, keys across."""
    return np.arange(tokens)[:, None], np.arange(tokens)[None, :]


def full():
    return np.ones((TOKENS, TOKENS), bool)


def causal():
    return np.tril(full())


def sliding_window():
    q, k = grid()
    return (q - 32 < k) & (k <= q)


def document():
    seen = np.zeros((TOKENS, TOKENS), bool)
    for first, end in ((0, 79), (79, 134), (134, 256)):
        seen[first:end, first:end] = True
    return seen


def causal_document():
    return document() & causal()


def share_question():
    q, k = grid()
    seen = np.zeros((TOKENS, TOKENS), bool)
    for start in (0, 128):
        question, first, end = start + 40, start + 67, start + 128
        seen |= (q >= start) & (q < end) & (k >= start) & (k < question)
        seen |= (q >= question) & (q < first) & (k >= question) & (k < first)
        seen |= (q >= first) & (q < end) & (k >= first) & (k < end)
    return seen & causal()


def global_sliding_window():
    q, k = grid()
    seen = abs(q - k) <= 16
    seen[:16, :] = True
    seen[:, :16] = True
    return seen


def causal_blockwise():
    seen = causal_document()
    last = sum(DOCUMENTS[:-1])
    seen[last:] = causal()[last:]
    return seen


def prefix_lm_document():
    seen, start = causal_document(), 0
    for length, prefix in zip(DOCUMENTS, (32, 55, 16), strict=True):
        seen[start : start + length, start : start + prefix] = True
        start += length
    return seen


def prefix_lm_causal():
    seen = causal()
    seen[:, :32] = True
    return seen


def qk_sparse():
    seen = causal()
    for first, last in ((32, 49), (74, 127)):
        seen[first:last, first:last] = False
    return seen


def random_eviction():
    seen = causal()
    for key, query in enumerate(eviction(TOKENS, TOKENS // 2)):
        seen[query:, key] = False
    return seen


DEFINITIONS = {
    "full": full,
    "causal": causal,
    "sliding window": sliding_window,
    "causal document": causal_document,
    "document": document,
    "share question": share_question,
    "global sliding window": global_sliding_window,
    "causal blockwise": causal_blockwise,
    "prefix-LM document": prefix_lm_document,
    "prefix-LM causal": prefix_lm_causal,
    "QK-sparse": qk_sparse,
    "random eviction": random_eviction,
}


def visible(name):
    pattern = PATTERNS[name](TOKENS)
    return np.asarray(mask_tensor(pattern.mask, pattern.tokens))


def test_there_are_twelve():
    assert PATTERNS.keys() == DEFINITIONS.keys()
    assert len(PATTERNS) == 12
    assert lengths(TOKENS) == DOCUMENTS
    assert len({visible(name).tobytes() for name in PATTERNS}) == 12, "no two are the same"


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_is_its_definition_pair_by_pair(name):
    np.testing.assert_array_equal(visible(name), DEFINITIONS[name]())


# Positions of packed documents begin anew: a block that holds the end of one and the start of the next
# ranges over all positions of both, and its neighbours are tested though nothing of them is visible.
LOOSE = {"causal document": 0.06, "prefix-LM document": 0.02}


@pytest.mark.parametrize("name", PATTERNS)
def test_a_plan_skips_the_blocks_that_are_empty(name):
    pattern = PATTERNS[name](TOKENS)
    blocks = TOKENS // BLOCK
    seen = DEFINITIONS[name]().reshape(blocks, BLOCK, blocks, BLOCK).any(axis=(1, 3))
    active = plan(pattern.mask, pattern.tokens, block_q=BLOCK, block_k=BLOCK).active
    computed = float(active) / blocks**2
    assert seen.mean() <= computed <= seen.mean() + LOOSE.get(name, 0.0)


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_scales_to_other_lengths(name):
    pattern = PATTERNS[name](300)
    assert pattern.tokens.shape == (300,)
    share = np.asarray(mask_tensor(pattern.mask, pattern.tokens)).mean()
    assert share == pytest.approx(visible(name).mean(), abs=0.03)


def test_at_8192_tokens_sizes_are_flashmasks():
    documents = lengths(8_192)
    assert documents == [2_538, 1_742, 3_213 + 699]
    prefixes = [round(share * length) for share, length in zip(PREFIXES, documents, strict=True)]
    assert prefixes == [1_024, 1_742, 512]
    assert [(round(8_192 * start), round(8_192 * length)) for start, length in GAPS] == [
        (1_024, 538),
        (2_358, 1_700),
    ]


def test_eviction_keeps_the_budget_and_never_drops_the_query_itself():
    gone = eviction(TOKENS, budget=100)
    q, k = grid()
    held = (k <= q) & (q < gone[None, :])
    np.testing.assert_array_equal(held.sum(axis=1), np.minimum(np.arange(TOKENS) + 1, 100))
    assert held.diagonal().all()
    assert (eviction(TOKENS, 100, seed=1) != gone).any()


def test_gaps_are_those_of_flashmask_at_its_own_length():
    assert [(start * 8_192, length * 8_192) for start, length in GAPS] == [(1_024, 538), (2_358, 1_700)]


@pytest.mark.parametrize("name", PATTERNS)
def test_flex_attention_reads_the_same_expression(name):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from benchmarks.torch_peers import mask_mod

    pattern = PATTERNS[name](TOKENS)
    q, k = (torch.from_numpy(np.array(x)) for x in np.broadcast_arrays(*grid()))
    with jax.numpy_dtype_promotion("standard"):
        seen = mask_mod(pattern.mask, pattern.tokens)(0, 0, q, k)
    np.testing.assert_array_equal(seen.numpy(), DEFINITIONS[name]())
