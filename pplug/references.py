"""References that need no LLM: what simple counting and a linear classifier reach on the same requests.

Route: fields of an item -> answer and text -> per user counts or a mean; over all users a classifier -> predictions.
A personalised LLM that does not beat these has not been shown to be worth its cost.
Shapes: N texts or items, L labels of the task.

Classifier times user: P(label | text, user) is taken as proportional to

    P(label | text) * (n(label) + K * q(label)) / (n + K) / q(label)

where n(label) counts the user's visible items with the label, n all of them, q is the label's share among the texts
that the classifier was trained on, and K is USER_WEIGHT. This is Bayes' rule for a text and a user that are independent
given the label. K items of the overall distribution smooth the user's counts: a user without items gets the classifier
alone.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.linear_model import SGDClassifier

from pplug.retrieval import WordIndex, words
from pplug.tasks import TaskSpec, fill, query

USER_WEIGHT = 10.0
"""Chosen on the training users of a task with 15 labels: accuracy .572 with 1, .577 with 3 and .580 with 10."""
INVERSE_PENALTY = 10.0
"""C of the logistic regression; its penalty per text is 1 / (C * N). Chosen on the same users."""
EPOCHS = 15
MAX_CHARS = 4_000
"""Characters of a text that the classifier reads: bounds the memory, whatever users have written."""
MAX_FEATURES = 2**18
MAX_WEIGHTS = 2**24
"""Labels times features: 128 MiB of weights."""

ABOUT = {
    "classification": {
        "user-label": "The most frequent label among the user's items that the request may see.",
        "overall-label": "The most frequent label among items of all users, or of a random sample of them.",
        "classifier": "A linear classifier over TF-IDF of the request's text, trained on all users' items or a sample.",
        "classifier+user": "The classifier's probabilities times the user's own label frequencies.",
    },
    "rating": {
        "user-mean": "The mean rating of the user's items that the request may see.",
        "overall-mean": "The mean rating of items of all users, or of a random sample of them.",
    },
    "text": {"similar-item": "The answer of the user's item that is most similar to the request by BM25."},
}
"""One sentence per reference, by metric."""


def answer(fields: Mapping[str, str], task: TaskSpec) -> str | None:
    """An item's own answer; None where it has none, or one that is outside the task's labels or scale."""
    text = fields.get(task.target or "", "").strip()
    if task.metric == "classification":
        return text if text in task.labels else None
    if task.metric == "rating":
        return text if rating(text, task) is not None else None
    return text or None


def rating(text: str, task: TaskSpec) -> float | None:
    """A number on the task's scale, else None."""
    try:
        value = float(text)
    except ValueError:
        return None
    scale = [float(label) for label in task.labels]
    return value if math.isfinite(value) and min(scale) <= value <= max(scale) else None


def text_of(fields: Mapping[str, str], task: TaskSpec) -> str:
    """Text that a request made from this item would ask with, or the item without its label where the task makes none.

    Raises:
        ValueError: a field is missing.
    """
    if task.input is None:
        return fill(task.item_without_label, fields, task.name)
    return query(fill(task.input, fields, task.name), task)


def most_frequent(counts: np.ndarray, overall: np.ndarray) -> int:
    """Index of the greatest of the counts (L,); of equals the one that is more frequent overall, then the first."""
    return int(np.lexsort((-np.arange(len(counts)), overall, counts))[-1])


def times_user(probabilities: np.ndarray, counts: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """The classifier's probabilities times the user's frequencies (see above), normalised.

    Args:
        probabilities: (L,) of one text.
        counts: (L,) of the user's visible items.
        shares: (L,) of the labels among the texts of the training; a label with share 0 keeps probability 0.

    Returns:
        (L,) float64.
    """
    own = (counts + USER_WEIGHT * shares) / (counts.sum() + USER_WEIGHT)
    product = probabilities * np.divide(own, shares, out=np.zeros(len(own)), where=shares > 0)
    return product / max(product.sum(), np.finfo(float).tiny)


def most_similar(query_text: str, items: Sequence[Mapping[str, str]], task: TaskSpec) -> str:
    """The answer of the item whose text, as BM25 reads it (`retrieval.words`), is most similar to the query; "" without
    any item.

    Args:
        items: fields of the items that the request may see, oldest first; of equally similar ones the newest counts.
            An item without an answer or without a field of the text is passed over.
    """
    texts, answers = [], []
    for fields in items:
        own = answer(fields, task)
        try:
            text = words(fields, task)
        except ValueError:
            continue
        if own is not None:
            texts.append(text)
            answers.append(own)
    return answers[WordIndex(texts).rank(query_text)[0]] if answers else ""


class Classifier:
    """Logistic regression, one label against the rest, over TF-IDF of words and pairs of words.

    Words are hashed: memory is bounded by MAX_FEATURES and MAX_WEIGHTS, whatever the texts are.
    """

    def __init__(self, texts: Sequence[str], labels: Sequence[int], n_labels: int) -> None:
        """Trains; the same texts in the same order give the same classifier.

        Raises:
            ValueError: fewer than two labels occur.
        """
        counts = np.bincount(labels, minlength=n_labels)
        if np.count_nonzero(counts) < 2:
            raise ValueError("a classifier needs texts of at least two labels")
        self.shares = counts / counts.sum()
        """(L,) share of each label among the texts."""
        features = min(MAX_FEATURES, MAX_WEIGHTS // n_labels)
        self._hashing = HashingVectorizer(
            ngram_range=(1, 2), n_features=features, alternate_sign=False, norm=None, dtype=np.float32
        )
        self._tfidf = TfidfTransformer(sublinear_tf=True)
        model = SGDClassifier(
            loss="log_loss", alpha=1 / (INVERSE_PENALTY * len(texts)), max_iter=EPOCHS, tol=None, average=True,
            random_state=0,
        )  # fmt: skip
        model.fit(self._tfidf.fit_transform(self._words(texts)), np.asarray(labels))
        # The weights alone travel to the workers: the fitted model holds them four times.
        self._classes, self._weights, self._bias = model.classes_, model.coef_.astype(np.float32), model.intercept_

    def _words(self, texts: Sequence[str]) -> Any:
        return self._hashing.transform([text[:MAX_CHARS] for text in texts])

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """(N, L) float64; 0 for a label that no training text has."""
        found = np.zeros((len(texts), len(self.shares)))
        if not texts:
            return found
        scores = self._tfidf.transform(self._words(texts)) @ self._weights.T + self._bias  # (N, C) or, of two, (N, 1)
        each = 1 / (1 + np.exp(-scores.astype(np.float64)))
        if len(self._classes) == 2:
            each = np.hstack([1 - each, each])
        found[:, self._classes] = each / np.maximum(each.sum(axis=1, keepdims=True), np.finfo(float).tiny)
        return found
