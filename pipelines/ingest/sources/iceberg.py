"""Iceberg tables, read through their metadata by pyiceberg (extra `iceberg`): deleted rows are not there.

A table is a folder with metadata/*.metadata.json; no catalog is asked, so that the newest of these files decides. Rows
come in the order of the commits, so that a correction by append is the last row of its key; a file that a delete or a
compaction has written again counts as written then.
"""

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa

from infra.errors import InputError
from infra.remote import reading
from pipelines.ingest.sources.base import COLUMNS_PACKED_BY, Kind, Options, Piece
from pipelines.ingest.sources.columns import top_columns
from pipelines.ingest.sources.discover import File
from pipelines.ingest.sources.records import Batch, RecordFormat

if TYPE_CHECKING:
    from pyiceberg.table import StaticTable
    from pyiceberg.table.snapshots import Snapshot

_NUMBER = re.compile(r"v?(\d+)[^/]*\.metadata\.json")


class Iceberg(RecordFormat):
    """Folders with Iceberg's metadata: the rows of the newest snapshot at the time of the look."""

    name = "iceberg"
    packed_by = COLUMNS_PACKED_BY

    def pieces(self, files: Sequence[File], kind: Kind, options: Options, first_file: int = 0) -> list[Piece]:
        pieces = []
        for number, file in enumerate(files, start=first_file):
            table = open_table(file.address)
            snapshot = table.current_snapshot()
            at = -1 if snapshot is None else snapshot.snapshot_id
            size = 0 if snapshot is None or snapshot.summary is None else int(snapshot.summary["total-files-size"] or 0)
            identity = f"Iceberg table {table.metadata.table_uuid}, snapshot {at}"
            pieces.append(
                Piece(self.name, kind, file.folder, (file.name,), number, version=at, size=size, identity=identity,
                      partition=file.partition)
            )  # fmt: skip
        return pieces

    def schema(self, piece: Piece, options: Options) -> pa.Schema:
        return _opened(piece).schema().as_arrow()

    def form(self, piece: Piece, options: Options) -> str | None:
        return f"Iceberg table, snapshot {piece.version}"

    def batches(self, piece: Piece, options: Options, only: Sequence[str] | None = None) -> Iterator[Batch]:
        first = 0
        for batch in rows_of(piece, only):
            yield Batch.of_table(batch, first)
            first += batch.num_rows


def open_table(address: str) -> "StaticTable":
    """Opens a table by its newest metadata file.

    Raises:
        InputError: pyiceberg is not installed, or cannot read the metadata; the message holds its words.
    """
    try:
        from pyiceberg.exceptions import ValidationError
        from pyiceberg.table import StaticTable
    except ImportError as error:
        raise InputError(
            f"{address}: Iceberg tables need a package that is not installed ({error}): pip install 'pplug[iceberg]'"
        ) from error
    root = reading(address)
    found = {name: int(match[1]) for name in root.list("metadata") if (match := _NUMBER.match(name.rpartition("/")[2]))}
    if not found:
        raise InputError(f"{address}: no metadata file of the Iceberg table has a number in its name")
    newest = max(found, key=lambda name: (found[name], name))
    try:
        return StaticTable.from_metadata(root.full(newest))
    except (ValidationError, ValueError, OSError) as error:
        raise InputError(f"{root.full(newest)}: the Iceberg table cannot be opened ({error})") from error


def rows_of(piece: Piece, only: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    """Yields the rows of a table's snapshot, those of earlier commits first.

    Raises:
        OSError: a file of the table cannot be read, or pyiceberg does not know how its deletes are written.
    """
    from pyiceberg.io.pyarrow import ArrowScan, schema_to_pyarrow

    table = _opened(piece)
    if piece.version == -1:
        return
    names = table.schema().as_arrow().names
    columns = ("*",) if only is None else tuple(top_columns(names, only))
    try:
        scan = table.scan(selected_fields=columns, snapshot_id=piece.version)
        commits = _commits(table, scan.snapshot())
        tasks = sorted(scan.plan_files(), key=lambda task: commits[task.file.file_path])  # it lists the newest first
        schema = schema_to_pyarrow(scan.projection())
        found = ArrowScan(table.metadata, table.io, scan.projection(), scan.row_filter).to_record_batches(tasks)
        yield from pa.RecordBatchReader.from_batches(schema, found).cast(schema)
    except (ValueError, NotImplementedError) as error:  # not with its words, which may quote a value
        raise OSError(f"pyiceberg cannot read the table ({type(error).__name__})") from error


def _commits(table: "StaticTable", snapshot: "Snapshot | None") -> dict[str, tuple[int, int]]:
    """Returns what orders the commits of a snapshot's data files, by path: sequence number, and time where a table of
    format version 1 has no such numbers. A commit whose snapshot has expired comes before the others then."""
    times = {one.snapshot_id: one.timestamp_ms for one in table.snapshots()}
    assert snapshot is not None, "the piece has its id from the table"
    return {
        entry.data_file.file_path: (entry.sequence_number or 0, times.get(entry.snapshot_id or 0, 0))
        for manifest in snapshot.manifests(table.io)
        for entry in manifest.fetch_manifest_entry(table.io)
    }


def _opened(piece: Piece) -> "StaticTable":
    return open_table(reading(piece.folder).full(piece.name))
