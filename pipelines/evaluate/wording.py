"""Words for figures and their intervals, the same on page, charts and screen."""

import math
from collections.abc import Sequence

from pipelines.evaluate.figures import KnownScores, MethodFigures
from pplug import intervals, metrics


def percent(metric: str) -> bool:
    """Tells whether a metric is written in percent."""
    return metrics.METRICS[metric].percent


def turned(metric: str, difference: float, interval: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """A difference and its interval, turned so that more is better."""
    turn = metrics.sign(metric)
    low, high = sorted(turn * end for end in interval)
    return turn * difference, (low, high)


def leaves_out_zero(interval: Sequence[float]) -> bool:
    """Tells whether a difference with this interval is no matter of chance."""
    low, high = interval
    return low > 0 or high < 0


def direction(interval: Sequence[float], people: int) -> int:
    """+1 for a difference above zero that is no matter of chance, -1 for one below, else 0: of fewer people than
    FEWEST_OWNERS nothing is claimed, and neither is it of an interval that is not known."""
    low, high = interval
    return 0 if people < intervals.FEWEST_OWNERS else int(low > 0) - int(high < 0)


def value(metric: str, number: float | None, signed: bool = False) -> str:
    """A figure as the page writes it: 81.4%, +0.031, +4.2 (points)."""
    if number is None or math.isnan(number):
        return "-"
    shown = 100 * number if percent(metric) else number
    digits = 1 if percent(metric) else 3
    unit = "%" if percent(metric) and not signed else ""
    return f"{shown:{'+' if signed else ''}.{digits}f}{unit}".replace("-", "\N{MINUS SIGN}")


def points(metric: str, number: float) -> str:
    """A signed difference with its unit: +4.2 points, +0.031; one that is not known has none."""
    return value(metric, number, True) + (" points" if percent(metric) and not math.isnan(number) else "")


def share(number: float) -> str:
    """A share from 0 to 1 as the page writes it: 81.4%."""
    return value("accuracy", number)


def between(metric: str, interval: Sequence[float], signed: bool = False) -> str:
    """An interval as the page writes it: 79.6 to 83.4%."""
    low, high = (value(metric, end, signed) for end in interval)
    return f"{low.removesuffix('%')} to {high}"


def shares_between(interval: Sequence[float]) -> str:
    """An interval of shares from 0 to 1 as the page writes it."""
    return between("accuracy", interval)


def seconds(number: float | None) -> str:
    """Seconds in three digits."""
    return "-" if number is None else f"{number:.3g}"


def size(number: float | None) -> str:
    """Bytes in words."""
    if number is None:
        return "-"
    for unit in ("B", "KB", "MB"):
        if number < 1000 or unit == "MB":
            return f"{number:.0f} {unit}" if unit == "B" or number >= 10 else f"{number:.1f} {unit}"
        number /= 1000
    return ""


def cell(number: float, interval: Sequence[float], people: int | None = None) -> str:
    """A figure with its interval as the screen writes it; * marks a difference that is no matter of chance.

    Args:
        people: those behind a difference; None: the figure is none.
    """
    form = "{:.3f}" if people is None else "{:+.3f}"
    low, high = interval
    star = "*" if people is not None and direction(interval, people) else ""
    return f"{form.format(number)} [{form.format(low)}, {form.format(high)}]{star}"


def better_worse(row: MethodFigures) -> str:
    """Shares of users who do better and worse than with `none`; empty for a method that is not compared."""
    users = row.users_compared
    return "" if users is None else f"{100 * users.better.share:.0f}% / {100 * users.worse.share:.0f}%"


def unclear_share(row: MethodFigures) -> str:
    """Share of a method's replies that are no answer; empty where any text is one."""
    return "" if row.not_understood is None else f"{100 * row.not_understood.share:.1f}%"


def best_possible(known: KnownScores) -> str:
    """The known scores in words."""
    scores = {
        "without history": known.best_without_history,
        "with it": known.best_with_history,
        "expected with another user's": known.other_user,
    }
    return ", ".join(f"{score:.3f} {words}" for words, score in scores.items() if score is not None)
