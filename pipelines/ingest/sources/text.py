"""Plain text, such as chat exports and logs: one row per line, for a query that takes the lines apart."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from pipelines.ingest.sources.base import DAMAGED, Options, Piece, opened
from pipelines.ingest.sources.records import BATCH_BYTES, BATCH_ROWS, Batch, RecordFormat, refuse_content

_COLUMNS = pa.schema([("line", pa.string()), ("number", pa.int64())])


class Text(RecordFormat):
    """Files of lines in UTF-8, with the columns `line` and `number`; read only where `format` says text."""

    name = "text"
    suffixes = (".txt", ".log", ".xml")
    aloof = True
    place = " line "

    def schema(self, piece: Piece, options: Options) -> pa.Schema:
        refuse_content(piece, "text")
        return _COLUMNS

    def batches(self, piece: Piece, options: Options, only: Sequence[str] | None = None) -> Iterator[Batch]:
        refuse_content(piece, "text")
        with opened(piece.folder, piece.name) as stream:
            first, size, lines = 1, 0, list[str]()
            try:
                for line in stream:
                    text = line.decode("utf-8-sig" if first == 1 and not lines else "utf-8", "surrogateescape")
                    lines.append(text.rstrip("\r\n"))
                    size += len(line)
                    if len(lines) >= BATCH_ROWS or size >= BATCH_BYTES:
                        yield _batch(lines, first)
                        first, size, lines = first + len(lines), 0, []
            except DAMAGED:
                yield _batch(lines, first)
                raise
            yield _batch(lines, first)


def _batch(lines: list[str], first: int) -> Batch:
    number = np.arange(first, first + len(lines))
    return Batch({"line": lines, "number": pa.array(number)}, number, number, lines=len(lines))
