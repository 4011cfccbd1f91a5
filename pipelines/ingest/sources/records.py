"""Formats with one record per history item or request, whose columns a mapping names.

A source is a file or a folder of files. A format says which files are its own, which columns they have and which
records a piece of them holds; everything else is here.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import pyarrow as pa

from infra.errors import InputError
from infra.storage import Storage
from pipelines.ingest.source_rows import RowError, RowWriter
from pipelines.ingest.sources.base import UNREADABLE, Format, Kind, Options, Piece

NEEDED: dict[Kind, tuple[str, ...]] = {
    "items": ("user_id", "item_id"),
    "requests": ("request_id", "user_id", "input"),
}
OPTIONAL: dict[Kind, tuple[str, ...]] = {
    "items": ("occurred_at", "fields"),
    "requests": ("as_of", "target", "owner_id"),
}
PIECE_BYTES = 32 * 2**20
Record = Mapping[str, Any] | Callable[[], Mapping[str, Any]]
"""A record, or a call that returns it and may raise RowError."""


class RecordFormat(Format):
    """A format with one record per row."""

    place: ClassVar[str]
    """Text between a file's name and a record's number in the place that a reject names."""

    def divisible(self, name: str) -> bool:
        """Says whether several tasks may read parts of a file."""
        return False

    @abstractmethod
    def columns(self, piece: Piece) -> set[str]:
        """Returns the columns at the beginning of a piece's file; none where it cannot be read."""

    @abstractmethod
    def records(self, piece: Piece) -> Iterator[tuple[int, Record]]:
        """Yields number and content of each record of a piece, in the order given."""

    def find(self, source: str, kind: Kind, options: Options, first_file: int = 0) -> list[Piece]:
        """Lists the files of a source, in parts. Raises InputError: it does not exist, or has no file of the format."""
        parent, _, last = source.rstrip("/").rpartition("/")
        single = source.endswith(self.suffixes) and last in Storage(parent or ".").list(recursive=False)
        storage = Storage(parent or ".") if single else Storage(source)
        names = [last] if single else [name for name in storage.list() if name.endswith(self.suffixes)]
        if not names:
            why = "it does not exist" if single or not storage.exists() else "nothing there has such a name"
            expected = f"expected a file or folder of {', '.join(self.suffixes)}"
            raise InputError(f"{source}: no {self.name} file ({why}); {expected}")
        pieces = []
        for file, name in enumerate(names, start=first_file):
            size = storage.size(name) if self.divisible(name) else 0
            starts = range(0, size, PIECE_BYTES) if size > PIECE_BYTES else [0]
            for start, end in zip(starts, [*starts[1:], None], strict=True):
                pieces.append(Piece(self.name, kind, storage.uri, (name,), file, start, end))
        return pieces

    def check(self, pieces: Sequence[Piece], options: Options) -> None:
        """Looks for the needed columns in the first file. Raises InputError: one is missing; it lists those there."""
        piece, existing = pieces[0], self.columns(pieces[0])
        wanted = {name: options.columns.get(name, name) for name in NEEDED[piece.kind]}
        missing = [column for column in wanted.values() if column not in existing]
        if existing and missing:
            name = next(name for name, column in wanted.items() if column == missing[0])
            raise InputError(
                f"{piece.folder}/{piece.name}: no column {missing[0]!r} for {name}; it has "
                f"{', '.join(sorted(existing)[:20])}; name the right one with --columns {name}=COLUMN"
            )

    def read(self, piece: Piece, options: Options, survey: Any, writer: RowWriter) -> Iterator[None]:
        """Hands every record of the piece to the writer; yields when the writer is full."""
        put = _put_item if piece.kind == "items" else _put_request
        try:
            for seq, record in self.records(piece):
                writer.planned()
                place = f"{piece.name}{self.place}{seq}"
                try:
                    put(record() if callable(record) else record, options.columns, writer, seq, place)
                except RowError as error:
                    writer.reject(seq, place, error)
                if writer.full:
                    yield
        except (pa.ArrowException, OSError, EOFError) as error:
            writer.planned()
            writer.reject(0, piece.name, RowError(UNREADABLE, f"{type(error).__name__}: damaged or cut off"))


def _put_item(record: Mapping[str, Any], columns: Mapping[str, str], writer: RowWriter, seq: int, place: str) -> None:
    core = {name: columns.get(name, name) for name in (*NEEDED["items"], *OPTIONAL["items"])}
    named = {name: column for name, column in columns.items() if name not in core}
    given = record.get(core["fields"])
    fields: dict[str, Any] = dict(given) if isinstance(given, dict | list) else {}
    if named:
        fields |= {name: record.get(column) for name, column in named.items()}
    elif not fields:
        fields = {name: value for name, value in record.items() if name not in core.values()}
    writer.item(
        seq, place, record.get(core["user_id"]), record.get(core["item_id"]), record.get(core["occurred_at"]), fields
    )


def _put_request(
    record: Mapping[str, Any], columns: Mapping[str, str], writer: RowWriter, seq: int, place: str
) -> None:
    def get(name: str) -> Any:
        return record.get(columns.get(name, name))

    writer.request(
        seq, place, get("request_id"), get("user_id"), get("input"),
        owner_id=get("owner_id"), as_of=get("as_of"), target=get("target"),
    )  # fmt: skip
