"""One version of a table, as its log names it: files with their buckets, row counts and key ranges, and their rows.

The log is the table, the folder is not: files of a killed write and files already replaced lie in the same folder.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.rows import TableSpec
from infra.storage import Storage, retrying

T = TypeVar("T")


@dataclass(frozen=True)
class DataFile:
    """A Parquet file of a table. Never holds a user id: this travels through Ray, logs and commits."""

    table: str
    path: str
    """Path below the table's folder."""
    size: int
    """Size in bytes."""
    rows: int
    bucket: int | None
    min_key: str
    max_key: str
    """Smallest and greatest user_key; both are empty where the table has no such column."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Number of rows set aside on the way into this file, by reason. Only the job's counts use it."""
    root: str = ""
    """Folder of the table."""

    @property
    def uri(self) -> str:
        """Address of the file."""
        return f"{self.root}/{self.path}"

    def to_row(self) -> dict[str, Any]:
        """Returns a flat row for a Ray dataset: bucket -1 stands for None, reasons are JSON."""
        bucket = -1 if self.bucket is None else self.bucket
        return asdict(self) | {"bucket": bucket, "reasons": json.dumps(self.reasons)}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "DataFile":
        """Returns the file that `to_row` describes; other columns of the row are ignored."""
        values = {f.name: row[f.name] for f in fields(cls) if f.name in row}
        bucket = None if values["bucket"] is None or values["bucket"] < 0 else int(values["bucket"])
        reasons = json.loads(values.get("reasons") or "{}")
        return cls(
            **values | {"bucket": bucket, "reasons": reasons, "size": int(row["size"]), "rows": int(row["rows"])}
        )


@dataclass(frozen=True)
class Snapshot:
    """A version of a table. Its files stay readable until a vacuum, whatever is committed later."""

    version: int
    metadata: dict[str, str]
    """Metadata of the commit that made this version: run_id, group, complete, and the job's own keys."""
    files: list[DataFile]
    table: str
    spec: TableSpec

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)

    def by_bucket(self) -> dict[int, list[DataFile]]:
        """Groups the files by bucket, in order of the buckets; an unbucketed table has the one bucket -1."""
        groups: dict[int, list[DataFile]] = {}
        for file in sorted(self.files, key=lambda file: (-1 if file.bucket is None else file.bucket, file.path)):
            groups.setdefault(-1 if file.bucket is None else file.bucket, []).append(file)
        return groups

    def filled(self, users: Mapping[int, Sequence[str]] | None = None) -> list[int]:
        """Lists the buckets that have a file, in order. With `users` (`shards.keys_by_bucket`), only their buckets."""
        return [bucket for bucket in self.by_bucket() if users is None or bucket in users]

    @property
    def fingerprint(self) -> str:
        """Name for exactly these files: equal fingerprints mean equal rows, even after a table was made anew."""
        names = "\n".join(sorted(file.path for file in self.files))
        return hashlib.blake2b(names.encode(), digest_size=16).hexdigest()

    def of_users(
        self, columns: list[str], bucket: int | None, user_keys: Sequence[str] | None = None
    ) -> Iterator[pa.Table]:
        """Yields the rows of some users of a bucket (of all when None), some row groups at a time.

        Only row groups whose range of user_key holds one of the keys are read, and rows of other users are left out,
        so that memory does not grow with the bucket. Files are sorted by user_key: a user lies in few row groups.
        """
        wanted = None if user_keys is None else np.array(sorted(user_keys), dtype=str)
        for file in self.files:
            if file.bucket == bucket and (wanted is None or _between(wanted, file.min_key, file.max_key)):
                yield from _row_groups(file, columns, wanted, self.spec)

    def read(
        self,
        columns: list[str] | None = None,
        buckets: Iterable[int] | None = None,
        filter: pc.Expression | None = None,
        user_keys: Sequence[str] | None = None,
    ) -> pa.Table:
        """Reads the whole version into memory. Jobs on large tables read bucket by bucket in Ray tasks instead.

        Args:
            filter: an expression as in `read_file`.
            user_keys: only the rows of these users; files and row groups that can hold none of them are not read.
        """
        wanted = None if buckets is None else set(buckets)
        chosen = [file for file in self.files if wanted is None or file.bucket in wanted]
        if user_keys is not None:
            keys = np.array(sorted(user_keys), dtype=str)
            chosen = [file for file in chosen if _between(keys, file.min_key, file.max_key)]
            theirs = pc.field("user_key").isin(pa.array(keys.tolist(), pa.string()))
            filter = theirs if filter is None else theirs & filter
        return read_files(chosen, columns, filter, spec=self.spec)


def read_files(
    files: Iterable[DataFile],
    columns: list[str] | None = None,
    filter: pc.Expression | None = None,
    *,
    spec: TableSpec,
) -> pa.Table:
    """Reads files of one table as one Arrow table, in the order given. Without a file it has the columns and no row."""
    names = spec.schema.names if columns is None else columns
    unknown = [name for name in names if name not in spec.schema.names]
    if unknown:
        raise ValueError(f"table {spec.name} has no column {unknown[0]!r}; it has {', '.join(spec.schema.names)}")
    return pa.concat_tables([spec.empty(names)] + [read_file(file.uri, names, filter, spec) for file in files])


