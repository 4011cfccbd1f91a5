"""Answers of a task with labels: which texts count as a label, and how they are stored."""

from collections.abc import Iterable
from decimal import Decimal
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.errors import InputError
from pplug.tasks import TaskSpec

Matching = Literal["normalise", "exact", "infer"]
MOST_LABELS = 1000
"""Greatest number of labels that `infer` makes of a source; more of them are no labels but texts."""


class LabelRule:
    """Finds a task's label for each answer."""

    def __init__(self, task: TaskSpec, matching: Matching) -> None:
        self.task, self.matching = task, matching
        self._known = set(task.labels)
        self._by_form: dict[str, str | None] = {}
        self._scale = sorted(n for label in task.labels if (n := _number(label)) is not None)
        for label in task.labels:
            written = form(label)
            self._by_form[written] = None if written in self._by_form else label  # None: two labels look alike

    def label(self, answer: str) -> str | None:
        """Returns an answer as it is stored, or None if it is outside the task's labels.

        A task that writes has no labels, and its answers stay as they are. A rating may lie between the points of the
        scale, but not beyond its ends.
        """
        if not self.task.labelled or answer in self._known:
            return answer
        text = answer.strip()
        if self.matching == "exact":
            return answer if text in self._known or self._rated(text) else None
        found = text if text in self._known else self._by_form.get(form(text))
        if found is None and (self._rated(text) or self._new(text)):
            return text
        return found

    def column(self, answers: pa.Array) -> tuple[pa.Array, np.ndarray]:
        """Returns `label` of each answer, with the answer itself where that is None, and True there, (N,) bool."""
        if not self.task.labelled:
            return answers, np.zeros(len(answers), bool)
        coded = pc.dictionary_encode(answers)
        found = [self.label(answer) for answer in coded.dictionary.to_pylist()]
        stored = [a if f is None else f for a, f in zip(coded.dictionary.to_pylist(), found, strict=True)]
        outside = pa.array([one is None for one in found], pa.bool_()).take(coded.indices)
        flags = pc.fill_null(outside, False).to_numpy(zero_copy_only=False)
        return pa.array(stored, answers.type).take(coded.indices), flags

    def _new(self, text: str) -> bool:
        return self.matching == "infer" and self.task.metric == "classification" and bool(text)

    def _rated(self, text: str) -> bool:
        if self.task.metric != "rating" or (number := _number(text)) is None:
            return False
        return not self._scale or self.matching == "infer" or self._scale[0] <= number <= self._scale[-1]


def with_labels(task: TaskSpec, found: Iterable[str]) -> TaskSpec:
    """Returns the task with the labels found besides its own, in the order of numbers or of texts.

    Raises:
        InputError: they are too many, or fewer than two in all.
    """
    labels = set(task.labels) | set(found)
    if not 2 <= len(labels) <= MOST_LABELS:
        raise InputError(
            f"task {task.name}: its answers have {len(labels)} different values, and a task with labels has from 2 to "
            f"{MOST_LABELS}; map another column to {task.target!r}, or give the task metric: text"
        )
    if task.metric == "rating" and (odd := sum(not is_number(label) for label in labels)):
        raise InputError(
            f"task {task.name}: {odd} of its {len(labels)} answers are no numbers, which a rating needs; give the task "
            "metric: classification, or map another column"
        )
    numbers = [_number(label) for label in labels]
    key = (lambda label: (_number(label), label)) if None not in numbers else (lambda label: label)
    new = sorted(labels - set(task.labels), key=key)
    ordered = sorted(labels, key=key) if not task.labels else [*task.labels, *new]
    return TaskSpec.model_validate(task.model_dump() | {"labels": ordered})


def form(text: str) -> str:
    """Returns what two spellings of one label share: case, spaces and the form of a number do not count."""
    number = _number(text)
    return " ".join(text.casefold().split()) if number is None else str(number)


def is_number(text: str) -> bool:
    """Says whether an answer may be a rating."""
    return _number(text) is not None


def _number(text: str) -> Decimal | None:
    try:
        number = Decimal(text)
        return number.normalize() + 0 if number.is_finite() else None
    except ArithmeticError:  # no number, or one that is too large
        return None
