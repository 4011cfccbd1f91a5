"""The items of a bucket's users that each request may see, and another person's items for a control."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from infra.snapshot import Snapshot
from pipelines.histories import Histories, read_bucket, to_us
from pipelines.owners import Owners, in_turn
from pplug.controls import drawn_for
from pplug.history import NO_TIME
from pplug.items import KnownAnswers, UserItems


class VisibleItems:
    """A bucket's items as its requests may see them, by the one rule in `pplug/history.py`."""

    def __init__(
        self,
        histories: Snapshot,
        embeddings: Snapshot | None,
        bucket: int,
        owners: Owners,
        keys: Sequence[str],
        max_items: int,
        *,
        others: bool,
        with_fields: bool,
        labels: KnownAnswers | None = None,
    ) -> None:
        """`keys`: of the requests' users; `others`: another user's items will be asked for, so that all are read;
        `labels`: answers that a plug adds to a persona."""
        theirs = None if others else keys
        self.texts = read_bucket(histories, None, bucket, with_fields=with_fields, user_keys=theirs)
        self._some = None if others else np.arange(len(self.texts.text_hash))
        self._labels = labels
        self.max_items = max_items
        self._source, self._bucket, self._owners = (histories, embeddings), bucket, owners
        self._far: tuple[int, Histories] | None = None
        self._persons: dict[int, dict[str, frozenset[str]]] = {}
        self._place: dict[str, int | None] = {}  # by person, the bucket that another one is drawn from

    @cached_property
    def own(self) -> Histories:
        """The same items beside their vectors and answers, which are read when the first is asked for: stored personas
        and words alone need none."""
        histories, embeddings = self._source
        own = self.texts
        if embeddings is not None:
            own = own.with_vectors(embeddings, self._bucket, self._some)
        return own if self._labels is None else own.with_labels(histories, self._bucket, self._labels, self._some)

    def rows(self, request: Mapping[str, Any]) -> np.ndarray:
        """Rows of `texts` and `own` of the items the request may see, oldest first."""
        user = self.texts.user(request["user_id"])
        if user is None:
            return np.zeros(0, np.int64)
        return self.texts.visible_to(request, user, self.max_items)

    def hashes(self, request: Mapping[str, Any]) -> list[str]:
        """Text hashes of the items the request may see, oldest first."""
        return self.texts.text_hash.take(pa.array(self.rows(request))).to_pylist()

    def times(self, request: Mapping[str, Any]) -> list[int]:
        """Times of the items the request may see, oldest first."""
        return self.texts.times[self.rows(request)].tolist()

    def items(self, request: Mapping[str, Any], by_request: bool) -> UserItems:
        """The items the request may see that have a vector, aged at the request's time.

        Args:
            by_request: False for a persona that depends on the user alone: ages then count from the newest item.
        """
        return self.own.items(self.rows(request), to_us(request["as_of"]) if by_request else None)

    def lacks_times(self, request: Mapping[str, Any]) -> bool:
        """Returns whether the user is untimed: an item has no time, so that none counts."""
        rows = self.rows(request)
        return bool(len(rows)) and bool((self.texts.times[rows] == NO_TIME).any())

    def hides_all(self, request: Mapping[str, Any]) -> bool:
        """Returns whether the request has a time and the user's items have none, so that it may see none of them."""
        if request["as_of"] is None or request["as_of_position"] is not None:
            return False
        user = self.texts.user(request["user_id"])
        if user is None:
            return False
        own = self.texts.times[int(self.texts.starts[user]) : int(self.texts.starts[user + 1])]
        return bool((own == NO_TIME).any())

    def lacks_vectors(self, request: Mapping[str, Any]) -> bool:
        """Returns whether an item that the request may see has no vector yet."""
        rows = self.rows(request)
        return len(self.own.with_vector(rows)) < len(rows)

    def of_another(self, request: Mapping[str, Any], by_request: bool) -> UserItems:
        """Another person's items, with that person's labels and times: drawn by the user's hash, so that every run
        draws alike. `by_request`: as in `items`."""
        user_id, owner = request["user_id"], request["owner_id"]
        if owner not in self._place:  # alone in the bucket: the next bucket that has anybody
            places = in_turn(self._bucket, self._source[0].by_bucket())
            self._place[owner] = next((place for place in places if self._others(place, user_id, owner)), None)
        place = self._place[owner]
        choice = [] if place is None else self._others(place, user_id, owner)
        if place is None or not choice:
            return self.own.items(np.zeros(0, np.int64))
        pool = self._pool(place)
        rows = pool.visible(drawn_for(owner, choice), None, None, self.max_items)
        return pool.items(rows, to_us(request["as_of"]) if by_request else None)

    def _others(self, bucket: int, user_id: str, owner: str) -> list[int]:
        """Places of a bucket's users with items who are somebody else."""
        if bucket not in self._persons:
            self._persons[bucket] = self._owners.of(bucket)
        pool, persons = self._pool(bucket), self._persons[bucket]
        return [
            row
            for row, user in enumerate(pool.user_ids)
            if user != user_id and owner not in persons.get(user, {user}) and pool.starts[row + 1] > pool.starts[row]
        ]

    def _pool(self, bucket: int) -> Histories:
        """The items of a bucket; of other buckets the last one that was asked for stays in memory."""
        if bucket == self._bucket:
            return self.own
        if self._far is None or self._far[0] != bucket:
            self._far = None  # two of them at once would take twice the memory
            pool = read_bucket(*self._source, bucket)
            if self._labels is not None:
                pool = pool.with_labels(self._source[0], bucket, self._labels)
            self._far = bucket, pool
        return self._far[1]
