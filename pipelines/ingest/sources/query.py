"""Rows that a SQL query makes of a source's files, by DuckDB. The view `source` holds what the files hold.

Parquet and Delta are scanned where they lie. Files of other formats are read by their own readers first, so that a
damaged row is a reject with its place, and kept on the local disk while the query runs: as Parquet, or all records of
JSON in one file of lines, because each file that DuckDB reads as JSON takes buffers of its own.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from infra import temporary
from infra.cores import cores
from infra.errors import InputError
from infra.remote import reading
from infra.storage import tells_of_access
from pipelines.ingest.sources.base import (
    DAMAGED,
    FORMATS,
    Head,
    Kind,
    NotThisFormat,
    Options,
    Piece,
    is_access_error,
    unreachable,
)
from pipelines.ingest.sources.columns import names_in_words, plain, refuse_duplicates
from pipelines.ingest.sources.delta import open_table, rows_of
from pipelines.ingest.sources.discover import File
from pipelines.ingest.sources.jsonl import Jsonl
from pipelines.ingest.sources.records import BATCH_ROWS, Batch, RecordFormat, damage
from pipelines.ingest.values import Column, RowError, as_array

if TYPE_CHECKING:
    import duckdb

_LOOKED_AT = 1000
"""Number of rows per file that a look reads of formats that DuckDB does not scan."""
_MEMORY = "2GB"
_LEAST, _LONG = 2**24, 2**26
"""Bytes: the least size of a JSON object that DuckDB is told of, and the length of a line above which it takes one
thread, since each thread has buffers of that size."""
_EXACT = 2**53
"""Size of whole numbers up to which a DOUBLE holds each of them."""
_OF_TEXTS = re.compile("UUID|JSON|DATE|TIME.*")
"""Types that DuckDB guesses for texts of JSON. It would write them anew: a UUID in lower case, 02-03-2020 as a date
whose month is a guess, and texts beside numbers with quotation marks."""
_CANDIDATES = re.compile(r"\n*Candidate (?:bindings|entries):", re.IGNORECASE)
"""Beginning of DuckDB's list of names, which may be a user's first row in a file without a header."""
Bad = tuple[RowError, int | None, str | None]
"""Error, line and text of a row that could not be read; its place stands in the error's detail."""


class Query(RecordFormat):
    """One query over all files of a source."""

    name = "query"
    chosen = False

    def over(self, pieces: Sequence[Piece], kind: Kind) -> Piece:
        """Makes the one piece of a source whose files these are pieces of; the query reads each file whole, once."""
        files = {piece.file: replace(piece, start=0, end=None) for piece in pieces}
        size = sum(file.size for file in files.values())
        return Piece(self.name, kind, "", ("query",), pieces[0].file, parts=tuple(files.values()), size=size)

    def pieces(self, files: Sequence[File], kind: Kind, options: Options, first_file: int = 0) -> list[Piece]:
        raise NotImplementedError("a query stands over the pieces of other formats: see `over`")

    def schema(self, piece: Piece, options: Options) -> pa.Schema:
        return self.head(piece, options, 1).columns

    def head(self, piece: Piece, options: Options, rows: int) -> Head:
        """Runs the query over the beginnings of the files.

        Raises:
            InputError: DuckDB refuses the query; the message holds its words without the list of like names.
        """
        import duckdb

        with temporary.folder("query") as folder:
            try:
                connection, _, some = _opened(piece, options, Path(folder), _LOOKED_AT)
            except NotThisFormat as error:
                raise InputError(f"{_key(piece)}: {error}") from error
            with connection:
                if not some:  # as a file without rows, or a damaged one, has no head
                    return Head(pa.schema([]), [])
                try:
                    table = pa.table(
                        connection.sql(f"select * from ({_sql(piece, options)}) limit {rows}").to_arrow_table()
                    )
                except (duckdb.ParserException, duckdb.BinderException, duckdb.CatalogException) as error:
                    columns = names_in_words([name for name, *_ in connection.sql("describe source").fetchall()])
                    said = _CANDIDATES.split(str(error))[0].rstrip()
                    raise InputError(f"{_key(piece)}: {said}; `source` has the columns {columns}") from None
                except (duckdb.Error, OSError, pa.ArrowException) as error:
                    failure = _failure(error, piece)
                    if not isinstance(failure, NotThisFormat):
                        raise failure from None
                    raise InputError(f"{_key(piece)}: {failure}") from None  # the cause may hold values
        first = [
            dict(zip(table.schema.names, row, strict=True)) for row in zip(*map(plain, table.columns), strict=True)
        ]
        return Head(table.schema, first)

    def batches(self, piece: Piece, options: Options, only: Sequence[str] | None = None) -> Iterator[Batch]:
        import duckdb

        with temporary.folder("query") as folder:
            connection, bad, some = _opened(piece, options, Path(folder), None)
            with connection:
                if bad:
                    yield Batch({}, np.empty(0, np.int64), bad=[(at, *row) for at, row in enumerate(bad)])
                if not some:
                    return
                try:
                    reader = connection.sql(_sql(piece, options)).to_arrow_reader(BATCH_ROWS)
                    refuse_duplicates(reader.schema.names)
                    first = 0
                    for batch in reader:
                        yield Batch.of_table(batch, first)
                        first += batch.num_rows
                except NotThisFormat:
                    raise
                except (duckdb.Error, OSError, pa.ArrowException) as error:
                    raise _failure(error, piece) from None  # the cause may hold values


