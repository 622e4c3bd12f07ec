"""Recall text: what a document holds, and how far back its answers are."""

import json
import random
from collections import Counter

import numpy as np
import pytest

from train.data.recall import KEYS, VALUES, Recall, distances, document, write_recall


def tokens(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)[None].astype(np.int32)


@pytest.mark.parametrize("letters", [1, 3])
def test_a_key_has_one_value_in_a_document(letters):
    text = document(Recall(keys=8, letters=letters), 1_001, random.Random(0))
    slots = [text[at : at + 1 + letters] for at in range(0, 1_001, 1 + letters)][:-1]
    assert len(text) == 1_001
    values = {}
    for slot in slots:
        if slot != "." * (1 + letters):
            assert slot[0] in KEYS
            assert set(slot[1:]) <= set(VALUES)
            assert values.setdefault(slot[0], slot[1:]) == slot[1:]
    assert len(values) == 8


def test_distances_are_spread_over_all_doublings():
    text = tokens(document(Recall(keys=32), 4_096, random.Random(0)))
    found = distances(text, np.ones_like(text))
    doublings = Counter(np.log2(found[found > 0]).astype(int).tolist())
    assert set(doublings) >= set(range(1, 11))
    assert max(doublings.values()) < 4 * min(doublings[n] for n in range(2, 10))


def test_distances_by_hand():
    """A key is looked for in its own document, and each letter of its value is as far."""
    text = tokens("aXYbPQ" + "..aXY" + "aXYbP")
    segments = np.array([[1] * 11 + [2] * 5])
    expected = np.zeros_like(text)
    expected[0, 8:10] = 8
    assert distances(text, segments).tolist() == expected.tolist()
    one = np.ones_like(text)
    expected[0, 11:13] = 3
    expected[0, 14] = 11
    assert distances(text, one).tolist() == expected.tolist()


def test_files_of_documents(tmp_path):
    options = Recall(documents=3, held_out=2, keys=4, seed=5)
    train, held_out = write_recall(tmp_path / "texts", options, 32)
    texts = [
        [json.loads(line)["text"] for line in path.read_text().splitlines()] for path in (train, held_out)
    ]
    assert [len(each) for each in texts] == [3, 2]
    assert {len(text) for each in texts for text in each} == {32}
    assert len({text for each in texts for text in each}) == 5
    before = train.read_text()
    write_recall(tmp_path / "texts", options, 32)
    assert train.read_text() == before


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"recall\.keys must be at most 63, got 64"):
        Recall(keys=64)
    with pytest.raises(ValueError, match=r"recall\.letters must be at least 1, got 0"):
        Recall(letters=0)
    with pytest.raises(ValueError, match=r"data\.length must hold two slots of .* = 4 bytes, got 7"):
        document(Recall(letters=3), 7, random.Random(0))
