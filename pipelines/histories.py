"""One bucket's histories, ordered, each item beside its vector: what personas and prompts are made from.

Reads only the bucket's own files and, of the vectors, only the row groups of the users asked for and the rows that
their items point to: a user with a million items costs no more than the newest of them that count.
Shapes: U users, T items of all users (ragged), V vectors, D encoder width.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.rows import rows_at
from infra.snapshot import Snapshot
from pplug import history
from pplug.items import NO_LABEL, KnownAnswers, UserItems


@dataclass(frozen=True)
class Histories:
    """Users of a bucket and their items, oldest first.

    `starts` (U+1) cuts the item arrays into users; `vector_row` (T) points into `vectors` (V, D), -1 where an item
    has no vector (histories newer than embeddings).
    """

    user_ids: list[str]
    user_keys: list[str]
    starts: np.ndarray
    text_hash: pa.Array
    occurred_at: list[np.ndarray | None]
    last_item_at: pa.Array
    position: np.ndarray
    fields: pa.Array | None
    vector_row: np.ndarray
    vectors: np.ndarray
    label_row: np.ndarray | None = None
    """A plug's reading of each item's answer, (T,) or (T, P): `pplug.items.KnownAnswers`; None where answers were not
    read (`with_labels`)."""

    def user(self, user_id: str) -> int | None:
        """Row of a user; None when the user has no item."""
        return self._index.get(user_id)

    @property
    def _index(self) -> dict[str, int]:
        cached = self.__dict__.get("_index_cache")
        if cached is None:
            cached = {user: row for row, user in enumerate(self.user_ids)}
            object.__setattr__(self, "_index_cache", cached)
        return cached

    def visible_to(self, request: Mapping[str, Any], user: int, cap: int) -> np.ndarray:
        """Rows (into T) of a user's newest `cap` items that a request (as_of, as_of_position) may see, oldest first."""
        return self.visible(user, to_us(request["as_of"]), request["as_of_position"], cap)

    def visible(self, user: int, as_of: int | None, as_of_position: int | None, cap: int) -> np.ndarray:
        """Rows (into T) of the newest `cap` items that a request may see, oldest first."""
        start, end = self.starts[user], self.starts[user + 1]
        count = history.visible_count(self.occurred_at[user], self.position[start:end], as_of, as_of_position)
        kept = history.newest(count, cap)
        return np.arange(start + kept.start, start + kept.stop)

    def with_vectors(self, embeddings: Snapshot, bucket: int, rows: np.ndarray | None = None) -> "Histories":
        """The same users, the items in `rows` (all when None) beside their vectors."""
        wanted = np.arange(len(self.text_hash)) if rows is None else rows
        owner = np.searchsorted(self.starts, wanted, side="right") - 1
        keys = pa.array(self.user_keys, pa.string())
        pairs = pair_keys(
            pa.table({"user_key": keys.take(pa.array(owner)), "text_hash": self.text_hash.take(pa.array(wanted))})
        )
        users = None if rows is None else np.unique(np.asarray(self.user_keys)[owner]).tolist()
        found, vectors = vectors_of(embeddings, bucket, pairs, users)
        vector_row = np.full(len(self.text_hash), -1, np.int64)
        vector_row[wanted] = found
        return dataclasses.replace(self, vector_row=vector_row, vectors=vectors)

    def with_labels(
        self, histories: Snapshot, bucket: int, known: KnownAnswers, rows: np.ndarray | None = None
    ) -> Self:
        """The same users, the items in `rows` (all when None) beside their labels or answers.

        The texts around an answer are read some row groups at a time, and kept no longer.
        """
        wanted = np.arange(len(self.text_hash)) if rows is None else rows
        distinct = self.text_hash.take(pa.array(wanted)).dictionary_encode()
        owner = np.searchsorted(self.starts, wanted, side="right") - 1
        users = None if rows is None else np.unique(np.asarray(self.user_keys)[owner]).tolist()
        width = known.rows(histories.spec.empty(["fields"])["fields"]).shape[1:]
        label_of = np.full((len(distinct.dictionary), *width), NO_LABEL, np.int64)  # the hash covers the answer
        for table in histories.of_users(["user_key", "text_hash", "fields"], bucket, users):
            at = pc.index_in(table["text_hash"], value_set=distinct.dictionary)
            hit = np.flatnonzero(pc.is_valid(at).to_numpy(zero_copy_only=False))
            if len(hit):
                label_of[at.take(pa.array(hit)).to_numpy()] = known.rows(table["fields"].take(pa.array(hit)))
        label_row = np.full((len(self.text_hash), *width), NO_LABEL, np.int64)
        label_row[wanted] = label_of[distinct.indices.to_numpy()]
        return dataclasses.replace(self, label_row=label_row)

    @property
    def times(self) -> np.ndarray:
        """Time of each item, (T,) int64 microseconds; history.NO_TIME for all items of an untimed user."""
        cached = self.__dict__.get("_times_cache")
        if cached is None:
            cached = np.full(len(self.text_hash), history.NO_TIME, np.int64)
            for own, start, stop in zip(self.occurred_at, self.starts[:-1], self.starts[1:], strict=True):
                if own is not None:
                    cached[start:stop] = own
            object.__setattr__(self, "_times_cache", cached)
        return cached

    def items(self, rows: np.ndarray, as_of: int | None = None) -> UserItems:
        """One user's items in `rows` that have a vector, with their labels, and their ages at `as_of`.

        Args:
            as_of: microseconds; None, or a time before the newest of these items, stands for the time of that item.
        """
        rows = rows[self.vector_row[rows] >= 0]
        times = self.times[rows]
        reference = max(times[-1] if len(times) else history.NO_TIME, history.NO_TIME if as_of is None else as_of)
        return UserItems(
            self.vectors[self.vector_row[rows]],
            None if self.label_row is None else self.label_row[rows],
            history.age_days(times, reference),
        )

    def with_vector(self, rows: np.ndarray) -> np.ndarray:
        """Returns the rows whose item has a vector, as rows of `vectors`."""
        found = self.vector_row[rows]
        return found[found >= 0]


