"""References that need no LLM, computed from the histories: fitted once on the driver, then predicted per bucket.

Route: fit: buckets -> items that all of their user's requests may see -> counts and a drawn sample -> a classifier.
       predict: a bucket's requests + the items that each may see -> one text per reference and request.
Point-in-time on both sides for requests with a cut-off: none of their answers is learned, and a later item changes no
prediction. A request without one sees all items of the histories that are read, as in `generate`; where the replies
have read an earlier version of them, `scoring.read_before` warns.

The fit reads as many buckets as hold MAX_TRAINING_ITEMS items and no more. Users lie in buckets by a hash: these are a
random sample of the users, and the cost does not grow with the population.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.compute as pc
import ray

from infra.shards import user_key
from infra.snapshot import Snapshot
from pipelines.cut import is_one_of_several
from pipelines.histories import Histories, decode_fields, read_bucket
from pipelines.owners import Owners, Persons
from pplug import references
from pplug.references import Classifier
from pplug.tasks import TaskSpec, query

NEEDS = ("user_id", "as_of", "as_of_position", "input")
"""Columns of a request that `References.predict` reads; `input` is not read for ratings."""
MAX_TRAINING_ITEMS = 50_000
"""Items that the classifier is trained on: at most 200 MB of text on the driver. 29,000 take a core 12 seconds."""
SHARES = 16
"""Tasks that the buckets of the fit are shared out to."""
_ALL = 2**31


@dataclass
class Learned:
    """Counts and examples from the items of some buckets; parts add up."""

    counts: np.ndarray
    """Items by label (L,); for ratings (2,) the number of items and the sum of their ratings."""
    drawn: list[tuple[int, str, int, str]] = field(default_factory=list)
    """The sample as rows of draw, text, label and user_key."""

    def __add__(self, other: "Learned") -> "Learned":
        return Learned(self.counts + other.counts, self.drawn + other.drawn)


@dataclass(frozen=True)
class References:
    """The references, fitted on all users; pickles, and reads one bucket at a time."""

    task: TaskSpec
    histories: Snapshot
    names: tuple[str, ...]
    """Names of the references that this task has; empty where its items have no answer of their own."""
    about: dict[str, str]
    """Plain sentences, one per reference."""
    overall: np.ndarray
    """Counts like `Learned.counts`, from all users."""
    classifier: Classifier | None = None
    n_training: int = 0
    """Items that the classifier was trained on."""

    def predict(self, bucket: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
        """Predicts one text per reference and request of a bucket, in the order of the requests.

        Args:
            rows: requests with the columns NEEDS.
        """
        texts: dict[str, list[str]] = {name: [] for name in self.names}
        if not rows or not self.names:
            return texts
        keys = sorted({user_key(row["user_id"]) for row in rows})
        users = read_bucket(self.histories, None, bucket, with_fields=True, user_keys=keys)
        items: dict[str, list[Mapping[str, str]]] = {}
        answers: dict[str, list[str | None]] = {}
        if self.task.metric == "classification" and self.classifier is not None:
            by_text = self.classifier.probabilities([query(row["input"], self.task) for row in rows])
        for at, row in enumerate(rows):
            user = row["user_id"]
            if user not in items:
                items[user] = _fields_of(users, user)
                answers[user] = [references.answer(fields, self.task) for fields in items[user]]
            count = _visible(users, row)
            seen = [own for own in answers[user][:count] if own is not None]
            if self.task.metric == "classification":
                predicted = self._labels(seen, None if self.classifier is None else by_text[at])
            elif self.task.metric == "rating":
                predicted = self._ratings(seen)
            else:
                question = query(row["input"], self.task)
                predicted = {"similar-item": references.most_similar(question, items[user][:count], self.task)}
            for name in self.names:
                texts[name].append(predicted[name])
        return texts

    def _labels(self, seen: list[str], probabilities: np.ndarray | None) -> dict[str, str]:
        labels = self.task.labels
        counts = np.array([seen.count(label) for label in labels], dtype=np.float64)
        chosen = {
            "user-label": references.most_frequent(counts, self.overall),
            "overall-label": references.most_frequent(self.overall, self.overall),
        }
        if self.classifier is not None and probabilities is not None:
            both = references.times_user(probabilities, counts, self.classifier.shares)
            chosen |= {"classifier": int(probabilities.argmax()), "classifier+user": int(both.argmax())}
        return {name: labels[index] for name, index in chosen.items()}

    def _ratings(self, seen: list[str]) -> dict[str, str]:
        n, total = self.overall
        scale = [float(label) for label in self.task.labels]
        overall = total / n if n else (min(scale) + max(scale)) / 2
        own = float(np.mean([float(value) for value in seen])) if seen else overall
        return {"user-mean": f"{own:.6g}", "overall-mean": f"{overall:.6g}"}


def fit(
    task: TaskSpec,
    histories: Snapshot,
    requests: Snapshot,
    users: Mapping[int, Sequence[str]] | None = None,
    others: Sequence[tuple[Snapshot, Snapshot | None]] = (),
) -> References:
    """Learns what all users have in common, in Ray tasks.

    Args:
        users: the users to predict for, by bucket. The fit learns from all users nevertheless: its cost is bounded.
        others: histories and requests (None where there are no requests) of other populations, such as the training
            users, from whose items the classifier may learn too. Users of theirs that have a request in `requests` are
            left out.
    """
    about = dict(references.ABOUT.get(task.metric, {})) if task.target is not None else {}
    overall = np.zeros(2 if task.metric == "rating" else len(task.labels))
    if not about or not task.labelled:
        return References(task, histories, tuple(about), about, overall)
    limit = MAX_TRAINING_ITEMS // (1 + len(others))
    learned = _learn_all(task, histories, requests, limit)
    elsewhere = [row for own, asked in others for row in _learn_all(task, own, asked, limit).drawn]
    drawn = sorted(learned.drawn + _without_asking(elsewhere, requests))
    classifier = None
    if len({label for _, _, label, _ in drawn}) > 1:
        classifier = Classifier([row[1] for row in drawn], [row[2] for row in drawn], len(task.labels))
    elif task.metric == "classification":  # nothing to learn from
        about = {name: text for name, text in about.items() if not name.startswith("classifier")}
    if not learned.counts.any():  # no item is visible to all requests of its user: nothing is known of everybody
        about = {name: text for name, text in about.items() if not name.startswith("overall")}
    n_training = 0 if classifier is None else len(drawn)
    return References(task, histories, tuple(about), about, learned.counts, classifier, n_training)


def _learn_all(task: TaskSpec, histories: Snapshot, requests: Snapshot | None, limit: int) -> Learned:
    buckets, rows = [], 0
    for bucket, files in histories.by_bucket().items():
        if rows < limit:
            buckets.append(bucket)
            rows += sum(file.rows for file in files)
    chance = min(1.0, limit / max(1, rows))
    of_several = ray.put(Persons() if requests is None else Owners(requests).of_several())
    remote = ray.remote(learn)
    parts = [
        remote.remote(buckets[start::SHARES], task, histories, requests, chance, of_several)
        for start in range(min(SHARES, len(buckets)))
    ]
    nothing = Learned(np.zeros(2 if task.metric == "rating" else len(task.labels)))
    return sum((ray.get(part) for part in parts), nothing)


def learn(
    buckets: Sequence[int],
    task: TaskSpec,
    histories: Snapshot,
    requests: Snapshot | None,
    chance: float,
    of_several: Persons,
) -> Learned:
    """Learns from the items of some buckets that are visible to all requests of their user.

    A user whose requests belong to a person with several histories is left out, and so is a user with the person's own
    id: another of the person's histories may hold the answer to a request here.

    Args:
        chance: probability that an item is drawn for the classifier; the same item is drawn in every run.
        of_several: persons with a history under another id than their own (`Owners.of_several`).
    """
    rated = task.metric == "rating"
    learned = Learned(np.zeros(2 if rated else len(task.labels)))
    index = {label: at for at, label in enumerate(task.labels)}
    for bucket in buckets:
        users = read_bucket(histories, None, bucket, with_fields=True)
        counts, several = _visible_to_all(users, requests, bucket), of_several.among(users.user_ids)
        for name, key in zip(users.user_ids, users.user_keys, strict=True):
            if name in several:
                continue
            for fields in _fields_of(users, name)[: counts.get(name, _ALL)]:
                own = references.answer(fields, task)
                if own is None:
                    continue
                if rated:
                    learned.counts += (1, float(own))
                    continue
                learned.counts[index[own]] += 1
                try:
                    text = references.text_of(fields, task)[: references.MAX_CHARS]
                except ValueError:  # an item without a field of the template: it counts, and has no text
                    continue
                draw = _draw(key, text)
                if draw < chance * 2**64:
                    learned.drawn.append((draw, text, index[own], key))
    return learned


def _draw(key: str, text: str) -> int:
    digest = hashlib.blake2b(f"{key}\n{text}".encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


def _visible_to_all(users: Histories, requests: Snapshot | None, bucket: int) -> dict[str, int]:
    """Number of the oldest items that all requests of a user may see, by user with a request."""
    counts: dict[str, int] = {}
    if requests is None:
        return counts
    columns = ["user_id", "owner_id", "as_of", "as_of_position"]
    for row in requests.read(columns, buckets=[bucket]).to_pylist():
        count = 0 if is_one_of_several(row) else _visible(users, row)
        counts[row["user_id"]] = min(counts.get(row["user_id"], _ALL), count)
    return counts


def _visible(users: Histories, request: Mapping[str, Any]) -> int:
    user = users.user(request["user_id"])
    if user is None:
        return 0
    return len(users.visible_to(request, user, _ALL))


def _fields_of(users: Histories, user_id: str) -> list[Mapping[str, str]]:
    """Returns the fields of a user's items, oldest first."""
    user = users.user(user_id)
    if user is None:
        return []
    assert users.fields is not None, "the bucket is read with fields"
    start, end = int(users.starts[user]), int(users.starts[user + 1])
    return [decode_fields(value) for value in users.fields.slice(start, end - start).to_pylist()]


def _without_asking(drawn: list[tuple[int, str, int, str]], requests: Snapshot) -> list[tuple[int, str, int, str]]:
    """Leaves out users that have a request here, under their own id or as the person behind several histories."""
    if not drawn:
        return drawn
    known, buckets = frozenset(row[3] for row in drawn), requests.filled()
    remote = ray.remote(_asking)
    parts = [remote.remote(buckets[start::SHARES], requests, known) for start in range(min(SHARES, len(buckets)))]
    asking = frozenset().union(*ray.get(parts))
    return [row for row in drawn if row[3] not in asking]


def _asking(buckets: Sequence[int], requests: Snapshot, known: frozenset[str]) -> frozenset[str]:
    asking: set[str] = set()
    for bucket in buckets:
        rows = requests.read(["user_key", "owner_id"], buckets=[bucket])
        asking |= known.intersection(rows["user_key"].to_pylist())
        asking |= known.intersection(user_key(owner) for owner in pc.unique(rows["owner_id"]).to_pylist() if owner)
    return frozenset(asking)
