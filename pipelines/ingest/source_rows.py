"""Rows on their way from any source into the tables: checked, with the same columns, and with their place of origin.

A source hands each row to a `RowWriter`. A row that cannot be used becomes a reject row with a reason (a short
constant) and a place, never the user's text; no row is dropped without one.
"""

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pyarrow as pa

from infra.shards import shard_columns
from pplug.history import text_hash
from pplug.tasks import TaskSpec, slots

ITEM, REQUEST, REJECT, COUNT = range(4)
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
        ("input", pa.large_string()),
        ("owner_id", pa.string()),
        ("target", pa.large_string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
NO_BUCKET = -1
"""Bucket of rows that only count."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_LATEST = 253_402_300_799_999_999


class RowError(Exception):
    """A row that cannot be used: a reason to count by, and a detail that helps to mend the source."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class RowWriter:
    """Collects rows of one file and returns them as Arrow tables of `ROWS`."""

    def __init__(self, task: TaskSpec, buckets: int, file: int) -> None:
        self.task, self.buckets, self.file = task, buckets, file
        self._needed, self._told = task.fields, set(slots(task.item_without_label))
        self._rows: list[dict[str, Any]] = []
        self._planned = 0
        self._bytes = 0

    def planned(self, n: int = 1) -> None:
        """Counts rows of the source before they are checked; the job's final counts must add up to them."""
        self._planned += n

    def item(self, seq: int, place: str, user_id: object, item_id: object, at: object, fields: Mapping) -> None:
        """Adds a history item. Raises RowError: it cannot be used."""
        texts = _texts(fields)
        lacking = [name for name in self._needed if name not in texts]
        if lacking:
            kind = "wrong_type" if fields.get(lacking[0]) is not None else "missing_field"
            raise RowError(kind, f"field {lacking[0]} of task {self.task.name} is not there as text")
        if not any(text.strip() for name, text in texts.items() if name in self._told):
            raise RowError("empty_text", f"nothing in the fields of {self.task.item_without_label}")
        user, item = identifier(user_id, "user_id"), identifier(item_id, "item_id")
        values = {"fields": list(texts.items()), "text_hash": text_hash(texts), "at": microseconds(at)}
        self._add(ITEM, seq, place, sum(map(len, texts.values())), user_id=user, id=item, **values)

    def request(
        self, seq: int, place: str, request_id: object, user_id: object, input: object, *,
        owner_id: object = None, as_of: object = None, as_of_us: int | None = None, target: object = None,
    ) -> None:  # fmt: skip
        """Adds a request. Raises RowError: it cannot be used."""
        text, answer = _text(input), _text(target)
        if text is None or not text.strip():
            raise RowError("empty_text" if isinstance(input, str) else "missing_field", "input is not there as text")
        if answer is not None and self.task.metric == "classification" and answer.strip() not in self.task.labels:
            raise RowError("target_outside_labels", f"not one of the {len(self.task.labels)} labels of the task")
        user = identifier(user_id, "user_id")
        owner = user if owner_id is None else identifier(owner_id, "owner_id")
        at = microseconds(as_of) if as_of_us is None else as_of_us
        request = identifier(request_id, "request_id")
        values = {"input": text, "target": answer, "owner_id": owner, "at": at}
        self._add(REQUEST, seq, place, len(text), user_id=user, id=request, **values)

    def reject(self, seq: int, place: str, error: RowError) -> None:
        """Adds a reject. It has no user to be sorted by: rejects are spread over the buckets by their number."""
        self._rows.append(
            {"bucket": seq % self.buckets, "kind": REJECT, "file": self.file, "seq": seq, "place": place,
             "reason": error.reason, "detail": error.detail}
        )  # fmt: skip

    def _add(self, kind: int, seq: int, place: str, size: int, **values: Any) -> None:
        self._rows.append({"kind": kind, "file": self.file, "seq": seq, "place": place, **values})
        self._bytes += size

    @property
    def full(self) -> bool:
        """True if rows should be taken now, so that blocks have tens of megabytes at most."""
        return len(self._rows) >= 20_000 or self._bytes >= 16 * 2**20

    def take(self) -> pa.Table:
        """Returns the rows collected so far, and one row with the number of rows in the source."""
        rows = [*self._rows, {"bucket": NO_BUCKET, "kind": COUNT, "file": self.file, "seq": self._planned}]
        self._rows, self._planned, self._bytes = [], 0, 0
        table = pa.Table.from_pylist(rows, schema=ROWS)
        has_user = [row.get("user_id") is not None for row in rows]
        bucket, user_key = shard_columns(table["user_id"].filter(pa.array(has_user)), self.buckets)
        at = iter(zip(bucket.to_pylist(), user_key.to_pylist(), strict=True))
        pairs = [next(at) if has else (row["bucket"], None) for has, row in zip(has_user, rows, strict=True)]
        table = table.set_column(0, ROWS.field(0), pa.array([pair[0] for pair in pairs], pa.int32()))
        column = ROWS.get_field_index("user_key")
        return table.set_column(column, ROWS.field(column), pa.array([pair[1] for pair in pairs], pa.string()))


def nothing_in(buckets: Sequence[int]) -> pa.Table:
    """Makes a row per bucket that counts nothing, so that the bucket is merged although no source has a row for it."""
    return pa.Table.from_pylist(
        [{"bucket": bucket, "kind": COUNT, "file": 0, "seq": 0} for bucket in buckets], schema=ROWS
    )


def identifier(value: object, name: str) -> str:
    """Returns an id as text. Raises RowError: it is missing, or it is no Unicode that a file could hold."""
    text = _text(value)
    if text is None or not text.strip():
        raise RowError("missing_id", f"{name} is missing, empty or neither text nor a whole number")
    return text


def microseconds(value: object) -> int | None:
    """Returns a time as microseconds since 1970 UTC, from ISO text, a date or a number (s, ms, us or ns, by its size).

    A time without a zone is UTC.

    Raises:
        RowError: it is none of these, or a bare year, which as a number would mean half an hour into 1970.
    """
    if isinstance(value, bytes):
        value = _text(value)
    if value is None or (isinstance(value, str) and not value.strip()) or value != value:
        return None
    try:
        if isinstance(value, str):
            text = value.strip()
            try:
                return _since_epoch(datetime.fromisoformat(text))
            except ValueError:
                number = float(text)
                return _scaled(number if not number.is_integer() else int(number))
        if isinstance(value, datetime):
            return _since_epoch(value)
        if isinstance(value, date):
            return _since_epoch(datetime(value.year, value.month, value.day))
        if isinstance(value, int | float) and not isinstance(value, bool):
            return _scaled(value)
    except (ValueError, OverflowError):
        pass
    raise RowError("bad_date", "expected an ISO date or time, or seconds since 1970")


def _since_epoch(moment: datetime) -> int:
    return ((moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - _EPOCH) // _MICROSECOND


def _scaled(number: float) -> int:
    size = abs(number)
    if not math.isfinite(number) or 1000 <= size < 3000:
        raise ValueError("a bare year, or no number")
    per_second = next((scale for scale in (1, 1_000, 1_000_000) if size < 1e11 * scale), 1_000_000_000)
    whole = isinstance(number, int)
    time = number * 1_000_000 // per_second if whole else round(number * (1_000_000 / per_second))
    if abs(time) > _LATEST:
        raise OverflowError("beyond the year 9999")
    return int(time)


def _texts(fields: object) -> dict[str, str]:
    """Returns the fields that hold text or a number; others (lists, null) are no text of an item."""
    if not isinstance(fields, Mapping):
        raise RowError("wrong_type", "fields is not a mapping of names to texts")
    texts = {str(name): _text(value) for name, value in fields.items()}
    return {name: text for name, text in texts.items() if text is not None}


def _text(value: object) -> str | None:
    """Returns text or a number as text, None for anything else. Raises RowError: the text is no Unicode."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value) if value == value else None
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RowError("bad_utf8", f"byte {error.start} of a text is not UTF-8") from error
    if not isinstance(value, str):
        return None
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowError("bad_utf8", f"character {error.start} of a text is half a surrogate pair") from error
    return value