def read_bucket(
    histories: Snapshot,
    embeddings: Snapshot | None,
    bucket: int,
    *,
    with_fields: bool = False,
    user_keys: Sequence[str] | None = None,
) -> Histories:
    """Reads a bucket of both tables, of these users where they are given, and joins them on (user, text_hash)."""
    columns = ["user_key", "user_id", "position", "occurred_at", "text_hash"] + ["fields"] * with_fields
    items = pa.concat_tables(
        [histories.spec.empty(columns), *histories.of_users(columns, bucket, user_keys)]
    ).combine_chunks()
    items = rows_at(items, _ordered(items).to_numpy())
    starts = _starts(items["user_key"])
    occurred_at, last_item_at = _times(items["occurred_at"], starts)
    first = pa.array(starts[:-1])
    found = Histories(
        user_ids=items["user_id"].take(first).to_pylist(),
        user_keys=items["user_key"].take(first).to_pylist(),
        starts=starts,
        text_hash=_flat(items["text_hash"]),
        occurred_at=occurred_at,
        last_item_at=last_item_at,
        position=items["position"].to_numpy(),
        fields=_flat(items["fields"]) if with_fields else None,
        vector_row=np.full(items.num_rows, -1, np.int64),
        vectors=np.zeros((0, 0), np.float32),
    )
    if embeddings is None:
        return found
    return found.with_vectors(embeddings, bucket, None if user_keys is None else np.arange(items.num_rows))