def _failure(error: Exception, piece: Piece) -> OSError:
    """Returns the error that stands for one of a running query: without its words, which may hold values of a file.

    DuckDB gives the words alone of what a file's reader raised; after the first rows all errors come as an OSError.
    """
    said = str(error)
    if scan := _SCAN.match(said):
        part = piece.parts[int(scan[1])]
        if tells_of_access(said):
            return unreachable(part.folder, part.name, ConnectionError())
        return NotThisFormat(f"{part.name}: damaged or cut off")
    kind = said.partition(":")[0] if isinstance(error, OSError) else type(error).__name__
    return NotThisFormat(f"the query fails with {kind if _KIND.fullmatch(kind) else type(error).__name__}{_HINT}")


_SCAN = re.compile(r"Invalid Input Error: reading the stream registered as 'part(\d+)' failed: ")
"""Beginning of DuckDB's words for a file's reader that has raised; a value of the file cannot stand there."""
_KIND = re.compile("[A-Z][A-Za-z/-]*( [A-Z][A-Za-z]*)*")
"""Name of a kind of error, such as `Conversion Error`."""
_HINT = "; where a value cannot be converted, try_cast gives null instead"


def _key(piece: Piece) -> str:
    return "requests_query" if piece.kind == "requests" else "query"


def _sql(piece: Piece, options: Options) -> str:
    query = options.requests_query if piece.kind == "requests" else options.query
    return (query or "").strip().rstrip(";")


def _opened(
    piece: Piece, options: Options, folder: Path, rows: int | None
) -> tuple["duckdb.DuckDBPyConnection", list[Bad], bool]:
    """Opens DuckDB with the view `source`; `rows` of each file, or all.

    Returns:
        The connection, rows that cannot be read, and False if no file has any row, so that there is no view.

    Raises:
        NotThisFormat: DuckDB cannot make one view of all files.
    """
    import duckdb

    connection = duckdb.connect()
    connection.execute(f"set memory_limit = '{_MEMORY}'")
    connection.execute("set temp_directory = ?", [str(folder / "spill")])
    connection.execute(f"set threads = {min(4, cores())}")
    connection.execute("set timezone = 'UTC'")
    bad: list[Bad] = []
    views: list[str] = []
    plain = replace(options, explode=None)
    lines = [part for part in piece.parts if isinstance(FORMATS[part.format], Jsonl)]
    try:
        for number, part in enumerate(piece.parts):
            if part in lines:
                continue
            try:
                view = _view(connection, part, plain, folder, number, rows, bad)
                if view is not None:
                    views.append(f"select *{_more(connection, part, view)} from {view}")
            except DAMAGED as error:
                if is_access_error(error):
                    raise unreachable(part.folder, part.name, error) from error
                bad.append(_placed(damage(error), part.name))
        if lines and (view := _lines(connection, lines, plain, folder, rows, bad)) is not None:
            views.append(f"select * from {view}")
        if views:
            connection.execute(f"create view source as {' union all by name '.join(views)}")
    except duckdb.Error as error:  # its words may hold values
        connection.close()
        raise NotThisFormat(
            f"DuckDB cannot make one view of these files ({type(error).__name__}): a column may have a type that it "
            "lacks, or another type in another file"
        ) from error
    return connection, bad, bool(views)


