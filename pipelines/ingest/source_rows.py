"""Rows on their way from any source into the tables: checked, with the same columns, and with their place of origin.

A source hands its rows to a `RowWriter`, by columns (`batch`) or one by one (`item`, `request`). A row that cannot be
used becomes a reject row with a reason (a short constant) and a place, never the user's text; no row is dropped
without one.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.shards import shard_columns
from pipelines.ingest.labels import LabelRule, Matching
from pipelines.ingest.times import TimeRule
from pipelines.ingest.values import Column, RowError, blank, id_column, text_column
from pipelines.ingest.vector_values import vector_column
from pplug import rubric
from pplug.history import text_hashes
from pplug.tasks import TaskSpec, slots

ITEM, REQUEST, REJECT, COUNT, VECTOR, GONE = range(6)
TIME = pa.timestamp("us", tz="UTC")
ROWS = pa.schema(
    [
        ("bucket", pa.int32()),
        ("kind", pa.int8()),
        ("file", pa.int32()),  # with seq: the order as given
        ("seq", pa.int64()),
        ("place", pa.string()),  # names this row in a reject
        ("user_key", pa.string()),
        ("user_id", pa.string()),
        ("id", pa.string()),  # item_id or request_id
        ("at", TIME),  # occurred_at or as_of
        ("fields", pa.map_(pa.string(), pa.string())),
        ("text_hash", pa.string()),
        ("input", pa.large_string()),  # of a reject: the row, if its text is asked for
        ("owner_id", pa.string()),
        ("target", pa.large_string()),
        ("reason", pa.string()),
        ("detail", pa.string()),  # of a count: `Notes` as JSON
        ("line", pa.int64()),  # of a reject: the line within its piece, from 1
        ("vector", pa.list_(pa.float32())),  # the item's own, where vectors are asked for
    ]
)
NO_BUCKET = -1
"""Bucket of rows that only count."""
CORE: dict[str, tuple[str, ...]] = {
    "items": ("user_id", "item_id", "occurred_at"),
    "requests": ("request_id", "user_id", "input", "as_of", "target", "owner_id"),
    "vectors": ("user_id", "item_id", "vector"),
    "gone": ("user_id", "item_id"),
}
"""Our names of each kind's columns that are no fields; items may bring a `vector`, too (`RowRules`)."""
_KINDS = {"items": ITEM, "requests": REQUEST, "vectors": VECTOR, "gone": GONE}
_MANY_NAMES = 256
"""Number of fields from which rows are laid out in small groups: rows that share few names would be mostly gaps."""
_SHOWN = 300
"""Number of characters of a row that are shown where its text is asked for."""
_ROWS_AT_ONCE, _BYTES_AT_ONCE = 20_000, 16 * 2**20


@dataclass(frozen=True)
class RowRules:
    """Keys of `ingest` that decide what a row is."""

    time: TimeRule = TimeRule()
    labels: Matching = "normalise"
    show_text: bool = False
    """True if rejects carry the text of their row, for the screen alone."""
    automatic_ids: bool = False
    """True if items without an id are given one (`item_ids`), because their source has no column of ids."""
    vectors: bool = False
    """True if items bring their vectors in a column."""

    def core(self, kind: str) -> tuple[str, ...]:
        """Returns our names of a kind's columns that are no fields."""
        return (*CORE[kind], "vector") if kind == "items" and self.vectors else CORE[kind]


@dataclass
class Notes:
    """Counts of a piece that belong to no user; a COUNT row carries them."""

    start: int = 0
    """Place of the piece in its file."""
    lines: int = 0
    """Number of lines read, in a format that has lines."""
    values: Counter[str] = field(default_factory=Counter)
    """Number of rows with a value, by kind and our name, such as `items.occurred_at`."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Number of values that have no text, by column."""
    columns: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in CORE})
    """Columns of the source by kind, as far as they are mapped or few."""
    times: list[str] = field(default_factory=list)
    """Columns that look like times, in a source without the column that is mapped to one."""


