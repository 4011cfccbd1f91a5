"""Formats with one record per history item or request, whose columns a mapping names.

A format says which columns its files have and which records a piece of them holds; everything else is here.
"""

import re
from abc import abstractmethod
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.errors import InputError
from infra.remote import reading
from pipelines.ingest.source_rows import CORE, RowWriter
from pipelines.ingest.sources.base import (
    DAMAGED,
    FORMATS,
    UNREADABLE,
    Format,
    Head,
    Kind,
    NotThisFormat,
    Options,
    Piece,
    is_access_error,
    unreachable,
)
from pipelines.ingest.sources.columns import ELEMENTS, at_path, exploded, names_in_words, paths, plain, schema_of
from pipelines.ingest.sources.discover import File
from pipelines.ingest.times import looks_like_time
from pipelines.ingest.values import Column, RowError, as_array, id_column, values

NEEDED: dict[Kind, tuple[str, ...]] = {
    "items": ("user_id", "item_id"),
    "requests": ("request_id", "user_id", "input"),
    "vectors": CORE["vectors"],
    "gone": CORE["gone"],
}
FIELDS = "fields"
"""Our name of a column that holds an item's fields as a mapping."""
PIECE_BYTES = 32 * 2**20
BATCH_ROWS, BATCH_BYTES = 8192, 4 * 2**20
"""Rows and bytes that a format hands over at once, roughly."""
INDEX_NAME = re.compile(r"__index_level_\d+__|Unnamed: \d+")
"""Columns that pandas adds to number the rows; they are no field unless they are mapped to one."""
_KEPT_NAMES = 200
_LOOKED_AT = 100
"""Number of records in which a source's columns are looked for."""


@dataclass
class Batch:
    """Some records of a piece, by column."""

    columns: Mapping[str, Column]
    """Values by the source's name of the column; every column has a value or null per record."""
    seq: np.ndarray
    """(N,) int64, the records' order in their file; the format's `place` and it make the name of a row."""
    line: np.ndarray | None = None
    """(N,) int64, each record's line within the piece, from 1; None in a format without lines."""
    bad: list[tuple[int, RowError, int | None, str | None]] = field(default_factory=list)
    """Records that are none: seq, error, line and text."""
    lines: int = 0
    """Number of lines read for this batch, empty ones too."""

    @classmethod
    def of_table(cls, table: pa.Table | pa.RecordBatch, first: int) -> "Batch":
        """Makes a batch of Arrow columns, whose rows are counted from `first`."""
        columns = {name: table.column(at) for at, name in enumerate(table.schema.names)}
        return cls(columns, np.arange(first, first + table.num_rows))


