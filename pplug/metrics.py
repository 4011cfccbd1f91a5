"""Scores of predictions, by the benchmark's official rules [1].

- both sides are stripped;
- classification: exact match against the label list, a prediction outside it is wrong; F1 is scikit-learn's macro
  average over the whole label list;
- rating: `float(prediction)`; one that is no finite number becomes the end of the scale that is further from the gold
  (the upper end on a tie). The official code would let "nan" through, and one row would make the whole score nan;
- text: rouge_score's rouge1 and rougeL F-measures without stemming, averaged; where a task names it, METEOR too [2],
  of which `meteor.py` says how far it is the published one;
- rubric: the judged share of a request's aspects that its reply covers [3].

`score` is the figure itself. `item_sums` splits it into per-item columns that may be added over any set of items, and
`from_sums` turns such sums back into scores: that is how an interval resamples thousands of times without scoring anew.

To add a metric, add its record to `METRICS`. A kind of task has its record in `KINDS`.

[1] "LaMP: When Large Language Models Meet Personalization", arXiv:2304.11406, and its published eval code.
[2] "LongLaMP: A Benchmark for Personalized Long-form Text Generation", arXiv:2407.11016.
[3] "LaMP-QA: A Benchmark for Personalized Long-form Question Answering", arXiv:2506.00137, and its evaluation code.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, mean_squared_error

from pplug import meteor, rubric, tasks
from pplug.tasks import TaskSpec

Id = TypeVar("Id", bound=Hashable)
"""The name of a request: a plain id, or a pair of user and id."""


class GoldError(ValueError):
    """A gold that its task does not allow. The message names the request by a plain id, and never by a user's."""

    def __init__(self, message: str, request: Any) -> None:
        super().__init__(message)
        self.request = request
        """The id, as it was given."""


@dataclass(frozen=True)
class Pairs:
    """Golds beside predictions, N of each, read as their kind of task reads them (`Kind.read`)."""

    gold: Any
    predicted: Any
    n_labels: int


@dataclass(frozen=True)
class Kind:
    """The reading of answers of one kind of task."""

    read: Callable[[TaskSpec, Sequence[Any], Sequence[str], Sequence[str]], tuple[Any, Any]]
    """Turns the ids, golds and predictions into what the metrics of this kind compare; ids are for messages."""
    understood: Callable[[TaskSpec, str], bool]
    """Tells whether a prediction is an answer at all."""
    answer: str | None
    """An understood prediction in words; None where any text is one."""


@dataclass(frozen=True)
class Metric:
    """A metric, computed in two ways: from all items at once, and from columns that add up over items."""

    name: str
    kind: str
    """The `TaskSpec.metric` of the tasks that are scored by it."""
    official: Callable[[Pairs], float]
    """The score, as the benchmark computes it."""
    items: Callable[[Pairs], np.ndarray]
    """Columns (N, k) that may be added up over items. A metric that a task may name first has one, its value."""
    total: Callable[[np.ndarray, np.ndarray], np.ndarray]
    """Turns R counts of items (R,) and R sums of those columns (R, k) into R scores (R,)."""
    width: Callable[[TaskSpec], int] = lambda entry: 1
    """k, the number of those columns."""
    value: str | None = None
    """Name of the value that the column of a single item holds; None where an item alone has none."""
    by_default: bool = True
    """False for a metric that a task has to name in `scores`."""
    higher_is_better: bool = True
    percent: bool = False
    """True if people read it in percent, as shares of right answers."""


def columns(entry: TaskSpec) -> int:
    """K, the number of columns of `item_sums`. Column 0 counts, column 1 sums the first of `names`, item by item."""
    return 1 + sum(metric.width(entry) for metric in of_task(entry))


def names(entry: TaskSpec) -> tuple[str, ...]:
    """The metrics of a task by name; the first is the one that a verdict goes by."""
    return tuple(metric.name for metric in of_task(entry))


