"""Formats with one record per history item or request, whose columns a mapping names.

A format says which files are its own, which columns they have and which records a piece of them holds; everything else
is here. `RowFormat` is for formats whose records come one by one, `columns.ColumnFormat` for those that come as Arrow
columns.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import pyarrow as pa

from infra.errors import InputError
from infra.remote import reading
from pipelines.ingest.source_rows import RowError, RowWriter
from pipelines.ingest.sources.base import DAMAGED, UNREADABLE, Format, Head, Kind, Options, Piece
from pipelines.ingest.sources.discover import File

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

    def divisible(self, file: File, options: Options) -> bool:
        """Says whether several tasks may read parts of a file."""
        return False

    def pieces(self, files: Sequence[File], kind: Kind, options: Options, first_file: int = 0) -> list[Piece]:
        """Divides large files among tasks, where their format allows it."""
        pieces = []
        for number, file in enumerate(files, start=first_file):
            large = file.size > PIECE_BYTES and self.divisible(file, options)
            starts = range(0, file.size, PIECE_BYTES) if large else [0]
            for start, end in zip(starts, [*starts[1:], None], strict=True):
                names = (file.name,)
                pieces.append(Piece(self.name, kind, file.folder, names, number, start, end, file.partition))
        return pieces

    def check(self, pieces: Sequence[Piece], options: Options) -> None:
        """Looks for the needed columns in the first file. Raises InputError: one is missing; it lists those there."""
        piece = pieces[0]
        head = self.head(piece, options, _LOOKED_AT)
        existing = paths(head.columns)
        mapping = options.mapping(piece.kind)
        wanted = {name: mapping.get(name, name) for name in NEEDED[piece.kind]}
        missing = [column for column in wanted.values() if column not in existing]
        if existing and missing:
            name = next(name for name, column in wanted.items() if column == missing[0])
            key = "requests-columns" if piece.kind == "requests" and options.requests_columns else "columns"
            raise InputError(
                f"{piece.folder}/{piece.name}: no column {missing[0]!r} for {name}; it has "
                f"{', '.join(sorted(head.columns.names)[:20])}; name the right one with --{key} {name}=COLUMN"
            )


_LOOKED_AT = 100
"""Number of records in which a source's columns are looked for."""


def paths(columns: pa.Schema) -> set[str]:
    """Returns every name by which a mapping may reach a value: columns, and fields of structs by their paths."""
    found: set[str] = set()

    def add(above: str, fields: Sequence[pa.Field]) -> None:
        for field in fields:
            found.add(f"{above}{field.name}")
            if pa.types.is_struct(field.type):
                add(f"{above}{field.name}.", list(field.type))

    add("", list(columns))
    return found


def named_fields(mapping: Mapping[str, str], kind: Kind = "items") -> dict[str, str]:
    """Returns the part of a mapping that names fields of items, apart from our own columns."""
    core = (*NEEDED[kind], *OPTIONAL[kind])
    return {name: column for name, column in mapping.items() if name not in core}


class RowFormat(RecordFormat):
    """A format whose records come one by one."""

    @abstractmethod
    def records(self, piece: Piece, options: Options) -> Iterator[tuple[int, str, Record]]:
        """Yields number, place within the file and content of each record of a piece, in the order given."""

    def head(self, piece: Piece, options: Options, rows: int) -> Head:
        first: list[dict[str, Any]] = []
        try:
            for _, _, record in islice(self.records(replace(piece, start=0, end=None), options), rows):
                try:
                    first += (dict(one) for one in _exploded(_read(record), piece, options.explode))
                except RowError:  # set aside when it is read
                    pass
        except DAMAGED:
            pass
        return Head(_columns(first), first[:rows])

    def read(self, piece: Piece, options: Options, survey: Any, writer: RowWriter) -> Iterator[None]:
        """Hands every record of the piece to the writer; yields when the writer is full."""
        put = _put_item if piece.kind == "items" else _put_request
        mapping = options.mapping(piece.kind)
        explode = options.explode if piece.kind == "items" else None
        try:
            for seq, where, record in self.records(piece, options):
                place = f"{piece.name}{where}"
                try:
                    whole = _read(record)
                    several = _exploded(whole, piece, explode)
                except RowError as error:
                    writer.planned()
                    writer.reject(seq, place, error)
                    continue
                for number, one in enumerate(several, start=1):
                    writer.planned()
                    at = f"{place} item {number}" if explode else place
                    try:
                        put(one, mapping, writer, seq, at)
                    except RowError as error:
                        writer.reject(seq, at, error)
                    if writer.full:
                        yield
        except DAMAGED as error:
            reject_file(piece, error, writer)