class RecordFormat(Format):
    """A format with one record per row."""

    place: ClassVar[str] = " row "
    """Text between a file's name and a record's number in the place that a reject names."""

    def divisible(self, file: File, options: Options) -> bool:
        """Says whether several tasks may read parts of a file: the records that begin in [start, end) of its bytes."""
        return False

    @abstractmethod
    def batches(self, piece: Piece, options: Options, only: Sequence[str] | None = None) -> Iterator[Batch]:
        """Yields the records of a piece in the order given, some megabytes at a time.

        Args:
            only: columns and paths that are needed; None for all. A format may give more.
        """

    def schema(self, piece: Piece, options: Options) -> pa.Schema | None:
        """Returns the columns that a piece's file states; None for a format in which each record has its own.

        Raises:
            OSError, pa.ArrowException: it cannot be read.
        """
        return None

    def form(self, piece: Piece, options: Options) -> str | None:
        """Describes what was found of a file's form, for formats that have a choice."""
        return None

    def place_of(self, piece: Piece, options: Options) -> Callable[[int], str]:
        """Returns the text that names a record in a reject, by its seq."""
        before = f"{piece.name}{self.place}"
        if options.explode and piece.kind == "items":
            return lambda seq: f"{before}{seq // ELEMENTS} item {seq % ELEMENTS}"
        return lambda seq: f"{before}{seq}"

    def pieces(self, files: Sequence[File], kind: Kind, options: Options, first_file: int = 0) -> list[Piece]:
        """Divides large files among tasks, where their format allows it."""
        pieces = []
        for number, file in enumerate(files, start=first_file):
            large = file.size > PIECE_BYTES and self.divisible(file, options)
            starts = range(0, file.size, PIECE_BYTES) if large else [0]
            for start, end in zip(starts, [*starts[1:], None], strict=True):
                names = (file.name,)
                pieces.append(
                    Piece(self.name, kind, file.folder, names, number, start, end, file.partition, size=file.size)
                )
        return pieces

    def head(self, piece: Piece, options: Options, rows: int) -> Head:
        whole, first, columns, form = replace(piece, start=0, end=None), list[dict[str, Any]](), pa.schema([]), None
        try:
            stated = self.schema(whole, options)
            form = self.form(whole, options)
            if stated is not None:
                columns = schema_of(_laid_out(Batch.of_table(stated.empty_table(), 0), whole, options).columns)
            for batch in self.batches(whole, options):
                found = _laid_out(batch, whole, options).columns
                lists = [plain(column) for column in found.values()]
                first += [dict(zip(found, row, strict=True)) for row in zip(*lists, strict=True)]
                if stated is None:
                    more = schema_of({name: column[:_LOOKED_AT] for name, column in found.items()})
                    columns = pa.schema([*columns, *(one for one in more if one.name not in columns.names)])
                if len(first) >= rows:
                    break
        except DAMAGED as error:  # the task that reads the file sets it aside
            if is_access_error(error):
                raise unreachable(piece.folder, piece.name, error) from error
        return Head(columns, first[:rows], form)

    def check(self, pieces: Sequence[Piece], options: Options) -> None:
        """Looks for the needed columns in the first file that has any.

        Raises:
            InputError: one is missing; the message lists those there.
        """
        piece = first_with_columns(pieces, replace(options, explode=None)) or pieces[0]
        if options.explode and piece.kind == "items":
            columns = self.head(piece, replace(options, explode=None), _LOOKED_AT).columns
            if len(columns) and options.explode not in paths(columns):
                raise InputError(
                    f"{piece.folder}/{piece.name}: no column {options.explode!r} to explode; it has "
                    f"{names_in_words(sorted(columns.names))}"
                )
        head = self.head(piece, options, _LOOKED_AT)
        if head.form is not None:
            print(f"ingest: {piece.name}: {head.form}", flush=True)
        existing = paths(head.columns)
        mapping = _applied(options.mapping(piece.kind), piece.kind, existing)
        own = ("vector",) if piece.kind == "items" and options.rules.vectors else ()
        needed = (*NEEDED[piece.kind], *own)
        wanted = {name: mapping.get(name, name) for name in needed}
        if "item_id" not in mapping and piece.kind == "items":  # without the column, ids are made of the rows
            wanted.pop("item_id", None)
        missing = [column for column in wanted.values() if column not in existing]
        if existing and missing:
            name = next(name for name, column in wanted.items() if column == missing[0])
            key = "requests-columns" if piece.kind == "requests" and options.requests_columns else "columns"
            raise InputError(
                f"{piece.folder}/{piece.name}: no column {missing[0]!r} for {name}; it has "
                f"{names_in_words(sorted(head.columns.names))}; name the right one with --{key} {name}=COLUMN"
            )

    def has_ids(self, piece: Piece, options: Options) -> bool:
        columns = self.head(piece, options, _LOOKED_AT).columns
        return "item_id" in options.mapping(piece.kind) or "item_id" in columns.names or not len(columns)

    def read(self, piece: Piece, options: Options, survey: Any, writer: RowWriter) -> Iterator[None]:
        """Hands every record of the piece to the writer; yields when the writer is full.

        Raises:
            OSError: the file cannot be reached, see `is_access_error`; a damaged file is a reject instead.
            InputError: one part of the users is kept, and a request names another owner than its user.
        """
        mapping = options.mapping(piece.kind)
        several = ELEMENTS if options.explode and piece.kind == "items" else 1
        try:
            place = self.place_of(piece, options)  # it may look into the file
            for batch in self.batches(piece, options, _needed(piece.kind, mapping, options)):
                writer.notes.lines += batch.lines
                writer.planned(len(batch.bad))
                for seq, error, line, text in batch.bad:
                    writer.reject(seq, place(seq * several), error, line, text)
                laid = _laid_out(batch, piece, options)
                if options.parted and piece.kind == "requests":
                    _refuse_other_owners(laid.columns, mapping, piece)
                put(laid, piece.kind, mapping, writer, place)
                if writer.full:
                    yield
        except RowError as error:
            writer.planned()
            writer.reject(piece.start, piece.name, error)
        except DAMAGED as error:
            if is_access_error(error) and piece.parts:  # a query has named the file among them
                raise
            if is_access_error(error):
                raise unreachable(piece.folder, piece.name, error) from error
            writer.planned()
            writer.reject(piece.start, piece.name, damage(error))