def _more(connection: "duckdb.DuckDBPyConnection", part: Piece, view: str) -> str:
    """Returns the columns that a file's folders give, where the file has none of that name."""
    held = {name.casefold() for name, *_ in connection.sql(f"describe select * from {view}").fetchall()}
    given = [(name, value) for name, value in part.partition if name.casefold() not in held]
    return "".join(f", {_literal(value)} as {_quoted(name)}" for name, value in given)


def _view(
    connection: "duckdb.DuckDBPyConnection", part: Piece, options: Options, folder: Path, number: int, rows: int | None,
    bad: list[Bad],
) -> str | None:  # fmt: skip
    """Makes one file's rows known to DuckDB; returns what stands for them after `from`, None for a file of nothing."""
    format, name = FORMATS[part.format], f"part{number}"
    if part.format == "parquet":
        storage = reading(part.folder)
        dataset = pads.dataset(storage._at(part.name), filesystem=storage.filesystem, format="parquet")
        refuse_duplicates(dataset.schema.names)
        connection.register(name, dataset)
        return name if dataset.schema.names else None
    if part.format == "delta":
        root = reading(part.folder).join(part.name)
        found = rows_of(open_table(root.uri, part.version), root)
        connection.register(name, found.read_all() if isinstance(found, pa.RecordBatchReader) else found)
        return name
    assert isinstance(format, RecordFormat)
    path = folder / f"{name}.parquet"
    return f"read_parquet('{path}')" if _keep_columns(format, part, options, path, rows, bad) else None


def _lines(
    connection: "duckdb.DuckDBPyConnection", parts: Sequence[Piece], options: Options, folder: Path, rows: int | None,
    bad: list[Bad],
) -> str | None:  # fmt: skip
    """Writes the records of all files of JSON into one file of lines; returns what stands for them, None for none."""
    path, longest, seen, of_folders, there = folder / "lines.jsonl", 0, set[str](), set[str](), Held()
    with open(path, "wb") as out:
        for part in parts:
            format = FORMATS[part.format]
            assert isinstance(format, Jsonl)
            for batch in _batches(format, part, options, rows, bad):
                held = {name.casefold() for name in batch.columns}
                folders = {name: value for name, value in part.partition if name.casefold() not in held}
                of_folders |= folders.keys()
                seen |= batch.columns.keys()
                for row in zip(*map(plain, batch.columns.values()), strict=True):
                    record = folders | dict(zip(batch.columns, row, strict=True))
                    known = {name: value for name, value in record.items() if value is not None}
                    there.note(known)
                    line = json.dumps(known).encode() + b"\n"
                    longest = max(longest, len(line))
                    out.write(line)
    if not longest:
        return None
    if longest > _LONG:
        connection.execute("set threads = 1")
    form = f"read_json('{path}', format='newline_delimited', maximum_object_size={max(_LEAST, longest)}"
    relation = connection.sql(f"select * from {form}, sample_size=-1)")
    inferred = dict(zip(relation.columns, relation.types, strict=True))
    kinds = {name: _kept(kind, there.at(name)) for name, kind in inferred.items()}
    kinds |= dict.fromkeys(of_folders - seen, "VARCHAR")
    same = kinds == {name: _kept(kind, None) for name, kind in inferred.items()}
    if same or not kinds.keys() <= seen | of_folders:  # a name that DuckDB has changed is none of the file
        return f"{form}, sample_size=-1)"
    columns = ", ".join(f"{_literal(name)}: {_literal(kind)}" for name, kind in kinds.items())
    return f"{form}, columns={{{columns}}})"


