"""Rows of a source as the tables would get them, without Ray: found, looked at, read in pieces, checked."""

import pyarrow as pa

from pipelines.ingest.config import IngestConfig
from pipelines.ingest.look import options_of
from pipelines.ingest.source_rows import RowWriter
from pipelines.ingest.sources.base import FORMATS, find
from pplug.tasks import TaskSpec


def parsed(config: IngestConfig, task: dict) -> pa.Table:
    """Rows of `source_rows.ROWS`, of all pieces of the items' source."""
    options = options_of(config)
    source, found = find(config.source, config.format, options), []
    for number, file in enumerate(source.files):
        format = FORMATS[file.format]
        pieces = format.pieces([file], "items", options, number)
        format.check(pieces, options)
        for piece in pieces:
            writer = RowWriter(TaskSpec(**task), 4, piece.file, options.rules, piece.start)
            found += [writer.take() for _ in format.read(piece, options, None, writer)] + [writer.take()]
    return pa.concat_tables(found)
