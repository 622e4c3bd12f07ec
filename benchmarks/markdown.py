"""Numbers as Markdown, and the trainer's tables."""

from train.report.markdown import table as table


def seconds(value: float | str) -> str:
    """A time with three digits; a reason as it is."""
    if isinstance(value, str):
        return value
    return f"{_digits(value)} s" if value >= 1 else f"{_digits(1e3 * value)} ms"


def ratio(value: float | str, to: float | str) -> str:
    """How many times `to`; a dash where either is a reason."""
    if isinstance(value, str) or isinstance(to, str):
        return "–"
    times = value / to
    return f"{times:,.0f}×" if times >= 100 else f"{times:.2f}×"


def share(value: float) -> str:
    """A fraction in percent."""
    return f"{value:.1%}"


def megabytes(count: int | None) -> str:
    """Bytes as MiB, or GiB from 10 GiB; a dash where they are not known."""
    if count is None:
        return "–"
    return f"{count / 2**30:,.0f} GiB" if count >= 10 * 2**30 else f"{_digits(count / 2**20)} MiB"


def _digits(value: float) -> str:
    """Three digits, and never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
