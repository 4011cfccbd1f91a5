"""What the requests of a bucket may see of their users: items, vectors, stored personas, and another person for a
control.

Shapes: D encoder width, P persona tokens, H LLM width.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.snapshot import Snapshot
from pipelines.histories import Histories, matrix, read_bucket, to_us
from pplug import history
from pplug.retrieval import WordIndex


@dataclass
class Found:
    """What retrieval has found in a bucket so far."""

    picks: dict[tuple[str, str, str], list[Mapping[str, str]]] = field(default_factory=dict)
    """By kind, user and request: fields of the items, best first. Two users may call their requests alike."""
    words: tuple[tuple[int, int], WordIndex] | None = None
    """The last user's index, and the first and last item in it: requests come user by user."""


class Users:
    """What a bucket's requests need of their users: visible items, another user's items, stored personas."""

    def __init__(
        self,
        histories: Snapshot,
        embeddings: Snapshot | None,
        personas: Snapshot | None,
        bucket: int,
        requests: pa.Table,
        keys: Sequence[str],
        cap: int,
        *,
        others: bool,
        with_fields: bool,
    ) -> None:
        """`keys`: of the requests' users; `others`: another user's items will be asked for, so that all are read."""
        theirs = None if others else keys
        self.own = read_bucket(histories, embeddings, bucket, with_fields=with_fields, user_keys=theirs)
        self.cap = cap
        self.found = Found()
        self._source, self._bucket = (histories, embeddings), bucket
        self._others: Histories | None = None
        self._owner = dict(zip(requests["user_id"].to_pylist(), requests["owner_id"].to_pylist(), strict=True))
        self._stored: dict[str, np.ndarray] = {}
        self._made_from: dict[str, str] = {}
        if personas is not None:
            made = pc.field("persona").is_valid()
            columns = ["user_id", "persona", "history_hash"]
            found = personas.read(columns, buckets=[bucket], filter=made, user_keys=keys)
            ids = found["user_id"].to_pylist()
            self._stored = dict(zip(ids, matrix(found["persona"]), strict=True))
            self._made_from = dict(zip(ids, found["history_hash"].to_pylist(), strict=True))
        self._current: dict[str, bool] = {}

    def stored(self, request: Mapping[str, Any]) -> np.ndarray | None:
        """The persona that refresh stored, (P*H,), where it was made from just the items that this request may see."""
        if not self._undated(request):
            return None
        user_id = request["user_id"]
        if user_id in self._stored and user_id not in self._current:
            rows = self.rows(request)
            digest = history.history_hash(self.own.text_hash.take(pa.array(rows)).to_pylist())
            self._current[user_id] = digest == self._made_from[user_id]
        return self._stored[user_id] if self._current.get(user_id) else None

    def notes(self, request: Mapping[str, Any], stored: bool) -> list[str]:
        """What the report has to count about a persona (NOTES). `stored`: one that `refresh` stored would have done."""
        ready = self.stored(request) if stored else None
        if ready is not None:
            return []
        rows = self.rows(request)
        found = ["items_without_vector"] if len(self.own.with_vector(rows)) < len(rows) else []
        if stored and self._current.get(request["user_id"]) is False and self._undated(request):
            found.append("persona_made_anew")
        return found

    def _undated(self, request: Mapping[str, Any]) -> bool:
        return request["as_of"] is None and request["as_of_position"] is None

    def rows(self, request: Mapping[str, Any]) -> np.ndarray:
        """Rows of `own` of the items the request may see, oldest first."""
        user = self.own.user(request["user_id"])
        if user is None:
            return np.zeros(0, np.int64)
        return self.own.visible(user, to_us(request["as_of"]), request["as_of_position"], self.cap)

    def items(self, request: Mapping[str, Any]) -> np.ndarray:
        """(n, D) vectors of the items the request may see."""
        return self.own.vectors[self.own.with_vector(self.rows(request))]

    def others_items(self, request: Mapping[str, Any]) -> np.ndarray:
        """(n, D) vectors of another person's items: drawn by the user's hash, so that every run draws alike."""
        owner = request["owner_id"]
        pool = self.own
        choice = self._strangers(pool, request["user_id"], owner)
        if not choice:  # alone in the bucket: the next bucket that has anybody
            pool = self._next_bucket()
            choice = self._strangers(pool, request["user_id"], owner)
        if not choice:
            return pool.vectors[:0]
        digest = hashlib.blake2b(f"other:{owner}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
        user = choice[int.from_bytes(digest, "big") % len(choice)]
        return pool.vectors[pool.with_vector(pool.visible(user, None, None, self.cap))]

    def _strangers(self, pool: Histories, user_id: str, owner: str) -> list[int]:
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