def of_task(entry: TaskSpec) -> tuple[Metric, ...]:
    """The metrics of a task.

    Raises:
        ValueError: the task names one that its kind of answer does not have, or begins with one that a single answer
            does not have: users and thirds are compared by the mean of the first.
    """
    known = {metric.name: metric for metric in METRICS.values() if metric.kind == entry.metric}
    unknown = [name for name in entry.scores if name not in known]
    if unknown:
        raise ValueError(
            f"task {entry.name}: scores: no metric {unknown[0]!r} of {entry.metric}; it has {', '.join(known)}"
        )
    if entry.scores:
        if known[entry.scores[0]].value != entry.scores[0]:
            first = [name for name, metric in known.items() if metric.value == name]
            raise ValueError(
                f"task {entry.name}: scores: {entry.scores[0]!r} is no mean over answers, and the first metric must be "
                f"one; begin with {' or '.join(first)}"
            )
        return tuple(known[name] for name in entry.scores)
    return tuple(metric for metric in known.values() if metric.by_default)


def sign(name: str) -> int:
    """+1 where more of this metric is better, -1 where less is: a gain is this times a difference."""
    return 1 if METRICS[name].higher_is_better else -1


def score(task: str | TaskSpec, golds: Mapping[Id, str], predictions: Mapping[Id, str]) -> dict[str, float]:
    """Official scores of the predictions: accuracy and f1, mae and rmse, rouge1 and rougeL, or what the task names.

    Args:
        task: a LaMP name or an entry; a name of LaMP_2 means the movie tags, LaMP_2N the news categories.
        golds, predictions: text by request id; the ids must be the same set.

    Raises:
        ValueError: ids differ or there are none (the message names some), or a gold is outside the task's labels.
    """
    entry = _entry(task)
    _, pairs = _pairs(entry, golds, predictions)
    return {metric.name: metric.official(pairs) for metric in of_task(entry)}


def per_item(
    task: str | TaskSpec, golds: Mapping[Id, str], predictions: Mapping[Id, str]
) -> dict[Id, dict[str, float]]:
    """Values of each item: accuracy 0/1, absolute and squared error, or the two ROUGE values.

    Returns:
        By id: {"accuracy"}, {"mae", "squared_error"} or {"rouge1", "rougeL"}. Raises as `score` does.
    """
    entry = _entry(task)
    ids, pairs = _pairs(entry, golds, predictions)
    firsts = {metric.value: metric.items(pairs)[:, 0] for metric in of_task(entry) if metric.value}
    values = {name: column.astype(np.float64).tolist() for name, column in firsts.items()}
    return {i: {name: column[at] for name, column in values.items()} for at, i in enumerate(ids)}


def item_sums(
    task: str | TaskSpec, golds: Mapping[Id, str], predictions: Mapping[Id, str]
) -> tuple[list[Id], np.ndarray]:
    """Per-item columns that may be added up; `from_sums` knows them.

    Returns:
        ids, and (N, K) float64: a 1 that counts the item, then the columns of each metric: for classification hit,
        then C columns each of true positives, predictions and golds; for rating absolute and squared error; for text
        rouge1 and rougeL.
    """
    entry = _entry(task)
    ids, pairs = _pairs(entry, golds, predictions)
    parts = [metric.items(pairs) for metric in of_task(entry)]
    return ids, np.hstack([np.ones((len(ids), 1)), *parts]).astype(np.float64)


def from_sums(task: str | TaskSpec, sums: np.ndarray) -> dict[str, np.ndarray]:
    """Scores from summed columns of `item_sums`.

    Args:
        sums: (R, K): one row per resample; its items may count several times.

    Returns:
        By metric (R,) float64, nan where a resample holds no item.
    """
    entry = _entry(task)
    found, start = {}, 1
    with np.errstate(invalid="ignore", divide="ignore"):
        for metric in of_task(entry):
            end = start + metric.width(entry)
            found[metric.name] = metric.total(sums[:, 0], sums[:, start:end])
            start = end
    return found


def understood(task: str | TaskSpec, prediction: str) -> bool:
    """Tells whether a prediction is an answer at all: one of the labels, or a finite number; any text is one.

    Scoring counts what is no answer as wrong, so that a score alone does not tell a bad guess from no guess.
    """
    entry = _entry(task)
    return KINDS[entry.metric].understood(entry, prediction)


def _entry(task: str | TaskSpec) -> TaskSpec:
    return task if isinstance(task, TaskSpec) else tasks.find(task)


