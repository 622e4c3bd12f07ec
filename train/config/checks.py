"""What the records of a config refuse, each by the option's name."""

from typing import Any, get_args


def at_least(section: str, record: Any, **least: float):
    """Refuses a field below its minimum; one that is None is left alone."""
    for name, minimum in least.items():
        value = getattr(record, name)
        if value is not None and not value >= minimum:  # NaN is refused too
            raise ValueError(f"{section}{name} must be at least {minimum}, got {value}")


def above_zero(section: str, record: Any, *names: str):
    """Refuses a field that is zero or less; one that is None is left alone."""
    for name in names:
        value = getattr(record, name)
        if value is not None and not value > 0:
            raise ValueError(f"{section}{name} must be positive, got {value}")


def one_of(section: str, record: Any, **choices: Any):
    """Refuses a field that is none of a `Literal`'s words."""
    for name, literal in choices.items():
        if (value := getattr(record, name)) not in get_args(literal):
            listed = ", ".join(map(repr, get_args(literal)))
            raise ValueError(f"{section}{name} must be one of {listed}, got {value!r}")
