"""Scores of predictions, by the benchmark's official rules [1].

- both sides are stripped;
- classification: exact match against the label list, a prediction outside it is wrong; F1 is scikit-learn's macro
  average over the whole label list;
- rating: `float(prediction)`; one that is no finite number becomes the end of the scale that is further from the gold
  (the upper end on a tie). The official code would let "nan" through, and one row would make the whole score nan;
- text: rouge_score's rouge1 and rougeL F-measures without stemming, averaged.

`score` is the figure itself. `item_sums` splits it into per-item columns that may be added over any set of items, and
`from_sums` turns such sums back into scores: that is how an interval resamples thousands of times without scoring anew.

[1] "LaMP: When Large Language Models Meet Personalization", arXiv:2304.11406, and its published eval code.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, mean_squared_error

from pplug import tasks
from pplug.tasks import TaskEntry

NAMES = {"classification": ("accuracy", "f1"), "rating": ("mae", "rmse"), "text": ("rouge1", "rougeL")}
LOWER_IS_BETTER = frozenset({"mae", "rmse"})
Id = TypeVar("Id", bound=Hashable)
"""What a request is known by: a plain id, or a pair of user and id."""


def columns(entry: TaskEntry) -> int:
    """K, the number of columns of `item_sums`. Column 0 counts, column 1 sums the first of `NAMES`, item by item."""
    return 2 + 3 * len(entry.labels) if entry.metric == "classification" else 3


def score(task: str | TaskEntry, golds: Mapping[Id, str], predictions: Mapping[Id, str]) -> dict[str, float]:
    """Official scores of the predictions: accuracy and f1, mae and rmse, or rouge1 and rougeL.

    Args:
        task: a LaMP name or an entry; a name of LaMP_2 means the movie tags, LaMP_2N the news categories.
        golds, predictions: text by request id; the ids must be the same set.

    Raises:
        ValueError: ids differ or there are none (the message names some), or a gold is outside the task's labels.
    """
    entry = _entry(task)
    ids = _same_ids(golds, predictions)
    if entry.metric == "classification":
        gold, predicted = _label_indices(entry, ids, golds, predictions)
        known = list(range(len(entry.labels)))
        f1 = f1_score(gold, predicted, labels=known, average="macro", zero_division=0)
        return {"accuracy": float(accuracy_score(gold, predicted)), "f1": float(f1)}
    if entry.metric == "rating":
        gold_values, values = _ratings(entry, ids, golds, predictions)
        rmse = math.sqrt(mean_squared_error(gold_values, values))
        return {"mae": float(mean_absolute_error(gold_values, values)), "rmse": rmse}
    return dict(zip(NAMES["text"], _rouge(ids, golds, predictions).mean(axis=0).tolist(), strict=True))


def per_item(
    task: str | TaskEntry, golds: Mapping[Id, str], predictions: Mapping[Id, str]
) -> dict[Id, dict[str, float]]:
    """What each item adds: accuracy 0/1, absolute and squared error, or the two ROUGE values.

    Returns:
        By id: {"accuracy"}, {"mae", "squared_error"} or {"rouge1", "rougeL"}. Raises as `score` does.
    """
    entry = _entry(task)
    ids, sums = item_sums(entry, golds, predictions)
    names = {"classification": ("accuracy",), "rating": ("mae", "squared_error"), "text": NAMES["text"]}[entry.metric]
    return {i: dict(zip(names, row[1:].tolist(), strict=False)) for i, row in zip(ids, sums, strict=True)}


def item_sums(
    task: str | TaskEntry, golds: Mapping[Id, str], predictions: Mapping[Id, str]
) -> tuple[list[Id], np.ndarray]:
    """Per-item columns that may be added up; `from_sums` knows them.

    Returns:
        ids, and (N, K) float64: a 1 that counts the item, then for classification hit, C columns each of true
        positives, predictions and golds; for rating absolute and squared error; for text rouge1 and rougeL.
    """
    entry = _entry(task)
    ids = _same_ids(golds, predictions)
    one = np.ones((len(ids), 1))
    if entry.metric == "classification":
        gold, predicted = _label_indices(entry, ids, golds, predictions)
        labels = np.arange(len(entry.labels))
        is_gold, is_predicted = gold[:, None] == labels, predicted[:, None] == labels
        hit = (gold == predicted)[:, None]
        return ids, np.hstack([one, hit, is_gold & is_predicted, is_predicted, is_gold]).astype(np.float64)
    if entry.metric == "rating":
        gold_values, values = _ratings(entry, ids, golds, predictions)
        error = (values - gold_values)[:, None]
        return ids, np.hstack([one, np.abs(error), error**2])
    return ids, np.hstack([one, _rouge(ids, golds, predictions)])


def from_sums(task: str | TaskEntry, sums: np.ndarray) -> dict[str, np.ndarray]:
    """Scores from summed columns of `item_sums`.

    Args:
        sums: (R, K): one row a resample; its items may count several times.

    Returns:
        By metric (R,) float64, nan where a resample holds no item.
    """
    entry = _entry(task)
    with np.errstate(invalid="ignore", divide="ignore"):
        if entry.metric == "classification":
            true, predicted, gold = np.split(sums[:, 2:], 3, axis=1)
            either = predicted + gold
            f1 = np.divide(2 * true, either, out=np.zeros_like(true), where=either > 0).mean(axis=1)
            return {"accuracy": sums[:, 1] / sums[:, 0], "f1": np.where(sums[:, 0] > 0, f1, np.nan)}
        if entry.metric == "rating":
            return {"mae": sums[:, 1] / sums[:, 0], "rmse": np.sqrt(sums[:, 2] / sums[:, 0])}
        return {name: sums[:, 1 + at] / sums[:, 0] for at, name in enumerate(NAMES["text"])}


def understood(task: str | TaskEntry, prediction: str) -> bool:
    """Whether a prediction is an answer at all: one of the labels, or a finite number; any text is one.

    Scoring counts what is no answer as wrong, so that a score alone does not tell a bad guess from no guess.
    """
    entry = _entry(task)
    if entry.metric == "classification":
        return prediction.strip() in entry.labels
    return entry.metric == "text" or _number(prediction) is not None


def _entry(task: str | TaskEntry) -> TaskEntry:
    return task if isinstance(task, TaskEntry) else tasks.find(task)


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


def _label_indices(
    entry: TaskEntry, ids: Sequence[Id], golds: Mapping[Id, str], predictions: Mapping[Id, str]
) -> tuple[np.ndarray, np.ndarray]:
    """(N,) int64 each; a prediction outside the labels is -1."""
    index = {label: at for at, label in enumerate(entry.labels)}
    gold = np.array([index.get(golds[i].strip(), -1) for i in ids], dtype=np.int64)
    if (gold < 0).any():
        strange = [ids[at] for at in np.flatnonzero(gold < 0)]
        raise ValueError(
            f"task {entry.name}: {len(strange)} golds are outside its {len(entry.labels)} labels "
            f"({', '.join(entry.labels[:4])}, ...), such as that of id {strange[0]!r}; are they golds of another task?"
        )
    return gold, np.array([index.get(predictions[i].strip(), -1) for i in ids], dtype=np.int64)


def _ratings(
    entry: TaskEntry, ids: Sequence[Id], golds: Mapping[Id, str], predictions: Mapping[Id, str]
) -> tuple[np.ndarray, np.ndarray]:
    """(N,) float64 each."""
    scale = [float(label) for label in entry.labels]
    low, high = min(scale), max(scale)
    gold_values, values = [], []
    for i in ids:
        gold = _number(golds[i])
        if gold is None or not low <= gold <= high:
            raise ValueError(f"task {entry.name}: the gold of id {i!r} is no number from {low:g} to {high:g}")
        found = _number(predictions[i])
        furthest = low if abs(low - gold) > abs(high - gold) else high
        gold_values.append(gold)
        values.append(furthest if found is None else found)
    return np.array(gold_values), np.array(values)


def _number(text: str) -> float | None:
    try:
        value = float(text.strip())
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _rouge(ids: Sequence[Id], golds: Mapping[Id, str], predictions: Mapping[Id, str]) -> np.ndarray:
    """(N, 2): rouge1 and rougeL F-measures."""
    scorer = RougeScorer(list(NAMES["text"]), use_stemmer=False)
    rows = [scorer.score(golds[i].strip(), predictions[i].strip()) for i in ids]
    return np.array([[row[name].fmeasure for name in NAMES["text"]] for row in rows])
