"""Groups of lines that the wide loop takes at once: each line once, little computed beyond the plan."""

import jax.numpy as jnp
import numpy as np
import pytest

from dynmask_jax import Causal, Everything, Prefix, Tokens, Window, plan
from dynmask_jax.backends.xla_wide import by_length
from dynmask_jax.block_codes import SKIP

MASKS = {
    "causal": (Causal(), 1.2),
    "window": (Causal() & Window(100), 1.2),
    "everything": (Everything(), 1.0),
    "a key that all see": (Causal() & Window(100) | Prefix(1), 1.2),
}


@pytest.mark.parametrize("by_keys", [False, True], ids=["lines of queries", "lines of keys"])
@pytest.mark.parametrize("name", MASKS)
def test_what_is_computed_is_little_more_than_what_is_shown(name, by_keys):
    mask, most = MASKS[name]
    codes = plan(mask, Tokens.sequence(4_096), block_q=64, block_k=64).codes
    codes = codes.swapaxes(1, 2) if by_keys else codes
    lengths = np.asarray((codes != SKIP).sum(axis=2)).reshape(-1)
    groups = np.asarray(by_length(codes, 64))
    computed = sum(len(group) * lengths[group].max() for group in groups)
    if name == "a key that all see" and by_keys:
        most = 1 + 8 * 64 / lengths.sum()  # one line is long, and its group waits for it
    assert computed <= most * lengths.sum()


@pytest.mark.parametrize(("rows", "batch", "lines"), [(1, 1, 1), (1, 3, 5), (3, 3, 5), (2, 2, 8)])
def test_every_line_is_in_a_group(rows, batch, lines):
    codes = np.random.default_rng(0).integers(0, 3, (rows, lines, 7)).astype(np.int8)
    groups = np.asarray(by_length(jnp.asarray(codes), batch * lines))
    numbers = groups.reshape(-1)[: batch * lines]
    assert sorted(numbers) == list(range(batch * lines))
    lengths = np.tile((codes != SKIP).sum(axis=2).reshape(-1), batch // rows)
    assert (np.diff(lengths[numbers]) >= 0).all()
