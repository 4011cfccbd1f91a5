"""As much of PromQL as the alerts and the dashboard use, over scrapes that a test holds; a Prometheus is not at hand.

Route: scrapes (time, text) -> `Series`; an expression -> tokens -> values at a time. A vector is a mapping from labels
to values; a comparison keeps the entries for which it holds, as in PromQL. Lookback is five minutes. `rate` and
`increase` take the samples of the range, without Prometheus' extrapolation to its ends.
Whatever it does not know is refused, so that no expression passes unread; tests/infra/test_observability.py also has
promtool read them, where that is installed.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

Labels = frozenset[tuple[str, str]]
Vector = dict[Labels, float]
Range = dict[Labels, list[tuple[float, float]]]
LOOKBACK_S = 300.0
_TOKEN = re.compile(r"\s*(?:(?P<number>\d+(?:\.\d+)?)(?![smhdw\w])|(?P<duration>\d+[smhdw])|(?P<word>[a-zA-Z_:][\w:]*)|"
                    r"(?P<text>\"[^\"]*\")|(?P<op>=~|!~|!=|>=|<=|==|[-+*/><=(){},\[\]]))")  # fmt: skip
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_AGGREGATES: dict[str, Callable[[list[float]], float]] = {"sum": sum, "max": max, "min": min, "count": len,
                                                          "avg": lambda v: sum(v) / len(v)}  # fmt: skip
_OVER_TIME: dict[str, Callable[[list[tuple[float, float]]], float]] = {
    "last_over_time": lambda samples: samples[-1][1],
    "max_over_time": lambda samples: max(value for _, value in samples),
    "increase": lambda samples: _grown(samples),
    "rate": lambda samples: _grown(samples) / max(1e-9, samples[-1][0] - samples[0][0]),
}
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">": lambda a, b: a > b, "<": lambda a, b: a < b, ">=": lambda a, b: a >= b, "<=": lambda a, b: a <= b,
    "==": lambda a, b: a == b, "!=": lambda a, b: a != b,
}  # fmt: skip
_COUNT: dict[str, Callable[[float, float], float]] = {
    "+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b,
    "/": lambda a, b: a / b if b else float("nan"),
}  # fmt: skip


def _grown(samples: list[tuple[float, float]]) -> float:
    values = [value for _, value in samples]
    return sum(max(0.0, b - a) if b >= a else b for a, b in zip(values, values[1:], strict=False))


@dataclass
class Series:
    """Scrapes in the order of their times."""

    samples: dict[str, Range] = field(default_factory=dict)
    """By metric name and labels: time and value."""

    def add(self, at: float, text: str) -> None:
        """Takes a scrape."""
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                series = self.samples.setdefault(sample.name, {})
                series.setdefault(frozenset(sample.labels.items()), []).append((at, sample.value))

    def labels(self, name: str) -> set[str]:
        """Label names of a metric."""
        return {label for labels in self.samples.get(name, {}) for label, _ in labels}

    def query(self, expression: str, at: float) -> Vector | float:
        """The value of an expression at a time."""
        reader = _Reader(expression, self, at)
        value = reader.comparison()
        reader.end()
        return value

    def fires(self, expression: str, at: float) -> Vector:
        """The entries of an alert's expression at a time; none, and it does not fire."""
        value = self.query(expression, at)
        assert isinstance(value, dict), f"an alert's expression is a vector: {expression}"
        return value


@dataclass(frozen=True)
class Selector:
    """A metric that an expression names, and the labels that it matches or groups by."""

    name: str
    labels: frozenset[str]