def read_file(
    uri: str, columns: list[str] | None = None, filter: pc.Expression | None = None, spec: TableSpec | None = None
) -> pa.Table:
    """Reads one file of a table; `bucket` (int32, first) is put back from its path where it is asked for.

    Args:
        uri: address of the file, `DataFile.uri`.
        columns: columns in the order of the result; all when None.
        filter: skips row groups by their statistics, then rows; for example `pc.field("user_key") == key`.
        spec: spec of the table; columns added since the file was written (`TableSpec.added`) are null.

    Raises:
        ValueError: the file is damaged or has no such column.
        FileNotFoundError: the file is gone (a vacuum ran) or lies on a disk that this machine does not see.
    """
    folder, _, name = uri.rpartition("/")
    storage = Storage(folder)
    bucket = bucket_of_path(uri)
    stored = None if columns is None else [column for column in columns if bucket is None or column != "bucket"]

    late = set(spec.added) & set(stored or ()) if spec is not None else set()

    def read() -> pa.Table:
        with storage.open_input(name) as source:
            names = stored
            if late and stored is not None:  # the library refuses a column that the file does not have
                existing = set(pq.read_schema(source).names)
                names = [column for column in stored if column in existing or column not in late]
            # partitioning=None: the path would otherwise give bucket as a dictionary or a string
            return pq.read_table(source, columns=names, filters=filter, partitioning=None)

    table = _read(read, uri)
    if bucket is not None and (columns is None or "bucket" in columns):
        table = _with_bucket(table, bucket)
    table = with_added(table, columns, spec)
    missing = [column for column in columns or [] if column not in table.column_names]
    if missing:
        raise ValueError(f"{uri}: has no column {missing[0]!r}; it has {', '.join(table.column_names)}")
    return table if columns is None else table.select(columns)


def _read(action: Callable[[], T], uri: str) -> T:
    """Runs a read with retries, and names a damaged file."""
    try:
        return retrying(action, f"read {uri}")
    except pa.ArrowInvalid as error:
        raise ValueError(f"{uri}: not a readable Parquet file ({error}); restore it or rewrite its bucket") from error


def _with_bucket(table: pa.Table, bucket: int) -> pa.Table:
    """Adds the column that the path alone holds."""
    return table.add_column(0, pa.field("bucket", pa.int32()), pa.repeat(pa.scalar(bucket, pa.int32()), len(table)))


def with_added(table: pa.Table, columns: Sequence[str] | None, spec: TableSpec | None) -> pa.Table:
    """Adds the columns asked for that are younger than the file (`TableSpec.added`), filled with nulls.

    A Delta table knows one type for bytes; columns of bytes get the one that the spec has for them in memory.
    """
    if spec is None:
        return table
    for at, held in enumerate(table.schema):
        if pa.types.is_binary(held.type) and held.name in spec.schema.names:
            field = spec.schema.field(held.name)
            table = table.set_column(at, field, table.column(at).cast(field.type))
    for name in spec.added:
        if name not in table.column_names and (columns is None or name in columns):
            field = spec.schema.field(name)
            table = table.append_column(field, pa.nulls(len(table), field.type))
    return table


READ_ROWS = 32_768
"""Number of rows that `of_users` reads at a time: 50 MB of vectors at D=384."""


def _between(keys: np.ndarray, low: str, high: str) -> bool:
    """Says whether one of the sorted keys lies in the range; an empty bound is an unknown one."""
    if not low or not high:
        return True
    return bool(np.searchsorted(keys, low, side="left") < np.searchsorted(keys, high, side="right"))


def _row_groups(file: DataFile, columns: list[str], keys: np.ndarray | None, spec: TableSpec) -> Iterator[pa.Table]:
    """Yields the rows of these users (sorted keys; all when None), a few row groups at a time."""
    folder, _, name = file.uri.rpartition("/")
    storage = Storage(folder)

    def look() -> pq.FileMetaData:
        with storage.open_input(name) as source:
            return pq.read_metadata(source)

    def read(groups: list[int]) -> pa.Table:
        with storage.open_input(name) as source:
            return pq.ParquetFile(source, metadata=facts, pre_buffer=True).read_row_groups(groups, columns=stored)

    facts = _read(look, file.uri)
    stored = [name for name in columns if name != "bucket"]
    if keys is not None:
        stored = list(dict.fromkeys([*stored, "user_key"]))
    chosen: list[int] = []
    rows = 0
    for group in [*_groups_with(facts, keys), None]:
        if chosen and (group is None or rows >= READ_ROWS):
            table = _read(partial(read, chosen), file.uri)
            if keys is not None:
                table = table.filter(pc.is_in(table["user_key"], value_set=pa.array(keys.tolist())))
            if "bucket" in columns and file.bucket is not None:
                table = _with_bucket(table, file.bucket)
            yield with_added(table, columns, spec).select(columns)
            chosen, rows = [], 0
        if group is not None:
            chosen.append(group)
            rows += facts.row_group(group).num_rows


def _groups_with(facts: pq.FileMetaData, keys: np.ndarray | None) -> list[int]:
    """Lists the row groups that may hold one of the keys, by their statistics."""
    every = range(facts.num_row_groups)
    if keys is None or not len(every):
        return list(every)
    names = [facts.row_group(0).column(at).path_in_schema for at in range(facts.num_columns)]
    at = names.index("user_key")
    spans = [facts.row_group(group).column(at).statistics for group in every]
    return [
        group for group, span in zip(every, spans, strict=True)
        if span is None or not span.has_min_max or _between(keys, span.min, span.max)
    ]  # fmt: skip


def bucket_of_path(path: str) -> int | None:
    """Returns the bucket that a file's folder names, `.../bucket=7/...`, or None in an unbucketed table."""
    parts = path.split("/")
    folder = parts[-2] if len(parts) > 1 else ""
    return int(folder.removeprefix("bucket=")) if folder.startswith("bucket=") else None
