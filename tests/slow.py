"""Which of a test's parameters run by default; the others run in `make test-all`."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest
from hypothesis import settings


def mostly(values: Iterable[Any], default: Collection[Any]) -> list[Any]:
    """All values as parameters of a test, of which those that are not in `default` are marked slow."""
    values = list(values)
    missing = [each for each in default if each not in values]
    assert not missing, f"not among the parameters: {missing}"
    return [each if each in default else _slow(each) for each in values]


def _slow(value: Any) -> Any:
    values = value if isinstance(value, tuple) else (value,)
    return pytest.param(*values, marks=pytest.mark.slow)


def examples(default: int, *, thorough: int) -> int:
    """How many examples hypothesis draws for a test, by default and in `make test-all`."""
    return thorough if settings.get_current_profile_name() == "thorough" else default
