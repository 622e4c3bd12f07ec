"""Every row of docs/migration.md runs as printed, and gives what the other library gives."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from migration_cases import EXPECTED
from migration_checks import Row, softmax

from dynmask_jax import Causal, Tokens, attention, mask_tensor

DOCUMENT = (Path(__file__).parents[2] / "docs" / "migration.md").read_text(encoding="utf-8")
HEAD = "| there | here | note |"


def cells(line: str) -> list[str]:
    """A table's line, cut at its bars; a bar within a cell is written `\\|`."""
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def row(line: str) -> Row:
    """A row, whose cell `here` must be code and nothing else."""
    there, here, note = cells(line)
    assert re.fullmatch("`[^`]+`", here), f"the cell `here` must be one piece of code, got {here}"
    return Row(there.replace("`", ""), here.strip("`"), note)


def rows(section: str) -> list[Row]:
    """The rows of a section's tables."""
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [row(line) for line in lines if line != HEAD and not re.fullmatch(r"[|-]+", line)]


SECTIONS = {
    section.partition("\n")[0]: rows(section)
    for section in re.split("^## ", DOCUMENT, flags=re.MULTILINE)[1:]
}
ROWS = [(section, each) for section in SECTIONS for each in SECTIONS[section]]


@pytest.fixture(scope="module")
def names() -> dict:
    """The names that the document's cells use: its first block, run as printed."""
    (block,) = re.findall(r"^```python\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE)
    made: dict = {}
    exec(block, made)
    return made


@pytest.fixture(scope="module", autouse=True)
def keep_small_programs():
    """Hundreds of programs take milliseconds each to compile: a second run finds these too."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 0.01)
    yield
    jax.config.update(name, before)


@pytest.mark.parametrize(("section", "row"), ROWS, ids=[row.there for _, row in ROWS])
def test_a_row_gives_what_the_other_library_gives(section, row, names):
    assert row.there in EXPECTED[section], "no expectation for this row in tests/migration_cases.py"
    EXPECTED[section][row.there](row, dict(names))


def test_every_expectation_has_one_row():
    printed = {section: [row.there for row in table] for section, table in SECTIONS.items()}
    assert printed == {section: list(cases) for section, cases in EXPECTED.items()}
    everywhere = [row.there for _, row in ROWS]
    assert len(set(everywhere)) == len(everywhere), "a row is named by its cell `there`"


def test_every_library_has_a_source():
    sources = re.findall("^Source: ", DOCUMENT, re.MULTILINE)
    assert len(sources) == len(SECTIONS) - 1, "all but what is not supported"


def test_every_table_has_one_head():
    heads = [line for line in DOCUMENT.splitlines() if line.startswith("| there")]
    assert heads == [HEAD] * len(SECTIONS)


def test_the_dense_backend_differentiates_forward_and_twice_as_advised():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 4, 1, 2))

    @jax.jit
    def loss(q):
        return (attention(q, k, v, Causal(), backend="dense") ** 2).sum()

    @jax.jit
    def slope(q):
        return jnp.vdot(jax.grad(loss)(q), k)

    forward = jax.jit(lambda q: jax.jvp(loss, (q,), (k,))[1])(q)
    twice = jax.jit(lambda q: jnp.vdot(jax.grad(slope)(q), k))(q)
    np.testing.assert_allclose(forward, slope(q), rtol=1e-4)
    np.testing.assert_allclose(twice, (slope(q + 0.01 * k) - slope(q - 0.01 * k)) / 0.02, rtol=1e-2)


def test_an_array_for_another_attention_and_padded_values_give_the_same_as_advised(names):
    q, k, v = (names[name] for name in "qkv")
    wanted = softmax(names, np.tril(np.ones((24, 24), bool)))[0]
    mask = mask_tensor(Causal(), Tokens.sequence(24))[None, None]
    of_array = jax.nn.dot_product_attention(q, k, v, bias=jnp.zeros((1, 1, 24, 24)), mask=mask)
    padded = jnp.pad(v[..., :4], ((0, 0), (0, 0), (0, 0), (0, 4)))
    of_padded = attention(q, k, padded, Causal(), backend="dense")[..., :4]
    np.testing.assert_allclose(of_array, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(of_padded, wanted[..., :4], rtol=1e-4, atol=1e-5)