@dataclass
class Held:
    """Values that stand at one place of the records of JSON, and at the places below it."""

    large: bool = False
    """A whole number that a DOUBLE does not hold."""
    parts: bool = False
    """An object or a list."""
    below: dict[str, "Held"] = field(default_factory=dict)
    """By the names of fields; the elements of a list have the empty name."""

    def at(self, name: str) -> "Held":
        if name not in self.below:
            self.below[name] = Held()
        return self.below[name]

    def note(self, value: object) -> None:
        """Notes what a value is, however deep."""
        if isinstance(value, int):
            self.large = self.large or abs(value) > _EXACT
        elif isinstance(value, Mapping):
            self.parts = True
            for name, own in value.items():
                self.at(name).note(own)
        elif isinstance(value, list | tuple):
            self.parts = True
            for own in value:
                self.at("").note(own)


def _kept(kind: Any, held: Held | None) -> str:
    """Returns the name of a type by which DuckDB leaves values as they are written.

    Texts stay texts, and so do fractions that stand beside a whole number that no DOUBLE holds. A place with objects
    beside other values stays JSON.

    Args:
        kind: DuckDB's own type.
        held: values of the place; None changes nothing.
    """
    children = dict(kind.children) if kind.id in ("struct", "list", "map") else {}
    if kind.id == "struct":
        parts = (f"{_name(name)} {_kept(own, held and held.at(name))}" for name, own in children.items())
        return f"STRUCT({', '.join(parts)})"
    if kind.id == "list":
        return f"{_kept(children['child'], held and held.at(''))}[]"
    if kind.id == "map":  # of objects with many names: what stands below any of them
        whole = held
        if held is not None:
            below = held.below.values()
            whole = Held(any(one.large for one in below), any(one.parts for one in below))
        return f"MAP({children['key']}, {_kept(children['value'], whole)})"
    text = str(kind)
    if held is not None and (
        (_OF_TEXTS.fullmatch(text) and not (text == "JSON" and held.parts)) or (text == "DOUBLE" and held.large)
    ):
        return "VARCHAR"
    return text


def _name(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _placed(error: RowError, place: str, line: int | None = None, text: str | None = None) -> Bad:
    return RowError(error.reason, f"{place}: {error.detail}"), line, text


def _batches(format: RecordFormat, part: Piece, options: Options, rows: int | None, bad: list[Bad]) -> Iterator[Batch]:
    """Yields a file's batches until there are so many rows; what cannot be read is added to `bad`."""
    try:
        place = format.place_of(part, options)
        for batch in format.batches(part, options):
            bad += [_placed(error, place(seq), line, text) for seq, error, line, text in batch.bad]
            yield batch
            rows = None if rows is None else rows - len(batch.seq)
            if rows is not None and rows <= 0:
                return
    except DAMAGED as error:
        if is_access_error(error):
            raise unreachable(part.folder, part.name, error) from error
        bad.append(_placed(damage(error), part.name))


def _keep_columns(
    format: RecordFormat, part: Piece, options: Options, path: Path, rows: int | None, bad: list[Bad]
) -> bool:
    """Writes the rows of a file as Parquet; a row with text that is not UTF-8 is bad. Returns False without columns."""
    schema, place = format.schema(part, options), format.place_of(part, options)
    assert schema is not None
    if not schema.names:
        return False
    with pq.ParquetWriter(path, schema, compression="lz4") as out:
        for batch in _batches(format, part, options, rows, bad):
            columns = [batch.columns[name] for name in schema.names]
            sound = np.ones(len(batch.seq), bool)
            for column in columns:
                if as_array(column) is None:  # half a surrogate pair somewhere
                    sound &= np.array([value is None or _is_unicode(value) for value in column])
            for row in np.flatnonzero(~sound):
                error = RowError("bad_utf8", "a value of the row is not UTF-8")
                bad.append(_placed(error, place(int(batch.seq[row]))))
            out.write_table(pa.table([_chosen(column, np.flatnonzero(sound)) for column in columns], schema=schema))
    return True


def _chosen(column: Column, rows: np.ndarray) -> Column:
    return column.take(pa.array(rows)) if isinstance(column, pa.Array) else [column[row] for row in rows]


def _is_unicode(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _literal(value: str | None) -> str:
    return "null::varchar" if value is None else "'" + value.replace("'", "''") + "'"
