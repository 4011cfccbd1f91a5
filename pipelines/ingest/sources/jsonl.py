"""JSON: one record per line, or one array of records. A damaged record is a reject, and the next one is read.

A plain file of lines is read in pieces of some megabytes; each line belongs to the piece that it begins in. It is read
by hand: the readers of Arrow and DuckDB give up a block, or the file, for one damaged line, and guess types.
An array, or an object with an array of objects in it, is read record by record (`json_array`); damage ends it there.
An object on the file's one line that names a user itself is one record, and so is one over several lines without such
an array.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from io import BytesIO
from typing import IO, Any, ClassVar

import numpy as np

from pipelines.ingest.sources.base import DAMAGED, NotThisFormat, Options, Piece, begins_packed, opened
from pipelines.ingest.sources.discover import File
from pipelines.ingest.sources.json_array import first_array, unique, values, whole
from pipelines.ingest.sources.records import BATCH_BYTES, BATCH_ROWS, Batch, RecordFormat, refuse_content
from pipelines.ingest.values import RowError

_BOM = b"\xef\xbb\xbf"
_BEGINNING = 2**16
_LARGEST = 2**24
"""Bytes of the largest file that may be one record over several lines: it is parsed as a whole to tell."""
_Reader = Callable[[IO[bytes]], Iterator[Any]]


class Jsonl(RecordFormat):
    """Files under the common names of files with one JSON object per line."""

    name = "jsonl"
    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".ndjson")
    place = "@"
    wraps = False
    """True if a file may be one object that holds the array of records."""

    def divisible(self, file: File, options: Options) -> bool:
        return not begins_packed(file.folder, file.name) and self._reader(file.folder, file.name, options) is None

    def place_of(self, piece: Piece, options: Options) -> Callable[[int], str]:
        place = super().place_of(piece, options)
        if piece.start or self._reader(piece.folder, piece.name, options) is None:
            return place
        return lambda seq: place(seq).replace(f"{piece.name}@", f"{piece.name} record ", 1)

    def batches(self, piece: Piece, options: Options, only: Sequence[str] | None = None) -> Iterator[Batch]:
        refuse_content(piece, "JSON")
        reader = None if piece.start else self._reader(piece.folder, piece.name, options)
        explode = options.explode if piece.kind == "items" else None
        batch = _Filling(explode)
        try:
            if reader is not None:
                for seq, value in _values(piece, reader):
                    batch.add(seq, None, value, 0)
                    if batch.full:
                        yield batch.take()
            else:
                for number, (at, line) in enumerate(_all_lines(piece), start=1):
                    batch.lines += 1
                    if not line.isspace():
                        batch.add(at, number, line, len(line))
                        if batch.full:
                            yield batch.take()
        except DAMAGED:
            yield batch.take()  # what stands before the damage
            raise
        yield batch.take()

    def _reader(self, folder: str, name: str, options: Options) -> _Reader | None:
        """Returns what reads the records of a file that is an array, an object that holds one, or one object over
        several lines; None for a file of lines."""
        with opened(folder, name) as stream:
            text = stream.read(_BEGINNING).removeprefix(_BOM).lstrip()
        line, _, more = text.partition(b"\n")
        of_lines = _parses(line) and bool(more.strip())
        if text.startswith(b"["):
            return values if text[1:].lstrip()[:1] in (b"{", b"]") and not of_lines else None
        if not self.wraps or not text.startswith(b"{") or of_lines:
            return None
        if not options.explode:
            users = {options.mapping(kind).get("user_id", "user_id") for kind in ("items", "requests")}
            roots = {path.partition(".")[0] for path in users}
            if _parses(line) and not roots.isdisjoint(json.loads(line)):
                return None  # a file of lines that has but one: with a second record the first is read alike
            if (array := first_array(text.decode("utf-8", "ignore"), users | roots)) is not None:
                return partial(values, name=array)
        return whole if more and not _parses(line) and _is_one_value(folder, name) else None


class Json(Jsonl):
    """Files that end in .json: an array of objects, an object with an array of objects in it, or lines."""

    name = "json"
    suffixes = (".json",)
    beside = True
    wraps = True


class _Filling:
    """Records on their way into a batch."""

    def __init__(self, explode: str | None) -> None:
        self.explode = explode
        self._new()

    def _new(self) -> None:
        self.found: list[Mapping[str, Any]] = []
        self.seq: list[int] = []
        self.line: list[int] = []
        self.bad: list[tuple[int, RowError, int | None, str | None]] = []
        self.size = self.lines = 0

    def add(self, seq: int, number: int | None, given: Any, size: int) -> None:
        """Adds a record, given as a line, as a value or as its error; one that cannot be used is kept as bad."""
        try:
            if isinstance(given, RowError):
                raise given
            record = _an_object(_parsed(given) if isinstance(given, bytes) else given)
            if self.explode is not None and not isinstance(_at(record, self.explode), list | None):
                raise RowError("wrong_type", f"{self.explode} is no list")
            self.found.append(record)
            self.seq.append(seq)
            self.line.append(number or 0)
        except RowError as error:
            text = given.decode("utf-8", "replace").strip() if isinstance(given, bytes) else None
            self.bad.append((seq, error, number, text))
        self.size += size

    @property
    def full(self) -> bool:
        return len(self.found) + len(self.bad) >= BATCH_ROWS or self.size >= BATCH_BYTES

    def take(self) -> Batch:
        """Returns the records by column, in the order in which their names first stand there."""
        names = dict.fromkeys(name for names in {tuple(record): None for record in self.found} for name in names)
        columns = {name: [record.get(name) for record in self.found] for name in names}
        if self.explode is not None and "." not in self.explode:
            columns.setdefault(self.explode, [None] * len(self.found))
        line = np.array(self.line, np.int64) if all(self.line) else None
        batch = Batch(columns, np.array(self.seq, np.int64), line, self.bad, self.lines)
        self._new()
        return batch


def _at(record: Mapping[str, Any], path: str) -> Any:
    for part in [path] if path in record else path.split("."):
        record = record.get(part) if isinstance(record, Mapping) else None  # type: ignore[assignment]
    return record


def _values(piece: Piece, reader: _Reader) -> Iterator[tuple[int, Any]]:
    """Yields number and value of each record of a file. Raises NotThisFormat: it is damaged after these."""
    with opened(piece.folder, piece.name) as stream:
        found = reader(stream)
        number = 1
        while True:
            try:
                value = next(found)
            except StopIteration:
                return
            except (ValueError, RecursionError) as error:
                raise NotThisFormat("the JSON array is damaged or cut off; the records before that are read") from error
            yield number, value
            number += 1


def _is_one_value(folder: str, name: str) -> bool:
    """Tells whether a file of at most `_LARGEST` bytes is one JSON value."""
    with opened(folder, name) as stream:
        text = stream.read(_LARGEST + 1)
        try:
            return len(text) <= _LARGEST and len(list(whole(BytesIO(text)))) == 1
        except (ValueError, RecursionError):
            return False


def _parses(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """Yields byte offset and text of each line of a piece that is not empty."""
    return ((at, line) for at, line in _all_lines(piece) if not line.isspace())


def _all_lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """Yields byte offset and text of each line of a piece."""
    with opened(piece.folder, piece.name) as stream:
        at = piece.start
        if at:
            stream.seek(at - 1)
            at += len(stream.readline()) - 1
        while (piece.end is None or at < piece.end) and (line := stream.readline()):
            yield at, line.removeprefix(_BOM) or b"\n" if at == 0 else line
            at += len(line)


def _parsed(line: bytes) -> Any:
    """Parses a line. Raises RowError: it is no JSON, or an object has one name twice."""
    try:
        return _DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError("bad_utf8", f"byte {error.start} of the line is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise RowError("bad_json", str(error).partition(":")[0]) from None


def _an_object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowError("wrong_type", "the record is not a JSON object")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=unique)
