"""Stage: reads a piece of a source and gives its rows, checked, as Arrow tables of `rows.ROWS`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines.ingest.source_rows import RowWriter
from pipelines.ingest.sources import lamp, records
from pipelines.ingest.sources.lamp import LampFiles
from pipelines.ingest.sources.records import Piece
from pplug.tasks import TaskEntry


@dataclass(frozen=True)
class ParsePieces:
    """in: index of a piece; out: its rows, a few megabytes at a time, so that no task holds its whole file."""

    entry: TaskEntry
    buckets: int
    pieces: tuple[Piece | LampFiles, ...]
    columns: Mapping[str, str]
    survey: Any
    """Reference to the `Survey` of a LaMP split in the object store, where the tasks read it."""
    keep_questions: bool

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for index in batch["piece"].to_pylist():
            piece = self.pieces[index]
            if isinstance(piece, LampFiles):
                import ray

                writer = RowWriter(self.entry, self.buckets, file=0)
                rows = lamp.read(piece, ray.get(self.survey), writer, self.keep_questions)
            else:
                writer = RowWriter(self.entry, self.buckets, piece.file)
                rows = records.read(piece, self.columns, writer)
            for _ in rows:
                yield writer.take()
            yield writer.take()