def reject_file(piece: Piece, error: Exception, writer: RowWriter) -> None:
    """Adds the one reject of a file that cannot be read to its end; the rows before stay."""
    said = str(error) if isinstance(error, NotThisFormat) else f"{type(error).__name__}: damaged or cut off"
    writer.planned()
    writer.reject(0, piece.name, RowError(UNREADABLE, said))


class NotThisFormat(OSError):
    """A file that is not what its name says. Its message holds nothing of the file's text."""


def refuse_content(piece: Piece, wanted: str) -> None:
    """Raises NotThisFormat: the first bytes are those of another kind of file."""
    with reading(piece.folder).open_input(piece.name) as stream:
        first = bytes(stream.read(8))
    other = next((kind for magic, kind in _OTHERS.items() if first.startswith(magic)), None)
    if other is not None and other != wanted:
        raise NotThisFormat(f"the content is {other} and not {wanted}, whatever the name says")


_OTHERS = {
    b"PAR1": "Parquet",
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"ARROW1": "an Arrow file",
    b"SQLite f": "an SQLite database",
    b"%PDF": "PDF",
    b"ORC": "ORC",
    b"Obj\x01": "Avro",
}


def _read(record: Record) -> Mapping[str, Any]:
    return record() if callable(record) else record


def _exploded(record: Mapping[str, Any], piece: Piece, column: str | None) -> list[Mapping[str, Any]]:
    """Returns a record with the columns of its folders, once per element of the column that holds a list."""
    whole = {**dict(piece.partition), **record} if piece.partition else record
    if column is None or piece.kind == "requests":
        return [whole]
    found = value_at(whole, column)
    if found is None:
        return []
    if not isinstance(found, list):
        raise RowError("wrong_type", f"the column {column} to explode is no list")
    rows: list[Mapping[str, Any]] = []
    for element in found:
        inside = element if isinstance(element, Mapping) else {}
        rows.append({**inside, **{name: value for name, value in whole.items() if name != column}, column: element})
    return rows


def value_at(record: Mapping[str, Any], column: str) -> Any:
    """Returns the value of a column, or at a path into structs such as actor.login; None where it is not there."""
    if column in record or "." not in column:
        return record.get(column)
    first, _, rest = column.partition(".")
    below = record.get(first)
    return value_at(below, rest) if isinstance(below, Mapping) else None


def _columns(rows: Sequence[Mapping[str, Any]]) -> pa.Schema:
    """Returns the columns of JSON records; a column of several types is text."""
    names = dict.fromkeys(name for row in rows for name in row)
    fields = []
    for name in names:
        try:
            fields.append((name, pa.array([row.get(name) for row in rows]).type))
        except (pa.ArrowException, OverflowError, UnicodeError):
            fields.append((name, pa.string()))
    return pa.schema(fields)


def _put_item(record: Mapping[str, Any], columns: Mapping[str, str], writer: RowWriter, seq: int, place: str) -> None:
    core = {name: columns.get(name, name) for name in (*NEEDED["items"], *OPTIONAL["items"])}
    named = named_fields(columns)
    given = value_at(record, core["fields"])
    fields: dict[str, Any] = dict(given) if isinstance(given, dict | list) else {}
    if named:
        fields |= {name: value_at(record, column) for name, column in named.items()}
    elif not fields:
        fields = {name: value for name, value in record.items() if name not in core.values()}
    user, item, at = (value_at(record, core[name]) for name in ("user_id", "item_id", "occurred_at"))
    writer.item(seq, place, user, item, at, fields)


def _put_request(
    record: Mapping[str, Any], columns: Mapping[str, str], writer: RowWriter, seq: int, place: str
) -> None:
    def get(name: str) -> Any:
        return value_at(record, columns.get(name, name))

    writer.request(
        seq, place, get("request_id"), get("user_id"), get("input"),
        owner_id=get("owner_id"), as_of=get("as_of"), target=get("target"),
    )  # fmt: skip
