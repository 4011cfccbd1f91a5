"""Parquet: one record per row. A file that cannot be read is one reject, since its number of rows is unknown."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.remote import reading
from pipelines.ingest.sources.base import Options, Piece
from pipelines.ingest.sources.records import Record, RowFormat


class Parquet(RowFormat):
    """Parquet files with any columns."""

    name = "parquet"
    suffixes = (".parquet",)

    def records(self, piece: Piece, options: Options) -> Iterator[tuple[int, str, Record]]:
        with reading(piece.folder).open_input(piece.name) as stream:
            row = 0
            for batch in pq.ParquetFile(stream).iter_batches(batch_size=4096):
                for record in _rows(pa.table(batch)):
                    yield row, f" row {row}", record
                    row += 1


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Yields the rows of a batch. Text that is not UTF-8 comes as bytes, so that its row alone fails."""
    columns = {}
    for name in table.column_names:
        column = table[name]
        if pa.types.is_timestamp(column.type):
            column = pc.cast(column, pa.timestamp("us", tz=column.type.tz), safe=False)
        try:
            columns[name] = column.to_pylist()
        except UnicodeDecodeError:
            columns[name] = column.cast(_as_bytes(column.type)).to_pylist()
    for at in range(len(table)):
        yield {name: values[at] for name, values in columns.items()}


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    return pa.map_(pa.binary(), pa.binary()) if pa.types.is_map(kind) else pa.large_binary()
