"""One version of a table, as its log names it: files with their buckets, rows and key ranges; and reading them.

The log is the table, the folder is not: files of a killed write and files already replaced lie in the same folder.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.rows import TableSpec
from infra.storage import Storage, retrying


@dataclass(frozen=True)
class DataFile:
    """A Parquet file of a table. Never holds a user id: this travels through Ray, logs and commits."""

    table: str
    path: str
    """Relative to the table's folder."""
    size: int
    """Bytes."""
    rows: int
    bucket: int | None
    min_key: str
    max_key: str
    """Smallest and greatest user_key; empty where the table has no such column."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Rows that were set aside on the way into this file, by reason: for the job's counts only."""
    root: str = ""
    """The table's folder."""

    @property
    def uri(self) -> str:
        """Where it can be read."""
        return f"{self.root}/{self.path}"

    def to_row(self) -> dict[str, Any]:
        """A flat row for a Ray dataset: bucket -1 for None, reasons as JSON."""
        bucket = -1 if self.bucket is None else self.bucket
        return asdict(self) | {"bucket": bucket, "reasons": json.dumps(self.reasons)}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "DataFile":
        """The file of `to_row`; other columns of the row are left alone."""
        values = {f.name: row[f.name] for f in fields(cls) if f.name in row}
        bucket = None if values["bucket"] is None or values["bucket"] < 0 else int(values["bucket"])
        reasons = json.loads(values.get("reasons") or "{}")
        return cls(
            **values | {"bucket": bucket, "reasons": reasons, "size": int(row["size"]), "rows": int(row["rows"])}
        )


@dataclass(frozen=True)
class Snapshot:
    """A version of a table. What it names stays readable until a vacuum, whatever is committed later."""

    version: int
    metadata: dict[str, str]
    """What the commit that made this version said: run_id, group, complete, and the job's own keys."""
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
        """Files of each bucket that has any, buckets in order; an unbucketed table has the one bucket -1."""
        found: dict[int, list[DataFile]] = {}
        for file in sorted(self.files, key=lambda file: (-1 if file.bucket is None else file.bucket, file.path)):
            found.setdefault(-1 if file.bucket is None else file.bucket, []).append(file)
        return found

    def read(
        self,
        columns: list[str] | None = None,
        buckets: Iterable[int] | None = None,
        filter: pc.Expression | None = None,
    ) -> pa.Table:
        """All of it in memory: for tests and tables known to be small; jobs read file by file in Ray tasks."""
        wanted = None if buckets is None else set(buckets)
        chosen = [file for file in self.files if wanted is None or file.bucket in wanted]
        return read_files(chosen, columns, filter, spec=self.spec)


def read_files(
    files: Iterable[DataFile],
    columns: list[str] | None = None,
    filter: pc.Expression | None = None,
    *,
    spec: TableSpec,
) -> pa.Table:
    """Files of one table as one table, in the order given; of no files, no rows with the spec's columns."""
    names = spec.schema.names if columns is None else columns
    unknown = [name for name in names if name not in spec.schema.names]
    if unknown:
        raise ValueError(f"table {spec.name} has no column {unknown[0]!r}; it has {', '.join(spec.schema.names)}")
    empty = pa.schema([spec.schema.field(name) for name in names]).empty_table()
    return pa.concat_tables([empty] + [read_file(file.uri, names, filter) for file in files])


def read_file(uri: str, columns: list[str] | None = None, filter: pc.Expression | None = None) -> pa.Table:
    """Reads one file of a table, with `bucket` (int32, first) put back from its path where it is asked for.

    Args:
        uri: `DataFile.uri`.
        columns: all when None; the result has this order.
        filter: skips row groups by their statistics, then rows; e.g. `pc.field("user_key") == key`.

    Raises:
        ValueError: the file is damaged or has no such column.
        FileNotFoundError: it is gone (a vacuum ran) or was written on a disk that this machine does not see.
    """
    folder, _, name = uri.rpartition("/")
    storage = Storage(folder)
    bucket = bucket_of_path(uri)
    stored = None if columns is None else [column for column in columns if bucket is None or column != "bucket"]

    def read() -> pa.Table:
        with storage.open_input(name) as source:
            # partitioning=None: the path would otherwise give bucket as a dictionary or a string
            return pq.read_table(source, columns=stored, filters=filter, partitioning=None)

    try:
        table = retrying(read, f"read {uri}")
    except pa.ArrowInvalid as error:
        raise ValueError(f"{uri}: not a readable Parquet file ({error}); restore it or rewrite its bucket") from error
    if bucket is not None and (columns is None or "bucket" in columns):
        table = table.add_column(
            0, pa.field("bucket", pa.int32()), pa.repeat(pa.scalar(bucket, pa.int32()), len(table))
        )
    missing = [column for column in columns or [] if column not in table.column_names]
    if missing:
        raise ValueError(f"{uri}: has no column {missing[0]!r}; it has {', '.join(table.column_names)}")
    return table if columns is None else table.select(columns)


def bucket_of_path(path: str) -> int | None:
    """The bucket that a file's folder names, `.../bucket=7/...`; None in an unbucketed table."""
    parts = path.split("/")
    folder = parts[-2] if len(parts) > 1 else ""
    return int(folder.removeprefix("bucket=")) if folder.startswith("bucket=") else None