class RowWriter:
    """Collects rows of one piece of a file and returns them as Arrow tables of `ROWS`."""

    def __init__(
        self, task: TaskSpec, buckets: int, file: int, rules: RowRules = RowRules(), start: int = 0
    ) -> None:  # fmt: skip
        self.task, self.buckets, self.file, self.rules = task, buckets, file, rules
        self.notes, self._start = Notes(start), start
        self._labels = LabelRule(task, rules.labels)
        self._needed, self._told = task.fields, set(slots(task.item_without_label))
        self._tables: list[pa.Table] = []
        self._waiting: dict[str, list[dict[str, Any]]] = {"items": [], "requests": []}
        self._rejects: list[dict[str, Any]] = []
        self._planned = self._rows = self._bytes = 0

    def planned(self, n: int = 1) -> None:
        """Counts rows of the source before they are checked; the job's final counts must add up to them."""
        self._planned += n

    # --- by columns -------------------------------------------------------------------------------------------------

    def batch(
        self, kind: Literal["items", "requests", "vectors", "gone"], columns: Mapping[str, Column],
        fields: Mapping[str, Column], seq: np.ndarray, place: Callable[[int], str], line: np.ndarray | None = None,
        errors: dict[int, RowError] | None = None,
    ) -> None:  # fmt: skip
        """Adds rows, counts them as planned, and sets aside those that cannot be used.

        Args:
            kind: what a row is.
            columns: values by our name (`CORE`); Arrow columns, or lists of Python values. A name may be missing.
            fields: an item's fields by name, in the order in which they are stored; null is no field.
            seq: (N,) int64, the order of the rows in their file.
            place: makes of a row's seq the text that names the row in a reject.
            line: (N,) int64, each row's line within the piece, from 1; None in a format without lines.
            errors: what is wrong with rows beforehand, by number in the batch.
        """
        count = len(seq)
        self._planned += count
        if not count:
            return
        fields = {name: column for name, column in fields.items() if self._sound_name(name, column)}
        errors = dict(errors or {})
        if kind == "items":
            made = self._items(columns, fields, count, errors)
        else:
            made = (self._asked if kind == "requests" else self._keyed)(columns, count, errors)
        for row in sorted(errors):
            shown = _shown({**columns, **fields}, row) if self.rules.show_text else None
            self.reject(
                int(seq[row]), place(int(seq[row])), errors[row], None if line is None else int(line[row]), shown
            )
        good = np.setdiff1d(np.arange(count), np.fromiter(errors, np.int64, len(errors)))
        if not len(good):
            return
        if len(good) < count:
            made = {name: column.take(pa.array(good)) for name, column in made.items()}
            seq = seq[good]
        bucket, user_key = shard_columns(made["user_id"], self.buckets)
        made |= {
            "bucket": bucket, "user_key": user_key, "seq": pa.array(seq, pa.int64()),
            "place": pa.array([place(one) for one in seq.tolist()], pa.string()),
            "kind": pa.repeat(pa.scalar(_KINDS[kind], pa.int8()), len(good)),
            "file": pa.repeat(pa.scalar(self.file, pa.int32()), len(good)),
        }  # fmt: skip
        arrays = [made[column.name] if column.name in made else pa.nulls(len(good), column.type) for column in ROWS]
        self._tables.append(pa.table(arrays, schema=ROWS))
        self._rows += len(good)
        self._bytes += self._tables[-1].nbytes

    def _items(
        self, columns: Mapping[str, Column], fields: Mapping[str, Column], count: int, errors: dict[int, RowError]
    ) -> dict[str, pa.Array]:
        found = {name: self._texts(name, fields[name], errors) for name in sorted(fields)}  # which error counts
        texts = {name: found[name] for name in fields}
        nothing = pa.nulls(count, pa.string())
        for name in self._needed:
            for row in np.flatnonzero(texts.get(name, nothing).is_null().to_numpy(zero_copy_only=False)):
                detail = f"field {name} of task {self.task.name} is not there as text"
                errors.setdefault(int(row), RowError("missing_field", detail))
        empty = np.ones(count, bool)
        for name in self._told & texts.keys():
            empty &= blank(texts[name])
        for row in np.flatnonzero(empty):
            detail = f"nothing in the fields of {self.task.item_without_label}"
            errors.setdefault(int(row), RowError("empty_text", detail))
        if self.task.target in texts and self.task.labelled:
            texts[self.task.target] = self._labels.column(texts[self.task.target])[0]
        keyed = self._keyed(columns, count, errors)
        at = self._times("items.occurred_at", columns.get("occurred_at"), count, errors)
        for name, text in texts.items():
            self.notes.values[f"items.{name}"] += len(text) - text.null_count
        hashes = pa.array(text_hashes(texts, count), pa.string())
        return keyed | {"at": at, "fields": _maps(texts, count), "text_hash": hashes}

    def _keyed(self, columns: Mapping[str, Column], count: int, errors: dict[int, RowError]) -> dict[str, pa.Array]:
        """The key of items, and their vectors where there is such a column."""
        user, item = self._ids(columns.get("user_id"), "user_id", count, errors), pa.nulls(count, pa.string())
        if not self.rules.automatic_ids or "item_id" in columns:
            item = self._ids(columns.get("item_id"), "item_id", count, errors)
        if "vector" not in columns:
            return {"user_id": user, "id": item}
        vector, wrong = vector_column(columns["vector"])
        for row, error in wrong.items():
            errors.setdefault(row, error)
        return {"user_id": user, "id": item, "vector": vector}

    def _asked(self, columns: Mapping[str, Column], count: int, errors: dict[int, RowError]) -> dict[str, pa.Array]:
        nothing = pa.nulls(count, pa.string())
        text, wrong = text_column(columns.get("input", nothing))
        for row, error in wrong.items():
            errors.setdefault(row, error)
        for row in np.flatnonzero(blank(text)):
            reason = "missing_field" if text[int(row)].as_py() is None else "empty_text"
            errors.setdefault(int(row), RowError(reason, "input is not there as text"))
        target = self._targets(columns.get("target", nothing), errors)
        user = self._ids(columns.get("user_id"), "user_id", count, errors)
        owner, wrong = id_column(columns.get("owner_id", nothing), "owner_id")
        for row, error in wrong.items():
            if error.reason != "missing_id":
                errors.setdefault(row, error)
        request = self._ids(columns.get("request_id"), "request_id", count, errors)
        at = self._times("requests.as_of", columns.get("as_of"), count, errors)
        self.notes.values["requests.target"] += count - target.null_count
        return {
            "user_id": user, "id": request, "at": at, "owner_id": pc.coalesce(owner, user),
            "input": text.cast(pa.large_string()), "target": target.cast(pa.large_string()),
        }  # fmt: skip

    def _targets(self, column: Column, errors: dict[int, RowError]) -> pa.Array:
        """Answers of requests. An empty text is none, as a CSV has no other word for it. A list or a truth value is a
        reject: without a target a request would pass as one that has no known answer."""
        target, wrong = text_column(column)
        target = pc.if_else(pa.array(blank(target)), pa.scalar(None, target.type), target)
        if not isinstance(column, pa.Array | pa.ChunkedArray):
            odd = [row for row, value in enumerate(column) if isinstance(value, bool | list | tuple | dict)]
        elif pa.types.is_boolean(column.type) or pa.types.is_nested(column.type):
            odd = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False)).tolist()
        else:
            odd = []
        wrong |= {row: RowError("wrong_type", "target is neither text nor a number") for row in odd}
        for row, error in wrong.items():
            errors.setdefault(row, error)
        target, outside = self._labels.column(target)
        for row in np.flatnonzero(outside):
            detail = f"not one of the {len(self.task.labels)} labels of the task"
            errors.setdefault(int(row), RowError("target_outside_labels", detail))
        if self.task.metric == "rubric":
            for row in np.flatnonzero(target.is_valid().to_numpy(zero_copy_only=False)):
                try:
                    rubric.read(target[int(row)].as_py())
                except ValueError as error:  # tells nothing of the target
                    errors.setdefault(int(row), RowError("bad_rubric", str(error)))
        return target

    def _texts(self, name: str, column: Column, errors: dict[int, RowError]) -> pa.Array:
        """A field's texts. What has no text is left out and counted, or rejects its row where the task needs it."""
        texts, wrong = text_column(column)
        for row, error in wrong.items():
            if error.reason != "wrong_type":
                errors.setdefault(row, error)
            elif name in self._needed:
                detail = f"field {name} of task {self.task.name} is not there as text"
                errors.setdefault(row, RowError("wrong_type", detail))
            else:
                self.notes.left_out[name] += 1
        return texts

    def _ids(self, column: Column | None, name: str, count: int, errors: dict[int, RowError]) -> pa.Array:
        ids, wrong = id_column(pa.nulls(count, pa.string()) if column is None else column, name)
        for row, error in wrong.items():
            errors.setdefault(row, error)
        return ids

    def _times(self, name: str, column: Column | None, count: int, errors: dict[int, RowError]) -> pa.Array:
        if column is None:
            return pa.nulls(count, TIME)
        times, wrong = self.rules.time.column(column)
        for row, error in wrong.items():
            errors.setdefault(row, RowError(error.reason, f"{name.partition('.')[2]}: {error.detail}"))
        self.notes.values[name] += count - times.null_count + len(wrong)
        return times.cast(TIME)

    def _sound_name(self, name: str, column: Column) -> bool:
        """A name with half a surrogate pair can stand in no file; its values are counted as left out."""
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            self.notes.left_out["a name that is not Unicode"] += sum(value is not None for value in column)
            return False
        return True

    # --- one by one -------------------------------------------------------------------------------------------------

    def item(self, seq: int, place: str, user_id: object, item_id: object, at: object, fields: Mapping) -> None:
        """Adds a history item, counted as planned before. Raises RowError: `fields` is no mapping."""
        if not isinstance(fields, Mapping):
            raise RowError("wrong_type", "fields is not a mapping of names to texts")
        row = {"user_id": user_id, "item_id": item_id, "occurred_at": at, "seq": seq, "place": place, "fields": fields}
        self._wait("items", row, sum(len(value) for value in fields.values() if isinstance(value, str | bytes)))

    def request(
        self, seq: int, place: str, request_id: object, user_id: object, input: object, *,
        owner_id: object = None, as_of: object = None, target: object = None,
    ) -> None:  # fmt: skip
        """Adds a request, counted as planned before."""
        row = {"request_id": request_id, "user_id": user_id, "input": input, "owner_id": owner_id, "as_of": as_of,
               "target": target, "seq": seq, "place": place}  # fmt: skip
        self._wait("requests", row, len(input) if isinstance(input, str) else 0)

    def unusable(self, request: Mapping[str, object]) -> RowError | None:
        """Returns why a request with these columns will be set aside, None if it will not. Nothing is counted."""
        errors: dict[int, RowError] = {}
        notes, self.notes = self.notes, Notes()
        self._asked({name: [value] for name, value in request.items()}, 1, errors)
        self.notes = notes
        return errors.get(0)

    def _wait(self, kind: str, row: dict[str, Any], size: int) -> None:
        self._waiting[kind].append(row)
        self._rows += 1
        self._bytes += size

    def _lay_out(self) -> None:
        """Turns the rows that came one by one into columns."""
        for kind, rows in self._waiting.items():
            self._waiting[kind] = []
            names = {str(name) for row in rows for name in row.get("fields", ())}
            step = len(rows) if len(names) <= _MANY_NAMES else 100
            for start in range(0, len(rows), step or 1):
                self._lay_out_some(kind, rows[start : start + step])

    def _lay_out_some(self, kind: Any, rows: list[dict[str, Any]]) -> None:
        places = {row["seq"]: row["place"] for row in rows}
        fields: dict[str, list[Any]] = {}
        for at, row in enumerate(rows):
            for name, value in row.get("fields", {}).items():
                fields.setdefault(str(name), [None] * len(rows))[at] = value
        columns = {name: [row[name] for row in rows] for name in CORE[kind]}
        self._planned -= len(rows)  # they are counted already
        self.batch(kind, columns, fields, np.array([row["seq"] for row in rows], np.int64), places.__getitem__)

    def reject(self, seq: int, place: str, error: RowError, line: int | None = None, text: str | None = None) -> None:
        """Adds a reject. It has no user to be sorted by: rejects are spread over the buckets by their number.

        Args:
            line: line within the piece, from 1.
            text: the row as it was given; it is kept only where the run may show it.
        """
        self._rejects.append(
            {"bucket": seq % self.buckets, "kind": REJECT, "file": self.file, "seq": seq, "place": place,
             "reason": error.reason, "detail": error.detail, "line": line,
             "input": text[:_SHOWN].encode("utf-8", "replace").decode() if text and self.rules.show_text else None}
        )  # fmt: skip

    @property
    def full(self) -> bool:
        """True if rows should be taken now, so that blocks have tens of megabytes at most."""
        return self._rows + len(self._rejects) >= _ROWS_AT_ONCE or self._bytes >= _BYTES_AT_ONCE

    def take(self) -> pa.Table:
        """Returns the rows collected so far, and one row with the number of rows in the source."""
        self._lay_out()
        notes = json.dumps(vars(self.notes))
        count = {"bucket": NO_BUCKET, "kind": COUNT, "file": self.file, "seq": self._planned, "detail": notes}
        tables = [*self._tables, pa.Table.from_pylist([*self._rejects, count], schema=ROWS)]
        self._tables, self._rejects, self.notes = [], [], Notes(self._start)
        self._planned = self._rows = self._bytes = 0
        return pa.concat_tables(tables)


