"""Rows of tables as text for the screen: for people who want to see what stands in a table.

Route: a snapshot and a choice of rows -> as few row groups as hold them -> one block of lines per row.
The text goes to the screen alone (`infra.job_log.show`), since it is users' own.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.shards import bucket_of_key, user_key
from infra.snapshot import Snapshot
from infra.table import Table
from pipelines import tables

LONGEST = 600
"""Number of characters of a text that are shown; the number of the others is said."""
_TITLE = ("request_id", "item_id", "text_hash", "key")
_HIDDEN = ("user_key", "bucket")


def first_rows(
    snapshot: Snapshot, rows: int, *, user_id: str | None = None, bucket: int | None = None, run_id: str | None = None
) -> list[dict[str, Any]]:
    """Returns the first rows of a table that fit, in the order of its files; it reads no more row groups than it needs.

    Args:
        user_id: only this user's rows.
        bucket: only this bucket's rows.
        run_id: only rows that this run wrote; the table has a column run_id.
    """
    parts = _parts(snapshot, snapshot.spec.schema.names, user_id, bucket, run_id)
    found: list[dict[str, Any]] = []
    for part in parts if rows else ():
        found += part.slice(0, rows - len(found)).to_pylist()
        if len(found) >= rows:
            break
    return found


def _parts(
    snapshot: Snapshot, columns: list[str], user_id: str | None, bucket: int | None, run_id: str | None
) -> Iterator[pa.Table]:
    """The rows that fit, some row groups at a time."""
    keys = None
    if user_id is not None:
        keys = [user_key(user_id)]
        bucket = bucket_of_key(keys[0], Table.open(snapshot.table, snapshot.spec).buckets)
    for one in snapshot.by_bucket() if bucket is None else [bucket]:
        for part in snapshot.of_users(columns, None if one < 0 else one, keys):
            yield part if run_id is None else part.filter(pc.equal(part["run_id"], run_id))


def as_text(row: Mapping[str, Any]) -> str:
    """Returns a row as lines: its user and id, then each column that has a value, with vectors and bytes in short."""
    name = next((row[column] for column in _TITLE if row.get(column) is not None), None)
    title = " / ".join(str(part) for part in (row.get("user_id"), name) if part is not None)
    where = f"  (bucket {row['bucket']})" if "bucket" in row else ""
    told = {column: value for column, value in row.items() if column not in (*_TITLE, *_HIDDEN, "user_id")}
    fields = told.pop("fields", None)
    told |= dict(fields or [])
    return "\n".join(
        [f"--- {title}{where}", *_lines({name: value for name, value in told.items() if value is not None})]
    )


def replies(
    generations: Snapshot,
    requests: Snapshot,
    run_id: str | None,
    number: int,
    *,
    user_id: str | None = None,
    bucket: int | None = None,
) -> Iterator[str]:
    """Yields the first requests that have replies, each as text with its input, its target and the reply per method.

    Args:
        run_id: only replies of this run; of all runs when None.
        number: number of requests.
        user_id, bucket: as in `first_rows`.
    """
    pairs = _first_pairs(_parts(generations, ["user_id", "request_id", "run_id"], user_id, bucket, run_id), number)
    chosen: dict[tuple[str, str], list[dict[str, Any]]] = {pair: [] for pair in pairs}
    users = {user for user, _ in chosen}
    # the replies of a request lie in as many files as runs, methods and waves made them
    for row in _of_users(generations, generations.spec.schema.names, users):
        if run_id in (None, row["run_id"]) and (row["user_id"], row["request_id"]) in chosen:
            chosen[row["user_id"], row["request_id"]].append(row)
    columns = ["user_id", "request_id", "input", "target"]
    asked = {(row["user_id"], row["request_id"]): row for row in _of_users(requests, columns, users)}
    for (user, request), found in chosen.items():
        of = asked.get((user, request), {})
        head = {"input": of.get("input"), "target": of.get("target")}
        said = {_method(row, run_id): _reply(row) for row in found}
        yield "\n".join([f"--- {user} / {request}", *_lines(head | said)])


def _first_pairs(parts: Iterator[pa.Table], number: int) -> list[tuple[str, str]]:
    """The first different pairs of user and request."""
    found: dict[tuple[str, str], None] = {}
    for part in parts if number else ():
        found |= dict.fromkeys(zip(part["user_id"].to_pylist(), part["request_id"].to_pylist(), strict=True))
        if len(found) >= number:
            break
    return list(found)[:number]


def _of_users(snapshot: Snapshot, columns: list[str], users: set[str]) -> list[dict[str, Any]]:
    """Rows of some users, in the order of the table's files."""
    buckets = Table.open(snapshot.table, snapshot.spec).buckets
    keys = [user_key(user) for user in users]
    return snapshot.read(columns, {bucket_of_key(key, buckets) for key in keys}, user_keys=keys).to_pylist()


def _method(row: Mapping[str, Any], run_id: str | None) -> str:
    name = row["method"] if row["sample"] is None else f"{row['method']} #{row['sample']}"
    return name if run_id is not None else f"{name} ({row['run_id']})"


def _reply(row: Mapping[str, Any]) -> str:
    return f"error: {row['error']}" if row["error"] is not None else row["text"]


def _lines(values: Mapping[str, Any]) -> Iterator[str]:
    told = {name: value for name, value in values.items() if value is not None}
    width = max((len(name) for name in told), default=0)
    for name, value in told.items():
        first, *rest = _short(value).split("\n")
        yield f"  {name:<{width}}  {first}"
        yield from (f"  {'':<{width}}  {line}" for line in rest)


def _short(value: Any) -> str:
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    if isinstance(value, list) and value and isinstance(value[0], float):
        norm = math.sqrt(float(np.square(np.asarray(value, dtype=np.float64)).sum()))
        return f"{len(value)} values, norm {norm:.4g}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    text = (
        f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000 else str(value)
    )
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ... and {len(text) - LONGEST:,} more characters"


def overview(location: str) -> Iterator[str]:
    """Yields a line per table of a population: its name, rows and version."""
    for name in tables.names(location):
        snapshot = tables.newest(location, name)
        assert snapshot is not None
        yield f"{name:<28} {snapshot.rows:>12,} rows  {state(snapshot)}"


def state(snapshot: Snapshot) -> str:
    """Returns the number of a version, and whether readers take it."""
    if not snapshot.version:
        return "nothing written yet"
    run = snapshot.metadata.get("run_id")
    whole = "" if snapshot.metadata.get("complete") == "true" else ", of a run that has not ended"
    return f"version {snapshot.version}{whole}" + (f", written by {run}" if run else "")