def _pairs(entry: TaskSpec, golds: Mapping[Id, str], predictions: Mapping[Id, str]) -> tuple[list[Id], Pairs]:
    ids = _same_ids(golds, predictions)
    texts = ([side[i].strip() for i in ids] for side in (golds, predictions))
    return ids, Pairs(*KINDS[entry.metric].read(entry, ids, *texts), len(entry.labels))


def _same_ids(golds: Mapping[Id, str], predictions: Mapping[Id, str]) -> list[Id]:
    wrong = {
        "golds have no prediction": [i for i in golds if i not in predictions],
        "predictions have no gold": [i for i in predictions if i not in golds],
    }
    problems = [f"{len(ids)} {what}, such as {', '.join(map(repr, ids[:3]))}" for what, ids in wrong.items() if ids]
    if problems:
        raise ValueError(f"ids of golds and predictions must be the same set: {'; '.join(problems)}")
    if not golds:
        raise ValueError("there is nothing to score: golds and predictions are empty")
    return list(golds)


# --- classification ---------------------------------------------------------------------------------------------------


def _label_indices(
    entry: TaskSpec, ids: Sequence[Any], golds: Sequence[str], predictions: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """(N,) int64 each; a prediction outside the labels is -1."""
    index = {label: at for at, label in enumerate(entry.labels)}
    gold, predicted = (np.array([index.get(text, -1) for text in side], np.int64) for side in (golds, predictions))
    if (gold < 0).any():
        strange = [ids[at] for at in np.flatnonzero(gold < 0)]
        raise GoldError(
            f"task {entry.name}: {len(strange)} golds are outside its {len(entry.labels)} labels "
            f"({', '.join(entry.labels[:4])}, ...), such as that of {_told(strange[0])}; are they golds of "
            "another task?",
            strange[0],
        )
    return gold, predicted


def _told(one: Any) -> str:
    """The id of a request as messages name it; that of a user beside it is left out."""
    return f"id {one!r}" if isinstance(one, str) else "one request"


def _macro_f1(pairs: Pairs) -> float:
    known = list(range(pairs.n_labels))
    return float(f1_score(pairs.gold, pairs.predicted, labels=known, average="macro", zero_division=0))


def _label_counts(pairs: Pairs) -> np.ndarray:
    """(N, 3C): true positives, predictions and golds of each label."""
    labels = np.arange(pairs.n_labels)
    is_gold, is_predicted = pairs.gold[:, None] == labels, pairs.predicted[:, None] == labels
    return np.hstack([is_gold & is_predicted, is_predicted, is_gold])


def _macro_f1_of_counts(n: np.ndarray, sums: np.ndarray) -> np.ndarray:
    true, predicted, gold = np.split(sums, 3, axis=1)
    either = predicted + gold
    f1 = np.divide(2 * true, either, out=np.zeros_like(true), where=either > 0).mean(axis=1)
    return np.where(n > 0, f1, np.nan)


# --- rating -----------------------------------------------------------------------------------------------------------


def _ratings(
    entry: TaskSpec, ids: Sequence[Any], golds: Sequence[str], predictions: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """(N,) float64 each."""
    scale = [float(label) for label in entry.labels]
    low, high = min(scale), max(scale)
    gold_values, values = [], []
    for i, gold_text, text in zip(ids, golds, predictions, strict=True):
        gold, value = _number(gold_text), _number(text)
        if gold is None or not low <= gold <= high:
            raise GoldError(f"task {entry.name}: the gold of {_told(i)} is no number from {low:g} to {high:g}", i)
        furthest = low if abs(low - gold) > abs(high - gold) else high
        gold_values.append(gold)
        values.append(furthest if value is None else value)
    return np.array(gold_values), np.array(values)


def _number(text: str) -> float | None:
    try:
        value = float(text.strip())
    except ValueError:
        return None
    return value if math.isfinite(value) else None


# --- text -------------------------------------------------------------------------------------------------------------


def _rouge(name: str) -> Callable[[Pairs], np.ndarray]:
    """(N, 1): F-measures of one of rouge_score's scores."""

    def items(pairs: Pairs) -> np.ndarray:
        scorer = RougeScorer([name], use_stemmer=False)
        rows = zip(pairs.gold, pairs.predicted, strict=True)
        return np.array([[scorer.score(gold, text)[name].fmeasure] for gold, text in rows])

    return items


def _mean(items: Callable[[Pairs], np.ndarray]) -> Callable[[Pairs], float]:
    return lambda pairs: sum(items(pairs)[:, 0].tolist()) / len(pairs.gold)


def _meteor(pairs: Pairs) -> np.ndarray:
    """(N, 1): METEOR of exact and stem matches."""
    return np.array([[meteor.score(gold, text)] for gold, text in zip(pairs.gold, pairs.predicted, strict=True)])


# --- rubric -----------------------------------------------------------------------------------------------------------


def _judged(
    entry: TaskSpec, ids: Sequence[Any], golds: Sequence[str], predictions: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """Aspects by request, and the judge's score of each aspect; an aspect that was not judged has 0."""
    found = [rubric.read_judgement(text) for text in predictions]
    if all(one is None for one in found) and any(predictions):
        raise ValueError(f"task {entry.name}: these replies have not been judged; run `judge` and score its run")
    counts = []
    for one, gold, text in zip(ids, golds, predictions, strict=True):
        try:
            counts.append(rubric.aspects_of(text, gold))
        except ValueError as error:
            raise GoldError(f"task {entry.name}: the gold of {_told(one)}: {error}", one) from error
    return counts, [[score or 0 for score in one or ()] for one in found]


def _coverage(pairs: Pairs) -> np.ndarray:
    """(N, 1): share of what the aspects could reach."""
    rows = zip(pairs.gold, pairs.predicted, strict=True)
    return np.array([[sum(scores[:count]) / (rubric.BEST * max(1, count))] for count, scores in rows])


# --- the registry -----------------------------------------------------------------------------------------------------


def _mean_of_sums(n: np.ndarray, sums: np.ndarray) -> np.ndarray:
    return sums[:, 0] / n


KINDS = {
    "classification": Kind(
        read=_label_indices,
        understood=lambda entry, prediction: prediction.strip() in entry.labels,
        answer="label of the task",
    ),
    "rating": Kind(
        read=_ratings,
        understood=lambda entry, prediction: _number(prediction) is not None,
        answer="number",
    ),
    "text": Kind(
        read=lambda entry, ids, golds, predictions: (golds, predictions),
        understood=lambda entry, prediction: True,
        answer=None,
    ),
    "rubric": Kind(
        read=_judged,
        understood=lambda entry, prediction: rubric.was_read(prediction),
        answer="judgement of any aspect",
    ),
}
"""The kinds of task by the name that `TaskSpec.metric` has for them."""

METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "accuracy",
            "classification",
            official=lambda pairs: float(accuracy_score(pairs.gold, pairs.predicted)),
            items=lambda pairs: (pairs.gold == pairs.predicted)[:, None],
            total=_mean_of_sums,
            value="accuracy",
            percent=True,
        ),
        Metric(
            "f1",
            "classification",
            official=_macro_f1,
            items=_label_counts,
            total=_macro_f1_of_counts,
            width=lambda entry: 3 * len(entry.labels),
            percent=True,
        ),
        Metric(
            "mae",
            "rating",
            official=lambda pairs: float(mean_absolute_error(pairs.gold, pairs.predicted)),
            items=lambda pairs: np.abs(pairs.predicted - pairs.gold)[:, None],
            total=_mean_of_sums,
            value="mae",
            higher_is_better=False,
        ),
        Metric(
            "rmse",
            "rating",
            official=lambda pairs: math.sqrt(mean_squared_error(pairs.gold, pairs.predicted)),
            items=lambda pairs: ((pairs.predicted - pairs.gold) ** 2)[:, None],
            total=lambda n, sums: np.sqrt(sums[:, 0] / n),
            value="squared_error",
            higher_is_better=False,
        ),
        *(
            Metric(
                name,
                "text",
                official=_mean(_rouge(name)),
                items=_rouge(name),
                total=_mean_of_sums,
                value=name,
            )
            for name in ("rouge1", "rougeL")
        ),
        Metric(
            "meteor",
            "text",
            official=_mean(_meteor),
            items=_meteor,
            total=_mean_of_sums,
            value="meteor",
            by_default=False,
        ),
        Metric(
            "coverage",
            "rubric",
            official=_mean(_coverage),
            items=_coverage,
            total=_mean_of_sums,
            value="coverage",
            percent=True,
        ),
    )
}
"""The metrics by name. The first of a kind is the one that a verdict goes by."""
