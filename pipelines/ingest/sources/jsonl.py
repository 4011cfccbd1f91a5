"""JSON lines: one record per line. A damaged line is a reject, and the next one is read.

A plain file is read in pieces of some megabytes; each line belongs to the piece that it begins in. Python's parser
reads them, because a library that reads whole files gives up at the first damaged line, or loses its place.
"""

import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

import pipelines.ingest.sources.records as records
from infra.storage import Storage
from pipelines.ingest.sources.base import Piece, is_packed, opened
from pipelines.ingest.sources.records import Batch, RecordFormat
from pipelines.ingest.values import RowError

_LOOKED_AT = 100
"""Number of lines in which a source's columns are looked for."""
_BATCH_ROWS, _BATCH_BYTES = 8192, 4 * 2**20


class Jsonl(RecordFormat):
    """Plain or gzipped files of JSON objects."""

    name = "jsonl"
    suffixes = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
    place = "@"

    def parts(self, storage: Storage, name: str) -> list[tuple[int, int | None]]:
        size = 0 if is_packed(name) else storage.size(name)
        starts = range(0, size, records.PIECE_BYTES) if size > records.PIECE_BYTES else [0]
        return list(zip(starts, [*starts[1:], None], strict=True))

    def columns(self, piece: Piece) -> set[str]:
        names: set[str] = set()
        for number, (_, line) in enumerate(lines(Piece(self.name, piece.kind, piece.folder, piece.files, 0))):
            try:
                names |= set(_json_object(line))
            except RowError:  # set aside when it is read
                pass
            if number >= _LOOKED_AT:
                break
        return names

    def batches(self, piece: Piece) -> Iterator[Batch]:
        found: list[dict[str, Any]] = []
        seq: list[int] = []
        line_of: list[int] = []
        batch, number, size = Batch({}, np.array([], np.int64)), 0, 0
        for number, (at, line) in enumerate(_all_lines(piece), start=1):
            batch.lines += 1
            if line.isspace():
                continue
            try:
                found.append(_json_object(line))
                seq.append(at)
                line_of.append(number)
            except RowError as error:
                batch.bad.append((at, error, number, line.decode("utf-8", "replace").strip()))
            size += len(line)
            if len(found) + len(batch.bad) >= _BATCH_ROWS or size >= _BATCH_BYTES:
                yield _filled(batch, found, seq, line_of)
                found, seq, line_of, size = [], [], [], 0
                batch = Batch({}, np.array([], np.int64))
        yield _filled(batch, found, seq, line_of)


def lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """Yields byte offset and text of each line of a piece that is not empty."""
    return ((at, line) for at, line in _all_lines(piece) if not line.isspace())


def _all_lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """Yields byte offset and text of each line of a piece."""
    with opened(piece.folder, piece.name) as raw:
        stream: Any = raw if is_packed(piece.name) else io.BufferedReader(raw, 2**20)  # type: ignore[type-var]
        at = piece.start
        if at:
            stream.seek(at - 1)
            at += len(stream.readline()) - 1
        while (piece.end is None or at < piece.end) and (line := stream.readline()):
            yield at, line.removeprefix(b"\xef\xbb\xbf") or b"\n" if at == 0 else line
            at += len(line)


def _filled(batch: Batch, found: list[dict[str, Any]], seq: list[int], line: list[int]) -> Batch:
    """Returns the batch with the records' columns, in the order in which their names first stand there."""
    names = dict.fromkeys(name for names in {tuple(record): None for record in found} for name in names)
    batch.columns = {name: [record.get(name) for record in found] for name in names}
    batch.seq, batch.line = np.array(seq, np.int64), np.array(line, np.int64)
    return batch


def _json_object(line: bytes) -> dict[str, Any]:
    """Parses a line. Raises RowError: it is no JSON object, or an object has one name twice."""
    try:
        value = _DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError("bad_utf8", f"byte {error.start} of the line is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise RowError("bad_json", str(error).partition(":")[0]) from None
    if not isinstance(value, dict):
        raise RowError("wrong_type", "the line is not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise RowError("duplicate_key", "a name stands twice in one JSON object, and which value counts is unknown")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
