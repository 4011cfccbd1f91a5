"""Part of the jobs that keep one row per user: which users of a bucket need a new one, made from which of their items.

Route: histories, requests and the existing rows -> users whose row is pending, each with the items that count -> rows
made anew, rejects, and the bucket's other rows beside them, since a bucket is replaced as a whole.

Where the table of requests is given, a user's items are cut at the earliest of the user's chosen requests: an item
that one of them may not see is used by none.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from infra.shards import bucket_of, user_key
from infra.snapshot import Snapshot
from pipelines.asked import Chosen
from pipelines.histories import Histories, read_bucket, to_us
from pipelines.learned import LastItem, last_item
from pipelines.waves import DETAIL, REASON
from pplug import history
from pplug.schemas import LAST_ITEM

BLOCK_USERS = 64


@dataclass(frozen=True)
class PendingBucket:
    """The users of one bucket whose row is pending, and those whose row stays."""

    own: Histories
    users: dict[int, tuple[range, str]]
    """Users whose row is pending: rows of the items that count, and their hash."""
    missing: list[str]
    """Users asked for who have no item at all."""
    existing: int
    """Users whose row exists and still holds."""
    unchanged: list[str]
    """user_key of the bucket's rows that are not made anew."""
    gone: int = 0
    """Rows that go, without a reject in their place: their users have no item any more."""

    @property
    def pending(self) -> int:
        return len(self.users) + len(self.missing)


