"""Delta tables, read through their log by deltalake: rows that a delete or an overwrite has removed are not there.

Rows come in the order of the commits, so that a correction by append is the last row of its key. It is the order of the
files' times: a file that a delete, an update or a compaction has written again counts as written then. A table with
deletion vectors or mapped columns is read by deltalake's own engine, which promises no order: items without a time are
then ordered by chance.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.fs as pafs

from infra import addresses
from infra.errors import InputError
from infra.remote import reading
from infra.storage import Storage
from pipelines.ingest.sources.base import COLUMNS_PACKED_BY, Kind, Options, Piece
from pipelines.ingest.sources.columns import refuse_duplicates, top_columns
from pipelines.ingest.sources.discover import File
from pipelines.ingest.sources.records import BATCH_ROWS, Batch, RecordFormat

if TYPE_CHECKING:
    from deltalake import DeltaTable


_NUMBER = re.compile(r"part-(\d+)")


class Delta(RecordFormat):
    """Folders with a `_delta_log`: the rows of the newest version at the time of the look."""

    name = "delta"
    packed_by = COLUMNS_PACKED_BY

    def pieces(self, files: Sequence[File], kind: Kind, options: Options, first_file: int = 0) -> list[Piece]:
        pieces = []
        for number, file in enumerate(files, start=first_file):
            table = open_table(file.address)
            size = sum(action["size_bytes"] for action in files_of(table).values())
            identity = f"Delta table {table.metadata().id}, version {table.version()}"
            pieces.append(
                Piece(self.name, kind, file.folder, (file.name,), number, version=table.version(), size=size,
                      identity=identity, partition=file.partition)
            )  # fmt: skip
        return pieces

    def schema(self, piece: Piece, options: Options) -> pa.Schema:
        return _rows(piece, None)[1]

    def form(self, piece: Piece, options: Options) -> str | None:
        return f"Delta table, version {piece.version}"

    def batches(self, piece: Piece, options: Options, only: Sequence[str] | None = None) -> Iterator[Batch]:
        first = 0
        for batch in _rows(piece, only)[0]:
            yield Batch.of_table(batch, first)
            first += batch.num_rows


def open_table(address: str, version: int | None = None) -> "DeltaTable":
    """Opens a Delta table at its newest version, or at the one given.

    Raises:
        InputError: it cannot be opened; the message holds deltalake's words.
    """
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError

    addresses.refuse_misread(address)
    try:
        return DeltaTable(address, version=version, storage_options=reading(address).delta_options())
    except (DeltaError, OSError) as error:
        raise InputError(f"{address}: the Delta table cannot be opened ({error})") from error


def _rows(piece: Piece, only: Sequence[str] | None) -> tuple[Any, pa.Schema]:
    """Returns the rows of a table as an iterator of Arrow batches, and the columns of the whole table."""
    root = reading(piece.folder).join(piece.name)
    rows = rows_of(open_table(root.uri, piece.version), root)
    refuse_duplicates(rows.schema.names)
    columns = None if only is None else top_columns(rows.schema.names, only)
    if isinstance(rows, pads.Dataset):
        return rows.to_batches(columns=columns, batch_size=BATCH_ROWS, use_threads=False), rows.schema
    return (batch if columns is None else batch.select(columns) for batch in rows), rows.schema


def rows_of(table: "DeltaTable", root: Storage) -> pads.Dataset | pa.RecordBatchReader:
    """Returns the rows of a table's version: as a dataset with its files in the order of their commits, or as a stream
    without an order where Arrow cannot read such a table.

    Raises:
        OSError: deltalake cannot read it either.
    """
    from deltalake.exceptions import DeltaError, DeltaProtocolError

    try:
        try:
            # Without a file system, Arrow's threads would call deltalake's through Python, also while Python ends.
            rows = table.to_pyarrow_dataset(filesystem=pafs.SubTreeFileSystem(root.path, root.filesystem))
        except DeltaProtocolError:
            return pa.RecordBatchReader.from_stream(table.scan())
    except DeltaError as error:
        raise OSError(f"deltalake cannot read the table ({type(error).__name__})") from error
    place = {unquote(path): number for number, path in enumerate(in_order(files_of(table)))}
    parts = sorted(rows.get_fragments(), key=lambda part: place[part.path])
    return pads.FileSystemDataset(parts, rows.schema, rows.format, rows.filesystem)


def files_of(table: "DeltaTable") -> dict[str, dict[str, Any]]:
    """Returns the add actions of a table's version by path, as the log gives them."""
    return {action["path"]: action for action in pa.table(table.get_add_actions(flatten=True)).to_pylist()}


def in_order(files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the paths of add actions in the order of their commits.

    Files of one millisecond are those of one commit, numbered by their writer, or commits that followed each other at
    once: the log gives these newest first.
    """

    def key(at: int, path: str) -> tuple[int, int, int]:
        number = _NUMBER.match(path.rpartition("/")[2])
        return files[path]["modification_time"], int(number[1]) if number else 0, -at

    return [path for _, path in sorted(enumerate(files), key=lambda one: key(*one))]
