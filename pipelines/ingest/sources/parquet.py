"""Parquet, by pyarrow. A file that cannot be read is one reject, since its number of rows is unknown.

A large file is divided by row groups; each belongs to the piece that it begins in. Checksums of pages are verified
where the writer has stored them.
"""

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from infra.remote import reading
from pipelines.ingest.sources.base import Options, Piece
from pipelines.ingest.sources.columns import refuse_duplicates, top_columns
from pipelines.ingest.sources.discover import File
from pipelines.ingest.sources.records import BATCH_BYTES, BATCH_ROWS, Batch, RecordFormat, refuse_content


class Parquet(RecordFormat):
    """Parquet files with any columns, nested ones too."""

    name = "parquet"
    suffixes = (".parquet", ".pq", ".parq")

    def divisible(self, file: File, options: Options) -> bool:
        return True

    def schema(self, piece: Piece, options: Options) -> pa.Schema:
        refuse_content(piece, "Parquet")
        with reading(piece.folder).open_input(piece.name) as stream:
            schema = pq.read_schema(stream)
        refuse_duplicates(schema.names)
        return schema

    def batches(self, piece: Piece, options: Options, only: Sequence[str] | None = None) -> Iterator[Batch]:
        refuse_content(piece, "Parquet")
        with reading(piece.folder).open_input(piece.name) as stream:
            file = pq.ParquetFile(stream, page_checksum_verification=True)
            names = file.schema_arrow.names
            refuse_duplicates(names)
            columns = None if only is None else top_columns(names, only)
            first = 0
            for group in range(file.num_row_groups):
                about = file.metadata.row_group(group)
                begins = _begins(about) if file.num_row_groups > 1 else 0
                if piece.start <= begins and (piece.end is None or begins < piece.end):
                    width = max(1, about.total_byte_size // max(1, about.num_rows))
                    rows = min(BATCH_ROWS, max(1, BATCH_BYTES // width))
                    at = first
                    for batch in file.iter_batches(rows, [group], columns, use_threads=False):
                        yield Batch.of_table(batch, at)
                        at += batch.num_rows
                first += about.num_rows


def _begins(group: pq.RowGroupMetaData) -> int:
    """Returns the byte at which a row group begins."""
    column = group.column(0)
    return min(at for at in (column.dictionary_page_offset, column.data_page_offset) if at)
