"""LaMP: one split of a folder as the benchmark publishes it; each question has a history, its profile, of its own."""

from collections.abc import Iterator, Sequence
from typing import Any

from pipelines.ingest.source_rows import RowWriter
from pipelines.ingest.sources.base import Format, Kind, Options, Piece
from pipelines.ingest.sources.lamp_files import LampFiles, Survey, find, golds, read
from pipelines.ingest.sources.lamp_survey import survey
from pplug.tasks import TaskSpec


class Lamp(Format):
    """A folder with questions and golds; `lamp_files.LAYOUT` describes it."""

    name = "lamp"
    kinds = ("items",)
    asks = True
    surveys = True

    def find(self, source: str, kind: Kind, options: Options, first_file: int = 0) -> list[Piece]:
        files = find(source, options.split)
        names = (files.questions,) if files.outputs is None else (files.questions, files.outputs)
        return [Piece(self.name, kind, files.folder, names, first_file)]

    def check(self, pieces: Sequence[Piece], options: Options) -> str | None:
        return golds(_files(pieces[0]))[0]

    def survey(self, piece: Piece, entry: TaskSpec, options: Options) -> tuple[str | None, Survey]:
        return survey(_files(piece), entry, options.history_scope, options.rules.time)

    def read(self, piece: Piece, options: Options, survey: Any, writer: RowWriter) -> Iterator[None]:
        return read(_files(piece), survey, writer, options.keep_questions)


def _files(piece: Piece) -> LampFiles:
    questions, *outputs = piece.files
    return LampFiles(piece.folder, questions, outputs[0] if outputs else None)
