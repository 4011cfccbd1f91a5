"""LaMP: one split of a folder as the benchmark publishes it; each question has a history, its profile, of its own."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from infra.remote import reading
from infra.storage import Storage
from pipelines.ingest.source_rows import RowWriter
from pipelines.ingest.sources.base import Format, Kind, Options, Piece
from pipelines.ingest.sources.discover import File
from pipelines.ingest.sources.lamp_files import LampFiles, Survey, find, golds, read
from pipelines.ingest.sources.lamp_survey import survey
from pplug.tasks import TaskSpec

_QUESTIONS = re.compile(r"_questions\.json(\.gz)?$")


class Lamp(Format):
    """A folder with questions and golds; `lamp_files.LAYOUT` describes it."""

    name = "lamp"
    kinds = ("items",)
    asks = True
    surveys = True

    def claims(self, address: str, format: str) -> bool:
        if format != "auto" or "://" in address and not address.startswith("s3://"):
            return format == self.name
        storage = Storage(address)
        return any(_QUESTIONS.search(name) for name in storage.list(recursive=False)) if storage.is_folder() else False

    def pieces(self, files: Sequence[File], kind: Kind, options: Options, first_file: int = 0) -> list[Piece]:
        split = find(files[0].folder, options.split)
        names = (split.questions,) if split.outputs is None else (split.questions, split.outputs)
        return [Piece(self.name, kind, split.folder, names, first_file, size=reading(split.folder).size(names[0]))]

    def check(self, pieces: Sequence[Piece], options: Options) -> str | None:
        return golds(_files(pieces[0]))[0]

    def survey(self, piece: Piece, entry: TaskSpec, options: Options) -> tuple[str | None, Survey]:
        return survey(_files(piece), entry, options)

    def read(self, piece: Piece, options: Options, survey: Any, writer: RowWriter) -> Iterator[None]:
        return read(_files(piece), survey, writer, options.keep_questions)


def _files(piece: Piece) -> LampFiles:
    questions, *outputs = piece.files
    return LampFiles(piece.folder, questions, outputs[0] if outputs else None)
