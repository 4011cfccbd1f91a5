"""The person behind each user: one with a history per question has several users, which may lie in many buckets."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow.compute as pc

from infra.shards import user_key
from infra.snapshot import Snapshot

_SPLIT = pc.field("user_id") != pc.field("owner_id")
"""Requests of a user whose person has another id; those that name no person are none of them."""


def _numbers(ids: Iterable[str]) -> np.ndarray:
    """(n,) uint64: the first half of each user_key."""
    return np.array([int(user_key(one)[:16], 16) for one in ids], np.uint64)


@dataclass(frozen=True)
class Persons:
    """A set of persons that holds eight bytes of each, so that one of millions goes to every task."""

    numbers: np.ndarray = field(default_factory=lambda: _numbers(()))
    """Sorted, see `_numbers`."""

    def among(self, ids: Iterable[str]) -> set[str]:
        """Returns those of some ids that are in the set."""
        distinct = sorted(set(ids))
        if not len(self.numbers):
            return set()
        numbers = _numbers(distinct)
        at = np.minimum(np.searchsorted(self.numbers, numbers), len(self.numbers) - 1)  # the set is large, the ids few
        return {one for one, is_in in zip(distinct, self.numbers[at] == numbers, strict=True) if is_in}


NOBODY = Persons()


@dataclass(frozen=True)
class Owners:
    """The table `requests`, asked who is who. It is read whole, whatever requests a run was asked for."""

    requests: Snapshot

    def of(self, bucket: int) -> dict[str, frozenset[str]]:
        """Persons by user_id, of a bucket's users who are not a person of their own alone: themselves, and whoever
        their requests name."""
        rows = self.requests.read(["user_id", "owner_id"], buckets=[bucket], filter=_SPLIT)
        found: dict[str, set[str]] = {}
        for user, owner in zip(rows["user_id"].to_pylist(), rows["owner_id"].to_pylist(), strict=True):
            found.setdefault(user, {user}).add(owner)
        return {user: frozenset(persons) for user, persons in found.items()}

    def of_several(self) -> Persons:
        """The persons who have a history under another id than their own, whatever the bucket that it lies in.

        A person's own id may be that of a user too: `alice` has a history, and `alice-work` of owner `alice` another.
        """

        def read(bucket: int) -> np.ndarray:
            rows = self.requests.read(["user_id", "owner_id"], buckets=[bucket], filter=_SPLIT)
            return _numbers(pc.unique(rows["owner_id"]).to_pylist())

        with ThreadPoolExecutor(8) as pool:
            return Persons(np.unique(np.concatenate([_numbers(()), *pool.map(read, self.requests.filled())])))

    def with_all_histories(self, ids: Iterable[str]) -> frozenset[str]:
        """Returns these users or persons, with the persons of each user and every history of each person."""
        rows = self.requests.read(["user_id", "owner_id"], filter=_SPLIT)
        pairs = set(zip(rows["user_id"].to_pylist(), rows["owner_id"].to_pylist(), strict=True))
        found: set[str] = set(ids)
        while more := {one for pair in pairs if not found.isdisjoint(pair) for one in pair} - found:
            found |= more
        return frozenset(found)


def in_turn(bucket: int, filled: Iterable[int]) -> list[int]:
    """The bucket, then those with rows that come after it and those before it: where another person is looked for."""
    others = sorted(set(filled) - {bucket})
    return [bucket, *(b for b in others if b > bucket), *(b for b in others if b < bucket)]
