"""One bucket's histories, ordered, each item beside its vector: what personas and prompts are made from.

Reads only the bucket's own files and, of the vectors, only the rows that live items point to.
Shapes: U users, T items of all users (ragged), V vectors, D encoder width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.snapshot import Snapshot
from pplug import history


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
    last_item_at: list[Any]
    position: np.ndarray
    fields: pa.Array | None
    vector_row: np.ndarray
    vectors: np.ndarray

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

    def visible(self, user: int, as_of: int | None, as_of_position: int | None, cap: int) -> np.ndarray:
        """Rows (into T) of the newest `cap` items that a request may see, oldest first."""
        start, end = self.starts[user], self.starts[user + 1]
        count = history.visible_count(self.occurred_at[user], self.position[start:end], as_of, as_of_position)
        kept = history.newest(count, cap)
        return np.arange(start + kept.start, start + kept.stop)

    def with_vector(self, rows: np.ndarray) -> np.ndarray:
        """Those of the rows whose item has a vector, as rows of `vectors`."""
        found = self.vector_row[rows]
        return found[found >= 0]


def read_bucket(
    histories: Snapshot, embeddings: Snapshot | None, bucket: int, *, with_fields: bool = False
) -> Histories:
    """Reads a bucket of both tables and joins them on (user, text_hash)."""
    columns = ["user_key", "user_id", "position", "occurred_at", "text_hash"] + ["fields"] * with_fields
    items = histories.read(columns, buckets=[bucket]).combine_chunks()
    items = items.take(_ordered(items))
    user_keys, starts = _runs(items["user_key"].to_pylist())
    occurred_at, last_item_at = [], []
    times = items["occurred_at"]
    for start, end in zip(starts[:-1], starts[1:], strict=True):
        own = times.slice(start, end - start)
        occurred_at.append(history.times_us(own))
        last_item_at.append(pc.max(own).as_py())
    if embeddings is None:
        vector_row, vectors = np.full(items.num_rows, -1, np.int64), np.zeros((0, 0), np.float32)
    else:
        vector_row, vectors = _join_vectors(items, embeddings, bucket)
    return Histories(
        user_ids=items["user_id"].take(pa.array(starts[:-1])).to_pylist(),
        user_keys=user_keys,
        starts=starts,
        text_hash=_flat(items["text_hash"]),
        occurred_at=occurred_at,
        last_item_at=last_item_at,
        position=items["position"].to_numpy(),
        fields=_flat(items["fields"]) if with_fields else None,
        vector_row=vector_row,
        vectors=vectors,
    )


def _flat(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _ordered(items: pa.Table) -> pa.Array:
    """Rows by user, then by time for timed users, by position for the others (history.order, for all at once)."""
    key = items["user_key"]
    untimed = pc.unique(key.filter(pc.is_null(items["occurred_at"])))
    time = pc.if_else(pc.is_in(key, value_set=untimed), pa.scalar(0, pa.int64()), items["occurred_at"].cast(pa.int64()))
    ordered = pa.table({"key": key, "time": time, "position": items["position"]})
    return pc.sort_indices(ordered, sort_keys=[(name, "ascending") for name in ordered.column_names])


def _runs(values: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Distinct neighbours and where each run starts, plus the end."""
    starts = [i for i, value in enumerate(values) if i == 0 or value != values[i - 1]]
    return [values[i] for i in starts], np.array([*starts, len(values)], np.int64)


def _join_vectors(items: pa.Table, embeddings: Snapshot, bucket: int) -> tuple[np.ndarray, np.ndarray]:
    found = embeddings.read(["user_key", "text_hash", "vector"], buckets=[bucket])
    wanted = pair_keys(items)
    rows = pc.index_in(wanted, value_set=pair_keys(found)) if found.num_rows else pa.nulls(len(wanted), pa.int32())
    vector_row = pc.fill_null(rows, -1).to_numpy().astype(np.int64)
    used, vector_row_used = np.unique(vector_row[vector_row >= 0], return_inverse=True)
    vector_row[vector_row >= 0] = vector_row_used
    return vector_row, matrix(found["vector"].take(pa.array(used)))


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
        raise ValueError(f"vectors of one table have different widths: {sorted(widths)}; refresh it anew")
    return vectors.flatten().to_numpy(zero_copy_only=False).reshape(len(vectors), widths[0])


def list_f32(rows: np.ndarray) -> pa.Array:
    """(n, D) float -> list<float32>."""
    n, width = rows.shape
    offsets = pa.array(np.arange(n + 1, dtype=np.int32) * width)
    return pa.ListArray.from_arrays(offsets, pa.array(np.ascontiguousarray(rows, np.float32).reshape(-1)))


def to_us(value: Any) -> int | None:
    """A timestamp as int64 microseconds."""
    return None if value is None else int(value.timestamp() * 1_000_000)


def decode_fields(value: Any) -> Mapping[str, str]:
    """A map<string,string> cell as a mapping."""
    return dict(value or [])
