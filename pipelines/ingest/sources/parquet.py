"""Parquet: one record per row. A file that cannot be read is one reject, since its number of rows is unknown.

A large file is read by several tasks, each of which takes a range of its rows.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import pipelines.ingest.sources.records as records
from infra.storage import Storage
from pipelines.ingest.sources.base import UNREADABLE, Piece
from pipelines.ingest.sources.records import DAMAGED, Batch, RecordFormat
from pipelines.ingest.values import RowError

_BATCH_ROWS, _BATCH_BYTES = 8192, 4 * 2**20


class Parquet(RecordFormat):
    """Parquet files with any columns."""

    name = "parquet"
    suffixes = (".parquet",)
    place = " row "

    def parts(self, storage: Storage, name: str) -> list[tuple[int, int | None]]:
        size = storage.size(name)
        if size <= records.PIECE_BYTES:
            return [(0, None)]
        try:
            with storage.open_input(name) as stream:
                rows = pq.read_metadata(stream).num_rows
        except DAMAGED:
            return [(0, None)]
        step = max(1, rows // -(-size // records.PIECE_BYTES))
        starts = range(0, rows, step)
        return list(zip(starts, [*starts[1:], None], strict=True))

    def columns(self, piece: Piece) -> set[str]:
        try:
            with Storage(piece.folder).open_input(piece.name) as stream:
                return set(pq.read_schema(stream).names)
        except DAMAGED:
            return set()  # the task that reads the file sets it aside

    def batches(self, piece: Piece) -> Iterator[Batch]:
        with Storage(piece.folder).open_input(piece.name) as stream:
            file = pq.ParquetFile(stream, page_checksum_verification=True)
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                twice = sorted({name for name in names if names.count(name) > 1})
                raise RowError(UNREADABLE, f"several columns have the name {', '.join(twice[:5])}")
            for first, table in _tables(file, piece.start, piece.end):
                seq = np.arange(len(table), dtype=np.int64) + first
                yield Batch({name: table[name] for name in names}, seq)


def _tables(file: pq.ParquetFile, start: int, end: int | None) -> Iterator[tuple[int, pa.Table]]:
    """Yields the rows [start, end) of a file, some megabytes at a time, each with the number of its first row."""
    first = 0
    for group in range(file.num_row_groups):
        about = file.metadata.row_group(group)
        if first + about.num_rows > start and (end is None or first < end):
            row_bytes = about.total_byte_size / max(1, about.num_rows)
            rows = int(min(_BATCH_ROWS, max(1, _BATCH_BYTES / max(1.0, row_bytes))))
            at = first
            for batch in file.iter_batches(batch_size=rows, row_groups=[group]):
                skipped = min(len(batch), max(0, start - at))
                taken = len(batch) - skipped if end is None else max(0, min(len(batch), end - at) - skipped)
                if taken > 0:
                    yield at + skipped, pa.table(batch.slice(skipped, taken))
                at += len(batch)
                if end is not None and at >= end:
                    break
        first += about.num_rows
