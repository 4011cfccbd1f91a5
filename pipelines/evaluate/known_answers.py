"""Requests whose answer stands among what other populations can teach: a model that learned there may have it by heart.

Route: a population's requests -> digests of their answers -> buckets of other populations' items (`adapt --stage base`
learns those) and of their requests (`train` learns the answers of those) -> those found there.
Labels and ratings are shared by everybody; only answers in free text are looked for, whatever their letter case and
white space.
"""

from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b

import numpy as np
import pyarrow.compute as pc
import ray

from infra.shards import of_bucket
from infra.snapshot import Snapshot
from pipelines.evaluate.references import SHARES
from pipelines.histories import decode_fields
from pplug import references
from pplug.tasks import TaskSpec


def warnings(
    task: TaskSpec,
    requests: Snapshot,
    users: Mapping[int, list[str]] | None,
    others: Mapping[str, tuple[Snapshot, Snapshot | None]],
) -> list[str]:
    """Returns a warning per other population that holds answers of these requests.

    Args:
        users: keys by bucket; where given, only their requests count.
        others: histories and requests (None where there are no requests) by the place of their tables.
    """
    if task.labels or not others:
        return []
    asked = _joined(_asked, requests.filled(users), requests, users)
    known = ray.put(np.unique(asked))
    found = []
    for place, (histories, elsewhere) in others.items():
        there = [np.zeros(0, np.uint64)]
        if task.target is not None:
            there.append(_joined(_in_items, sorted(histories.by_bucket()), histories, task, known))
        if elsewhere is not None:
            there.append(_joined(_in_requests, elsewhere.filled(), elsewhere, known))
        n = int(np.isin(asked, np.concatenate(there)).sum())
        if n:
            found.append(
                f"{n} of {len(asked)} requests with a target have an answer that stands word for word in a history, or "
                f"as the answer to a request, of {place}: what was trained there may have seen it. Their share of each "
                "score is not known"
            )
    return found


def _joined(part: Callable[..., np.ndarray], buckets: Sequence[int], *given: object) -> np.ndarray:
    """Digests of the buckets' answers, from a few tasks."""
    remote = ray.remote(part)
    parts = [remote.remote(buckets[start::SHARES], *given) for start in range(min(SHARES, len(buckets)))]
    return np.concatenate([np.zeros(0, np.uint64), *ray.get(parts)])


def _asked(buckets: Sequence[int], requests: Snapshot, users: Mapping[int, list[str]] | None) -> np.ndarray:
    """Digests of the answers of these buckets' requests, one per request."""
    digests = []
    for bucket in buckets:
        answered = pc.field("target").is_valid()
        rows = requests.read(["target"], buckets=[bucket], filter=answered, user_keys=of_bucket(users, bucket))
        digests += [_digest(answer) for answer in rows["target"].to_pylist()]
    return np.array(digests, np.uint64)


def _in_items(buckets: Sequence[int], histories: Snapshot, task: TaskSpec, known: np.ndarray) -> np.ndarray:
    """Returns those of some digests whose answer an item of these buckets has."""
    found = [np.zeros(0, np.uint64)]
    for bucket in buckets:
        items = histories.read(["fields"], buckets=[bucket])["fields"].to_pylist()
        answers = (references.answer(decode_fields(value), task) for value in items)
        digests = np.array([_digest(answer) for answer in answers if answer is not None], np.uint64)
        found.append(np.intersect1d(digests, known))
    return np.unique(np.concatenate(found))


def _in_requests(buckets: Sequence[int], requests: Snapshot, known: np.ndarray) -> np.ndarray:
    """Returns those of some digests whose answer a request of these buckets has."""
    return np.intersect1d(_asked(buckets, requests, None), known)


def _digest(answer: str) -> int:
    words = " ".join(answer.casefold().split())
    return int.from_bytes(blake2b(words.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