def _refuse_other_owners(columns: Mapping[str, Column], mapping: Mapping[str, str], piece: Piece) -> None:
    """Raises InputError for requests whose owner is not their user: a hash of the user says which part a row is in."""
    user, owner = (at_path(columns, mapping.get(name, name)) for name in ("user_id", "owner_id"))
    if user is None or owner is None:
        return
    if pc.any(pc.not_equal(id_column(user, "user_id")[0], id_column(owner, "owner_id")[0])).as_py():
        raise InputError(
            f"{piece.folder}/{piece.name}: parts: requests name an owner_id other than their user_id, and parts go by "
            "user_id, so that histories of one person could be in several parts; leave parts and part out, and divide "
            "the files yourself"
        )


def first_with_columns(pieces: Sequence[Piece], options: Options) -> Piece | None:
    """Returns the first piece whose file has columns: Spark's first file is often empty, and damaged ones have none."""
    by_file: dict[tuple[str, str], Piece] = {}
    for piece in pieces:
        by_file.setdefault((piece.folder, piece.name), piece)
    found = (piece for piece in by_file.values() if len(FORMATS[piece.format].head(piece, options, _LOOKED_AT).columns))
    return next(found, None)


def damage(error: Exception) -> RowError:
    """Returns the error of the one reject that stands for a file which cannot be read to its end."""
    said = str(error) if isinstance(error, NotThisFormat) else f"{type(error).__name__}: damaged or cut off"
    if "requires too much memory" in str(error):  # Arrow's word for such a frame, as Reddit's dumps have it
        said = "zstd with a window above 128 MiB: unpack the file with `zstd -d --long=31` and ingest the result"
    return RowError(UNREADABLE, said)


def refuse_content(piece: Piece, wanted: str) -> None:
    """Raises NotThisFormat: the first bytes are those of another kind of file."""
    with reading(piece.folder).open_input(piece.name) as stream:
        first = bytes(stream.read(8))
    other = next((kind for magic, kind in _MAGIC.items() if first.startswith(magic)), None)
    if other is not None and other != wanted:
        raise NotThisFormat(f"the content is {other} and not {wanted}, whatever the name says")


_MAGIC = {
    b"PAR1": "Parquet",
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"ARROW1": "an Arrow file",
    b"SQLite f": "an SQLite database",
    b"%PDF": "PDF",
    b"ORC": "ORC",
    b"Obj\x01": "Avro",
}


def _needed(kind: Kind, mapping: Mapping[str, str], options: Options) -> list[str] | None:
    """Returns the columns that rows need; None for all, as where every column that is not ours becomes a field."""
    core = options.rules.core(kind)
    if kind == "items" and not set(mapping) - {*core, FIELDS, *CORE["requests"]}:
        return None
    names = [mapping.get(name, name) for name in (*core, FIELDS)] + (list(core) if kind == "vectors" else [])
    return list(dict.fromkeys([*names, *mapping.values(), *([options.explode] if options.explode else [])]))


def _applied(mapping: Mapping[str, str], kind: Kind, existing: Container[str]) -> Mapping[str, str]:
    """Returns the mapping for a kind of source. A file of vectors is read by that of the items, whose columns may have
    other names: our own then stand. A list of what has gone is our own."""
    if kind == "vectors":
        return {name: column for name, column in mapping.items() if column in existing or name not in existing}
    return {} if kind == "gone" else mapping


