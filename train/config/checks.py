"""Checks of the fields of a config's records; an error names the option."""

import math
from typing import Any, get_args


def at_least(section: str, record: Any, **least: float):
    """Refuses fields below their minimum, or NaN; None is accepted."""
    for name, minimum in least.items():
        value = getattr(record, name)
        if value is not None and not value >= minimum:
            raise ValueError(f"{section}{name} must be at least {minimum}, got {value}")


def above_zero(section: str, record: Any, *names: str):
    """Refuses fields that are not above zero; None is accepted."""
    for name in names:
        value = getattr(record, name)
        if value is not None and not value > 0:
            raise ValueError(f"{section}{name} must be positive, got {value}")


def finite(section: str, record: Any, *names: str):
    """Refuses fields that are infinite or NaN; None is accepted."""
    for name in names:
        value = getattr(record, name)
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{section}{name} must be finite, got {value}")


def one_of(section: str, record: Any, **choices: Any):
    """Refuses fields whose value is not in a `Literal`."""
    for name, literal in choices.items():
        if (value := getattr(record, name)) not in get_args(literal):
            listed = ", ".join(map(repr, get_args(literal)))
            raise ValueError(f"{section}{name} must be one of {listed}, got {value!r}")


def known_names(section: str, record: Any, **choices: Any):
    """Refuses fields that are tuples with a name that is not in a `Literal`; None is accepted."""
    for name, literal in choices.items():
        if unknown := [each for each in getattr(record, name) or () if each not in get_args(literal)]:
            listed = ", ".join(get_args(literal))
            raise ValueError(f"{section}{name} must name some of {listed}, got {unknown[0]!r}")