def nothing_in(buckets: Sequence[int]) -> pa.Table:
    """Makes a row per bucket that counts nothing, so that the bucket is merged although no source has a row for it."""
    return pa.Table.from_pylist(
        [{"bucket": bucket, "kind": COUNT, "file": 0, "seq": 0} for bucket in buckets], schema=ROWS
    )


def by_kind(rows: pa.Table) -> dict[int, pa.Table]:
    """Splits rows of `ROWS` by kind; rows of one kind alone are not copied."""
    kind = rows["kind"].to_numpy()
    found = {}
    for one in (ITEM, REQUEST, REJECT, COUNT, VECTOR, GONE):
        those = kind == one
        found[one] = rows if those.all() else rows.filter(pa.array(those)) if those.any() else rows.slice(0, 0)
    return found


def _maps(texts: Mapping[str, pa.Array], count: int) -> pa.Array:
    """Returns a mapping of the texts per row, without those that are null."""
    width = len(texts)
    if not width:
        offsets = pa.array(np.zeros(count + 1, np.int32))
        return pa.MapArray.from_arrays(offsets, pa.array([], pa.string()), pa.array([], pa.string()))
    there = np.stack([text.is_valid().to_numpy(zero_copy_only=False) for text in texts.values()], axis=1)
    cells = np.flatnonzero(there.ravel())  # row by row, and in each row in the order of the fields
    row, column = cells // width, cells % width
    items = pa.concat_arrays(list(texts.values())).take(pa.array(column * count + row))
    keys = pa.array(list(texts), pa.string()).take(pa.array(column))
    offsets = np.concatenate([[0], np.cumsum(there.sum(axis=1))]).astype(np.int32)
    return pa.MapArray.from_arrays(pa.array(offsets), keys, items)


def _shown(columns: Mapping[str, Column], row: int) -> str:
    """Returns a row as text for the screen."""
    parts = []
    for name, column in columns.items():
        value = column[row]
        try:
            value = value.as_py() if isinstance(value, pa.Scalar) else value
        except (ValueError, OverflowError):  # not UTF-8, or beyond the year 9999
            value = "?"
        parts.append(f"{name}={value}")
    return ", ".join(parts)
