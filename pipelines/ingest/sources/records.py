"""JSONL and Parquet sources: one record a row, columns named by a mapping.

A source is a file or a folder of them. Plain JSONL is read in pieces of some megabytes, each line by the piece that it
begins in; a damaged line is a reject and the next one is read. A Parquet file that cannot be read is one reject that
names it, and the run counts as partly done, since nobody knows how many rows it held.
"""

import gzip
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.errors import InputError
from infra.storage import Storage
from pipelines.ingest.source_rows import RowError, RowWriter

Kind = Literal["items", "requests"]
NEEDED: dict[Kind, tuple[str, ...]] = {
    "items": ("user_id", "item_id"),
    "requests": ("request_id", "user_id", "input"),
}
OPTIONAL: dict[Kind, tuple[str, ...]] = {
    "items": ("occurred_at", "fields"),
    "requests": ("as_of", "target", "owner_id"),
}
SUFFIXES = {"jsonl": (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz"), "parquet": (".parquet",)}
PIECE_BYTES = 32 * 2**20
UNREADABLE = "unreadable_file"


@dataclass(frozen=True)
class Piece:
    """What one task reads: a file, or of a plain JSONL file the lines that begin in [start, end)."""

    kind: Kind
    folder: str
    name: str
    file: int
    start: int = 0
    end: int | None = None


def find(source: str, format: str, kind: Kind, first_file: int = 0) -> list[Piece]:
    """The pieces of a source. Raises InputError: there is no such file or folder, or nothing of this format in it."""
    suffixes = SUFFIXES[format]
    parent, _, last = source.rstrip("/").rpartition("/")
    single = source.endswith(suffixes) and last in Storage(parent or ".").list(recursive=False)
    storage = Storage(parent or ".") if single else Storage(source)
    names = [last] if single else [name for name in storage.list() if name.endswith(suffixes)]
    if not names:
        there = "it does not exist" if single or not storage.exists() else "nothing there has such a name"
        raise InputError(f"{source}: no {format} file ({there}); expected a file or folder of {', '.join(suffixes)}")
    pieces = []
    for file, name in enumerate(names, start=first_file):
        size = storage.size(name) if name.endswith((".jsonl", ".ndjson")) else 0
        starts = range(0, size, PIECE_BYTES) if size > PIECE_BYTES else [0]
        ends = [*starts[1:], None]
        pieces += [Piece(kind, storage.uri, name, file, start, end) for start, end in zip(starts, ends, strict=True)]
    return pieces


def check_columns(pieces: list[Piece], columns: Mapping[str, str]) -> None:
    """Looks at the first file for the needed columns. Raises InputError: one is missing, with those there are."""
    piece = pieces[0]
    where = f"{piece.folder}/{piece.name}"
    storage = Storage(piece.folder)
    if piece.name.endswith(".parquet"):
        try:
            with storage.open_input(piece.name) as stream:
                there = set(pq.read_schema(stream).names)
        except (pa.ArrowInvalid, OSError):
            return  # the task that reads it sets the file aside
    else:
        there = set()
        for number, (_, line) in enumerate(_lines(storage, Piece(piece.kind, piece.folder, piece.name, 0))):
            there |= set(_json_object(line, strict=False))
            if number >= 100:
                break
    wanted = {name: columns.get(name, name) for name in NEEDED[piece.kind]}
    missing = [column for column in wanted.values() if column not in there]
    if there and missing:
        name = next(name for name, column in wanted.items() if column == missing[0])
        raise InputError(
            f"{where}: no column {missing[0]!r} for {name}; it has {', '.join(sorted(there)[:20])}; name the right one "
            f"with --columns {name}=COLUMN"
        )


def read(piece: Piece, columns: Mapping[str, str], writer: RowWriter) -> Iterator[None]:
    """Hands every record of the piece to the writer; yields when the writer is full."""
    put = _put_item if piece.kind == "items" else _put_request
    try:
        for seq, record in _records(piece):
            writer.planned()
            place = f"{piece.name}{'@' if '.parquet' not in piece.name else ' row '}{seq}"
            try:
                put(record() if callable(record) else record, columns, writer, seq, place)
            except RowError as error:
                writer.reject(seq, place, error)
            if writer.full:
                yield
    except (pa.ArrowException, OSError, EOFError) as error:
        writer.planned()
        writer.reject(0, piece.name, RowError(UNREADABLE, f"{type(error).__name__}: damaged or cut off"))


def _records(piece: Piece) -> Iterator[tuple[int, Any]]:
    """Order number and record, or a call that gives it and may raise RowError."""
    storage = Storage(piece.folder)
    if not piece.name.endswith(".parquet"):
        for seq, line in _lines(storage, piece):
            yield seq, lambda line=line: _json_object(line)
        return
    with storage.open_input(piece.name) as stream:
        row = 0
        for batch in pq.ParquetFile(stream).iter_batches(batch_size=4096):
            for record in _rows(pa.table(batch)):
                yield row, record
                row += 1


def _lines(storage: Storage, piece: Piece) -> Iterator[tuple[int, bytes]]:
    """Byte offset and line; empty lines are nobody's row."""
    with storage.open_input(piece.name) as raw:
        stream = gzip.GzipFile(fileobj=raw) if piece.name.endswith(".gz") else io.BufferedReader(raw, 2**20)
        at = piece.start
        if at:
            stream.seek(at - 1)
            at += len(stream.readline()) - 1
        while (piece.end is None or at < piece.end) and (line := stream.readline()):
            text = line.removeprefix(b"\xef\xbb\xbf") if at == 0 else line
            if text.strip():
                yield at, text
            at += len(line)


def _json_object(line: bytes, strict: bool = True) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"))
        if isinstance(value, dict):
            return value
        problem = RowError("wrong_type", "the line is not a JSON object")
    except UnicodeDecodeError as error:
        problem = RowError("bad_utf8", f"byte {error.start} of the line is not UTF-8")
    except (ValueError, RecursionError) as error:
        problem = RowError("bad_json", str(error).partition(":")[0])
    if strict:
        raise problem
    return {}


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Rows of a batch; text that is not UTF-8 comes as bytes, for the row alone to fail."""
    columns = {}
    for name in table.column_names:
        column = table[name]
        if pa.types.is_timestamp(column.type):
            column = pc.cast(column, pa.timestamp("us", tz=column.type.tz), safe=False)
        try:
            columns[name] = column.to_pylist()
        except UnicodeDecodeError:
            columns[name] = column.cast(_as_bytes(column.type)).to_pylist()
    for at in range(len(table)):
        yield {name: values[at] for name, values in columns.items()}


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    return pa.map_(pa.binary(), pa.binary()) if pa.types.is_map(kind) else pa.large_binary()


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
