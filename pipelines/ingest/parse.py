"""Stage: reads a piece of a source and gives its rows, checked, as Arrow tables of `source_rows.ROWS`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray

from pipelines.ingest.source_rows import RowWriter
from pipelines.ingest.sources.base import FORMATS, Options, Piece
from pplug.tasks import TaskSpec


@dataclass(frozen=True)
class ParsePieces:
    """in: index of a piece; out: its rows, a few megabytes at a time, so that no task holds its whole file."""

    task: TaskSpec
    buckets: int
    pieces: tuple[Piece, ...]
    options: Options
    survey: Any
    """Reference to the format's survey in the object store, where the tasks read it; None without a survey."""

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for index in batch["piece"].to_pylist():
            piece = self.pieces[index]
            format = FORMATS[piece.format]
            writer = RowWriter(self.task, self.buckets, piece.file, self.options.rules, piece.start)
            survey = ray.get(self.survey) if format.surveys else None
            for _ in format.read(piece, self.options, survey, writer):
                yield writer.take()
            yield writer.take()
