"""Formats with one record per history item or request, whose columns a mapping names.

A source is a file or a folder of files. A format says which files are its own, which columns they have and which
records a piece of them holds; everything else is here.
"""

import lzma
import re
import zlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from infra.errors import InputError
from infra.storage import Storage
from pipelines.ingest.source_rows import CORE, RowWriter
from pipelines.ingest.sources.base import UNREADABLE, Format, Kind, Options, Piece
from pipelines.ingest.times import looks_like_time
from pipelines.ingest.values import Column, RowError, as_array, values

NEEDED: dict[Kind, tuple[str, ...]] = {
    "items": ("user_id", "item_id"),
    "requests": ("request_id", "user_id", "input"),
}
FIELDS = "fields"
"""Our name of a column that holds an item's fields as a mapping."""
PIECE_BYTES = 32 * 2**20
DAMAGED = (pa.ArrowException, OSError, EOFError, zlib.error, lzma.LZMAError)
"""Errors of a file that is damaged, cut off, or not what its name says."""
_INDEX = re.compile(r"__index_level_\d+__|Unnamed: \d+")
"""Columns that pandas adds to number the rows; they are no field unless they are mapped to one."""
_KEPT_NAMES = 200


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


class RecordFormat(Format):
    """A format with one record per row."""

    place: ClassVar[str]
    """Text between a file's name and a record's number in the place that a reject names."""

    def parts(self, storage: Storage, name: str) -> list[tuple[int, int | None]]:
        """Cuts a file into parts [start, end) that several tasks may read; the whole file is (0, None)."""
        return [(0, None)]

    @abstractmethod
    def columns(self, piece: Piece) -> set[str]:
        """Returns the columns at the beginning of a piece's file; none where it cannot be read."""

    @abstractmethod
    def batches(self, piece: Piece) -> Iterator[Batch]:
        """Yields the records of a piece in the order given, some megabytes at a time."""

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
        return [
            Piece(self.name, kind, storage.uri, (name,), file, start, end)
            for file, name in enumerate(names, start=first_file)
            for start, end in self.parts(storage, name)
        ]

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

        def place(seq: int) -> str:
            return f"{piece.name}{self.place}{seq}"

        try:
            for batch in self.batches(piece):
                writer.notes.lines += batch.lines
                writer.planned(len(batch.bad))
                for seq, error, line, text in batch.bad:
                    writer.reject(seq, place(seq), error, line, text)
                put(batch, piece.kind, options.columns, writer, place)
                if writer.full:
                    yield
        except RowError as error:
            writer.planned()
            writer.reject(piece.start, piece.name, error)
        except DAMAGED as error:
            writer.planned()
            writer.reject(piece.start, piece.name, RowError(UNREADABLE, f"{type(error).__name__}: damaged or cut off"))


def put(batch: Batch, kind: Kind, mapping: Mapping[str, str], writer: RowWriter, place: Any) -> None:
    """Hands a batch to the writer under our names.

    Without a mapping `fields` and without mapped fields, all columns that are not ours are fields.
    """
    core = {name: mapping.get(name, name) for name in CORE[kind]}
    columns = {name: batch.columns[column] for name, column in core.items() if column in batch.columns}
    _note(batch, kind, core, mapping, writer)
    fields: dict[str, Column] = {}
    errors: dict[int, RowError] = {}
    if kind == "items":
        mapped = mapping.get(FIELDS, FIELDS)
        named = {
            name: batch.columns[column]
            for name, column in mapping.items()
            if name not in core and name != FIELDS and column in batch.columns
        }
        taken = {*core.values(), mapped}
        free = [name for name in batch.columns if name not in taken and not _INDEX.fullmatch(name)]
        rest = {name: batch.columns[name] for name in free}
        fields = named if any(name not in core and name != FIELDS for name in mapping) else rest
        if mapped in batch.columns:
            fields, errors = _spread(batch.columns[mapped], fields, keep=fields is named)
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
    new = [name for name in batch.columns if name not in seen and (name in wanted or len(seen) < _KEPT_NAMES)]
    seen += new
    if kind == "items" and core["occurred_at"] not in batch.columns:
        own = {core["user_id"], core["item_id"]}
        writer.notes.times += [n for n in new if n not in own and looks_like_time(n, batch.columns[n])]