@dataclass(frozen=True)
class PendingUsers:
    """Users who still need a row, for the plan and for the work."""

    histories: Snapshot
    requests: Snapshot | None
    """Table of the requests at whose earliest each user's items are cut; None cuts none."""
    before: Snapshot | None
    """The table before this run's work began."""
    made_as: str
    """Identity of the settings; the id of a row is it, or begins with it and a hyphen."""
    max_items: int
    """Newest items that count."""
    users: frozenset[str] | None
    """Users to look at; None: all users."""
    buckets: int
    """Number of buckets of the tables."""
    id_column: str = "adapter_id"
    only_asking: bool = False
    """True looks only at users who have a chosen request."""
    chosen: Chosen = Chosen()
    """Requests that count."""
    rejects_strangers: bool = True
    """True gives a reject for each user who is looked at and has no item."""
    items_before: int = 0
    """Number of items before those that count that decide a row too, since retrieval looks among them."""
    newest: Snapshot | None = None
    """Histories as they are once `before` is read, where they are later ones: a row that another run has made of them
    stays."""
    without: frozenset[str] = frozenset()
    """Columns that unchanged rows come without: a later stage reads them."""

    def read(self, bucket: int) -> PendingBucket:
        wanted: set[str] | None = None
        keys: list[str] | None = None
        if self.users is not None:
            wanted = {name for name in self.users if bucket_of(name, self.buckets) == bucket}
            keys = sorted(map(user_key, wanted))
        asked = self._asked(bucket, keys)
        if self.only_asking:
            wanted = {request["user_id"] for request in asked}
            keys = sorted({request["user_key"] for request in asked})
        own = read_bucket(self.histories, None, bucket, with_fields=True, user_keys=keys)
        cuts = _cuts(own, asked)
        names = ["user_id", "user_key", self.id_column, "history_hash", *LAST_ITEM]
        held = [] if self.before is None else self.before.read(names, buckets=[bucket]).to_pylist()
        unchanged = {row["user_id"]: row for row in held}
        pending, existing = {}, 0
        for user, name in enumerate(own.user_ids):
            start = int(own.starts[user])
            count = cuts.get(user, int(own.starts[user + 1]) - start)
            kept = history.newest(count, self.max_items)
            rows = range(start + kept.start, start + kept.stop)
            read = max(start, rows.start - self.items_before)
            digest = history.history_hash(own.text_hash[read : rows.stop].to_pylist())
            old = unchanged.get(name)
            # The newest item too: where it stands decides which requests the row may answer.
            if (
                old is not None
                and old["history_hash"] == digest
                and last_item(old) == newest_of(own, user, rows)
                and old[self.id_column].partition("-")[0] == self.made_as
            ):
                existing += 1
                continue
            pending[user] = (rows, digest)
            unchanged.pop(name, None)
        missing = (wanted or set()) - set(own.user_ids) if self.rejects_strangers else set()
        gone = unchanged.keys() - set(own.user_ids)
        gone = {name for name in gone if wanted is None or name in wanted}
        gone -= {name for name in gone if unchanged[name]["history_hash"] is None}  # imported: made of no item here
        gone -= self._with_items_now(bucket, gone)
        keys_of_unchanged = sorted(row["user_key"] for name, row in unchanged.items() if name not in gone)
        return PendingBucket(own, pending, sorted(missing), existing, keys_of_unchanged, len(gone - missing))

    def _with_items_now(self, bucket: int, names: set[str]) -> set[str]:
        if self.newest is None or not names or self.newest.version == self.histories.version:
            return set()
        parts = self.newest.of_users(["user_id"], bucket, sorted(map(user_key, names)))
        return {name for part in parts for name in part["user_id"].to_pylist()}

    def _asked(self, bucket: int, keys: list[str] | None) -> list[dict[str, Any]]:
        if self.requests is None:
            return []
        columns = ["user_id", "user_key", "as_of", "as_of_position"]
        return self.chosen.among(self.requests, bucket, keys, columns).to_pylist()

    def count(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Stage of the plan. in: bucket. out: bucket, pending, existing, unchanged (rows beside the pending), gone."""
        for bucket in batch["bucket"].to_pylist():
            plan = self.read(bucket)
            counts = {"pending": plan.pending, "existing": plan.existing, "unchanged": len(plan.unchanged)}
            yield pa.table({"bucket": [bucket]} | {name: [n] for name, n in (counts | {"gone": plan.gone}).items()})

    def blocks(
        self, bucket: int, schema: pa.Schema, make: Callable[[Histories, int, range], dict[str, Any]]
    ) -> Iterator[pa.Table]:
        """All rows of a bucket with pending users, some users at a time.

        Args:
            schema: the table's columns, reject_reason, reject_detail, and what `make` adds.
            make: (histories, user, rows of the items that count) -> columns of the user's row, or of a reject.
        """
        plan = self.read(bucket)
        own = plan.own
        for held in self._held(bucket, plan.unchanged):
            yield with_nulls(held, schema)
        nothing = {"bucket": bucket, REASON: "no_history", DETAIL: "asked for, but no item in histories"}
        rows: list[dict[str, Any]] = [{"user_key": user_key(name)} | nothing for name in plan.missing]
        for user, (items, digest) in plan.users.items():
            names = {"bucket": bucket, "user_key": own.user_keys[user], "user_id": own.user_ids[user]}
            newest = newest_of(own, user, items)
            made_from = {"last_item_at": newest.occurred_at, "last_item_position": newest.position}
            rows.append(names | {"history_hash": digest} | made_from | make(own, user, items))
            if len(rows) >= BLOCK_USERS:
                yield pa.Table.from_pylist(rows, schema=schema)
                rows = []
        if rows:
            yield pa.Table.from_pylist(rows, schema=schema)

    def _held(self, bucket: int, keys: list[str]) -> Iterator[pa.Table]:
        """The rows of these users, some at a time: a bucket's adapters together may be many gigabytes."""
        for start in range(0, len(keys), BLOCK_USERS):
            some = keys[start : start + BLOCK_USERS]
            place = pc.field("user_key")
            near = (place >= some[0]) & (place <= some[-1])  # by which row groups are skipped
            assert self.before is not None, "the unchanged rows were read from there"
            columns = [name for name in self.before.spec.schema.names if name not in self.without]
            yield self.before.read(columns, buckets=[bucket], filter=near & place.isin(some))


def newest_of(own: Histories, user: int, items: range) -> LastItem:
    """The newest of a user's items that count."""
    if not items:
        return LastItem(None, None)
    times, last = own.occurred_at[user], items.stop - 1
    return LastItem(None if times is None else int(times[last - own.starts[user]]), int(own.position[last]))


def _cuts(own: Histories, asked: list[dict[str, Any]]) -> dict[int, int]:
    """Number of a user's oldest items that come before the earliest of the user's requests."""
    cuts: dict[int, int] = {}
    for request in asked:
        user = own.user(request["user_id"])
        if user is not None:
            start, end = own.starts[user], own.starts[user + 1]
            count = history.visible_count(
                own.occurred_at[user], own.position[start:end], to_us(request["as_of"]), request["as_of_position"]
            )
            cuts[user] = min(count, cuts.get(user, count))
    return cuts


def with_nulls(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """The rows with the schema's other columns null."""
    columns = [rows[f.name] if f.name in rows.column_names else pa.nulls(len(rows), f.type) for f in schema]
    return pa.table(columns, schema=schema)
