"""The items of a bucket's users that each request may see, and another person's items for a control.

Shapes: D encoder width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from infra.snapshot import Snapshot
from pipelines.histories import Histories, read_bucket
from pplug.controls import drawn_for


class VisibleItems:
    """A bucket's items as its requests may see them, by the one rule in `pplug/history.py`."""

    def __init__(
        self,
        histories: Snapshot,
        embeddings: Snapshot | None,
        bucket: int,
        requests: pa.Table,
        keys: Sequence[str],
        max_items: int,
        *,
        others: bool,
        with_fields: bool,
    ) -> None:
        """`keys`: of the requests' users; `others`: another user's items will be asked for, so that all are read."""
        theirs = None if others else keys
        self.own = read_bucket(histories, embeddings, bucket, with_fields=with_fields, user_keys=theirs)
        self.max_items = max_items
        self._source, self._bucket = (histories, embeddings), bucket
        self._others: Histories | None = None
        self._owner = dict(zip(requests["user_id"].to_pylist(), requests["owner_id"].to_pylist(), strict=True))

    def rows(self, request: Mapping[str, Any]) -> np.ndarray:
        """Rows of `own` of the items the request may see, oldest first."""
        user = self.own.user(request["user_id"])
        if user is None:
            return np.zeros(0, np.int64)
        return self.own.visible_to(request, user, self.max_items)

    def hashes(self, request: Mapping[str, Any]) -> list[str]:
        """Text hashes of the items the request may see, oldest first."""
        return self.own.text_hash.take(pa.array(self.rows(request))).to_pylist()

    def vectors(self, request: Mapping[str, Any]) -> np.ndarray:
        """(n, D) vectors of the items the request may see."""
        return self.own.vectors[self.own.with_vector(self.rows(request))]

    def lacks_vectors(self, request: Mapping[str, Any]) -> bool:
        """Returns whether an item that the request may see has no vector yet."""
        rows = self.rows(request)
        return len(self.own.with_vector(rows)) < len(rows)

    def of_another(self, request: Mapping[str, Any]) -> np.ndarray:
        """(n, D) vectors of another person's items: drawn by the user's hash, so that every run draws alike."""
        owner = request["owner_id"]
        pool = self.own
        choice = self._other_people(pool, request["user_id"], owner)
        if not choice:  # alone in the bucket: the next bucket that has anybody
            pool = self._next_bucket()
            choice = self._other_people(pool, request["user_id"], owner)
        if not choice:
            return pool.vectors[:0]
        user = drawn_for(owner, choice)
        return pool.vectors[pool.with_vector(pool.visible(user, None, None, self.max_items))]

    def _other_people(self, pool: Histories, user_id: str, owner: str) -> list[int]:
        return [
            row
            for row, user in enumerate(pool.user_ids)
            if user != user_id and self._owner.get(user, user) != owner and pool.starts[row + 1] > pool.starts[row]
        ]

    def _next_bucket(self) -> Histories:
        if self._others is None:
            histories, embeddings = self._source
            filled = sorted(histories.by_bucket())
            later = [bucket for bucket in filled if bucket > self._bucket] + filled
            self._others = read_bucket(histories, embeddings, later[0])
        return self._others