def _laid_out(batch: Batch, piece: Piece, options: Options) -> Batch:
    """Returns a batch with the columns of its folders, and with its list column exploded."""
    columns = dict(batch.columns)
    for name, value in piece.partition:
        if name not in columns:
            columns[name] = pa.repeat(pa.scalar(value, pa.string()), len(batch.seq))
    if not options.explode or piece.kind != "items":
        return replace(batch, columns=columns)
    columns, rows, number = exploded(columns, options.explode)
    line = None if batch.line is None else batch.line[rows]
    return Batch(columns, batch.seq[rows] * ELEMENTS + number, line)


def put(batch: Batch, kind: Kind, mapping: Mapping[str, str], writer: RowWriter, place: Any) -> None:
    """Hands a batch to the writer under our names.

    Without a mapping `fields` and without mapped fields, all columns that are not ours are fields.
    """
    mapping = _applied(mapping, kind, batch.columns)
    core = {name: mapping.get(name, name) for name in writer.rules.core(kind)}
    found = {name: at_path(batch.columns, column) for name, column in {**mapping, **core}.items()}
    there = {name: column for name, column in found.items() if column is not None}
    columns = {name: there[name] for name in core if name in there}
    _note(batch, kind, core, mapping, writer)
    fields: dict[str, Column] = {}
    errors: dict[int, RowError] = {}
    if kind == "items":
        mapped = mapping.get(FIELDS, FIELDS)
        named = {name: there[name] for name in mapping if name in there and name not in core and name != FIELDS}
        taken = {*core.values(), mapped}
        free = [name for name in batch.columns if name not in taken and not INDEX_NAME.fullmatch(name)]
        rest = {name: batch.columns[name] for name in free}
        # A name of requests, such as input, is a field only where the items have its column: one mapping serves both.
        meant = {name for name in mapping if name in named or name not in CORE["requests"]} - {*core, FIELDS}
        fields = named if meant else rest
        given = at_path(batch.columns, mapped)
        if given is not None:
            fields, errors = _spread(given, fields, keep=fields is named)
    writer.batch(kind, columns, fields, batch.seq, place, batch.line, errors)


def _spread(given: Column, others: Mapping[str, Column], keep: bool) -> tuple[dict[str, Column], dict[int, RowError]]:
    """Returns the fields of a column of mappings, by name, and an error for each value that is no mapping.

    Args:
        others: fields of columns of their own.
        keep: they stand beside the mapping's; otherwise only in rows whose mapping is empty.
    """
    array = as_array(given)
    rows = given if array is None else values(array)
    found: dict[str, list[Any]] = {}
    errors: dict[int, RowError] = {}
    bare = np.ones(len(rows), bool)
    for at, row in enumerate(rows):
        if row is None:
            continue
        if isinstance(row, list) and all(isinstance(pair, tuple) for pair in row):  # an Arrow map
            row = dict(row)
        if not isinstance(row, Mapping):
            errors[at] = RowError("wrong_type", "fields is not a mapping of names to texts")
            continue
        bare[at] = not row
        for name, value in row.items():
            found.setdefault(str(name), [None] * len(rows))[at] = value
    spread: dict[str, Column] = dict(found)
    for name, column in others.items():
        if keep or bare.all():
            spread[name] = column
        elif bare.any():
            own = found.get(name, [None] * len(rows))
            array = as_array(column)
            other = column if array is None else values(array)
            spread[name] = [other[at] if bare[at] else own[at] for at in range(len(rows))]
    return spread, errors


def _note(batch: Batch, kind: Kind, core: Mapping[str, str], mapping: Mapping[str, str], writer: RowWriter) -> None:
    """Notes the columns there are, and those that may be times where the mapped one is missing."""
    seen = writer.notes.columns[kind]
    wanted = set(mapping.values()) | set(core.values())
    there = [*batch.columns, *(path for path in wanted if "." in path and at_path(batch.columns, path) is not None)]
    new = [name for name in there if name not in seen and (name in wanted or len(seen) < _KEPT_NAMES)]
    seen += new
    if kind == "items" and core["occurred_at"] not in there:
        own = {core["user_id"], core["item_id"]}
        writer.notes.times += [
            n for n in new if n not in own and n in batch.columns and looks_like_time(n, batch.columns[n])
        ]