def _flat(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _ordered(items: pa.Table) -> pa.Array:
    """Rows by user, then by time for timed users, by position for the others (history.order, for all at once)."""
    key = items["user_key"]
    untimed = pc.unique(key.filter(pc.is_null(items["occurred_at"])))
    time = pc.if_else(pc.is_in(key, value_set=untimed), pa.scalar(0, pa.int64()), items["occurred_at"].cast(pa.int64()))
    ordered = pa.table({"key": key, "time": time, "position": items["position"]})
    return pc.sort_indices(ordered, sort_keys=[(name, "ascending") for name in ordered.column_names])


def _starts(keys: pa.ChunkedArray) -> np.ndarray:
    """Returns the start of each run of equal neighbours, and the end: (U+1,) int64."""
    codes = pc.dictionary_encode(_flat(keys)).indices.to_numpy()
    changes = np.flatnonzero(codes[1:] != codes[:-1]) + 1
    return np.r_[np.zeros(min(1, len(codes)), np.int64), changes, len(codes)].astype(np.int64)


def _times(times: pa.ChunkedArray, starts: np.ndarray) -> tuple[list[np.ndarray | None], pa.Array]:
    """Per user the items' times, None where one has none (history.times_us, for all at once); and the latest."""
    kind = times.type
    known = pc.is_valid(times).to_numpy(zero_copy_only=False)
    lowest = np.iinfo(np.int64).min
    us = pc.fill_null(_flat(times).cast(pa.timestamp("us", tz="UTC")).cast(pa.int64()), lowest).to_numpy()
    if len(starts) < 2:
        return [], pa.nulls(0, kind)
    timed = np.logical_and.reduceat(known, starts[:-1])
    latest = np.maximum.reduceat(us, starts[:-1])
    cuts = zip(starts[:-1], starts[1:], timed, strict=True)
    own = [us[start:end] if all_known else None for start, end, all_known in cuts]
    return own, pa.array(latest, mask=latest == lowest).cast(pa.timestamp("us", tz="UTC"))


def vectors_of(
    embeddings: Snapshot, bucket: int, wanted: pa.Array, users: list[str] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Row of each wanted pair in the vectors (-1: none), and the vectors (V, D), read some row groups at a time."""
    place: np.ndarray = np.full(len(wanted), -1, np.int64)
    distinct = pc.dictionary_encode(wanted)
    row_of = np.full(len(distinct.dictionary), -1, np.int64)
    parts, count = [], 0
    for table in embeddings.of_users(["user_key", "text_hash", "vector"], bucket, users):
        at = pc.index_in(pair_keys(table), value_set=distinct.dictionary)
        hit = np.flatnonzero(pc.is_valid(at).to_numpy(zero_copy_only=False))
        if len(hit):
            row_of[at.take(pa.array(hit)).to_numpy()] = count + np.arange(len(hit))
            parts.append(matrix(table["vector"])[hit])  # Arrow's `take` moves each value by itself
            count += len(hit)
    if len(wanted):
        place = row_of[distinct.indices.to_numpy()]
    widths = {part.shape[1] for part in parts}
    if len(widths) > 1:
        raise _uneven(sorted(widths))
    return place, np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)


def width_of(embeddings: Snapshot) -> int:
    """Returns D of a table of vectors, by any one of them; 0 where it has none."""
    for file in embeddings.files:
        for part in embeddings.of_users(["vector"], file.bucket):
            if part.num_rows:
                return len(part["vector"][0])
    return 0


def pair_keys(rows: pa.Table) -> pa.Array:
    """user_key + text_hash, the key of `embeddings`."""
    return _flat(pc.binary_join_element_wise(rows["user_key"], rows["text_hash"], ""))


def matrix(vectors: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """list<float32> of one width -> (n, D) float32, without a Python number in between.

    Raises:
        ValueError: vectors of different widths.
    """
    vectors = _flat(vectors)
    if not len(vectors):
        return np.zeros((0, 0), np.float32)
    widths = pc.unique(pc.list_value_length(vectors)).to_pylist()
    if len(widths) != 1:
        raise _uneven(sorted(widths))
    return vectors.flatten().to_numpy(zero_copy_only=False).reshape(len(vectors), widths[0])


def _uneven(widths: list[int]) -> ValueError:
    return ValueError(f"vectors of one table have different widths: {widths}; refresh it anew")


def list_f32(rows: np.ndarray) -> pa.Array:
    """(n, D) float -> list<float32>."""
    n, width = rows.shape
    offsets = pa.array(np.arange(n + 1, dtype=np.int32) * width)
    return pa.ListArray.from_arrays(offsets, pa.array(np.ascontiguousarray(rows, np.float32).reshape(-1)))


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def to_us(value: datetime | None) -> int | None:
    """A timestamp as int64 microseconds, exact: `datetime.timestamp` is a float, which cannot hold them all."""
    return None if value is None else (value - _EPOCH) // timedelta(microseconds=1)


def decode_fields(value: Any) -> Mapping[str, str]:
    """A map<string,string> cell as a mapping."""
    return dict(value or [])
