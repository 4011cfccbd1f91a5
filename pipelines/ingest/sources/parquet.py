"""Parquet, by pyarrow. A file that cannot be read is one reject, since its number of rows is unknown.

A large file is divided by row groups, and a large row group into up to four ranges of rows, because most writers make
one group of a million rows; each range belongs to the piece that it begins in. A range is unpacked from the beginning
of its group, which costs little beside the checks of its rows. Checksums of pages are verified where the writer has
stored them.
"""

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

import pipelines.ingest.sources.records as records
from infra.remote import reading
from pipelines.ingest.sources.base import COLUMNS_PACKED_BY, Options, Piece
from pipelines.ingest.sources.columns import refuse_duplicates, top_columns
from pipelines.ingest.sources.discover import File
from pipelines.ingest.sources.records import BATCH_BYTES, BATCH_ROWS, Batch, RecordFormat, refuse_content

_MOST_PARTS = 4
"""Greatest number of ranges that one row group is divided into."""


class Parquet(RecordFormat):
    """Parquet files with any columns, nested ones too."""

    name = "parquet"
    packed_by = COLUMNS_PACKED_BY
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
                low, high = _range(about, begins, piece)
                if low < high:
                    width = max(1, about.total_byte_size // max(1, about.num_rows))
                    rows = min(BATCH_ROWS, max(1, BATCH_BYTES // width))
                    at = 0
                    for batch in file.iter_batches(rows, [group], columns, use_threads=False):
                        begin, end = max(low, at), min(high, at + len(batch))
                        if begin < end:
                            yield Batch.of_table(batch.slice(begin - at, end - begin), first + begin)
                        at += len(batch)
                        if at >= high:
                            break
                first += about.num_rows


def _range(group: pq.RowGroupMetaData, begins: int, piece: Piece) -> tuple[int, int]:
    """Returns the first row of a group that a piece reads, and the one after the last; none where they are equal."""
    size = sum(group.column(at).total_compressed_size for at in range(group.num_columns))
    parts = min(_MOST_PARTS, max(1, -(-size // records.PIECE_BYTES)))
    starts = [begins + part * size // parts for part in range(parts)]
    mine = [at for at, start in enumerate(starts) if piece.start <= start and (piece.end is None or start < piece.end)]
    if not mine:
        return 0, 0
    return group.num_rows * mine[0] // parts, group.num_rows * (mine[-1] + 1) // parts


def _begins(group: pq.RowGroupMetaData) -> int:
    """Returns the byte at which a row group begins."""
    column = group.column(0)
    return min(at for at in (column.dictionary_page_offset, column.data_page_offset) if at)