class _Reader:
    def __init__(self, expression: str, series: Series, at: float) -> None:
        self.expression, self.series, self.at, self.place = expression, series, at, 0
        self.tokens: list[tuple[str, str]] = []
        place = 0
        while place < len(expression.rstrip()):
            found = _TOKEN.match(expression, place)
            assert found, f"{expression}: not read from {expression[place : place + 20]!r} on"
            assert found.lastgroup is not None
            self.tokens.append((found.lastgroup, found[found.lastgroup]))
            place = found.end()

    def peek(self, ahead: int = 0) -> str:
        at = self.place + ahead
        return self.tokens[at][1] if at < len(self.tokens) else ""

    def next(self, *wanted: str) -> str:
        token = self.peek()
        assert token and (not wanted or token in wanted), f"{self.expression}: {token!r} where {wanted} was expected"
        self.place += 1
        return token

    def end(self) -> None:
        assert self.place == len(self.tokens), f"{self.expression}: {self.peek()!r} is left over"

    def comparison(self) -> Vector | float:
        left = self.sum()
        while self.peek() in _COMPARE:
            holds = _COMPARE[self.next()]
            right = self.sum()
            assert isinstance(left, dict), f"{self.expression}: a vector is compared"
            other = right if isinstance(right, dict) else dict.fromkeys(left, right)
            left = {key: value for key, value in left.items() if key in other and holds(value, other[key])}
        return left

    def sum(self) -> Vector | float:
        left = self.product()
        while self.peek() in ("+", "-"):
            left = _both(left, self.product_after(), self._op)
        return left

    def product(self) -> Vector | float:
        left = self.atom()
        while self.peek() in ("*", "/"):
            op = _COUNT[self.next()]
            left = _both(left, self.atom(), op)
        return left

    def product_after(self) -> Vector | float:
        self._op = _COUNT[self.next()]
        op, value = self._op, self.product()
        self._op = op
        return value

    def atom(self) -> Vector | float:
        kind, token = self.tokens[self.place]
        if kind == "number":
            self.place += 1
            return float(token)
        if token == "(":
            self.next("(")
            value = self.comparison()
            self.next(")")
            return value
        assert kind == "word", f"{self.expression}: {token!r} is not expected here"
        if token in _AGGREGATES:
            return self.aggregate()
        if self.peek(1) == "(":
            return self.function()
        return {key: samples[-1][1] for key, samples in self.range(LOOKBACK_S).items()}

    def function(self) -> Vector | float:
        name = self.next()
        self.next("(")
        if name == "time":
            value: Vector | float = self.at
        elif name == "absent":
            inner = self.comparison()
            value = {} if inner else {frozenset(): 1.0}
        else:
            assert name in _OVER_TIME, f"{self.expression}: the function {name} is not known here"
            found = self.range(None)
            least = 2 if name in ("rate", "increase") else 1
            value = {key: _OVER_TIME[name](samples) for key, samples in found.items() if len(samples) >= least}
        self.next(")")
        return value

    def aggregate(self) -> Vector:
        fold, by = _AGGREGATES[self.next()], self.grouping()
        self.next("(")
        inner = self.comparison()
        self.next(")")
        by = by or self.grouping()
        assert isinstance(inner, dict)
        groups: dict[Labels, list[float]] = {}
        for labels, value in inner.items():
            groups.setdefault(frozenset((k, v) for k, v in labels if k in by), []).append(value)
        return {labels: fold(values) for labels, values in groups.items()}

    def grouping(self) -> list[str]:
        names = []
        if self.peek() == "by":
            self.next("by")
            self.next("(")
            while self.peek() != ")":
                names.append(self.next())
                if self.peek() == ",":
                    self.next(",")
            self.next(")")
        return names

    def range(self, within_s: float | None) -> Range:
        """Samples of a selector within its range, or within these seconds."""
        name, matchers = self.next(), []
        if self.peek() == "{":
            self.next("{")
            while self.peek() != "}":
                label, op, text = self.next(), self.next("=", "!=", "=~", "!~"), self.next().strip('"')
                matchers.append((label, op, text))
                if self.peek() == ",":
                    self.next(",")
            self.next("}")
        if within_s is None:
            self.next("[")
            within_s = seconds(self.next())
            self.next("]")
        found = {}
        for labels, samples in self.series.samples.get(name, {}).items():
            within = [one for one in samples if self.at - within_s < one[0] <= self.at]
            if within and all(_matches(dict(labels), *matcher) for matcher in matchers):
                found[labels] = within
        return found


def seconds(duration: str) -> float:
    """The seconds of a duration such as 15m."""
    return float(duration[:-1]) * _SECONDS[duration[-1]]


def _matches(labels: Mapping[str, str], label: str, op: str, text: str) -> bool:
    value = labels.get(label, "")
    same = bool(re.fullmatch(text, value)) if "~" in op else value == text
    return same is not op.startswith("!")


def _both(left: Vector | float, right: Vector | float, op: Callable[[float, float], float]) -> Vector | float:
    if isinstance(left, dict) and isinstance(right, dict):
        return {key: op(value, right[key]) for key, value in left.items() if key in right}
    if isinstance(left, dict):
        assert not isinstance(right, dict)
        return {key: op(value, right) for key, value in left.items()}
    if isinstance(right, dict):
        return {key: op(left, value) for key, value in right.items()}
    return op(left, right)


def selectors(expression: str) -> list[Selector]:
    """The metrics that an expression names, with the labels in their braces; `by` labels go to all of them."""
    by = {name for names in re.findall(r"\bby\s*\(([^)]*)\)", expression) for name in re.findall(r"\w+", names)}
    found = re.findall(r"\b(ray_\w+)(?:\{([^}]*)\})?", expression)
    return [Selector(name, frozenset(re.findall(r"(\w+)\s*[=!]", inside)) | by) for name, inside in found]
