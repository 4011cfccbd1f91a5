"""JSON lines: one record per line. A damaged line is a reject, and the next one is read.

A plain file is read in pieces of some megabytes; each line belongs to the piece that it begins in.
"""

import io
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from pipelines.ingest.source_rows import RowError
from pipelines.ingest.sources.base import Piece, is_packed, opened
from pipelines.ingest.sources.records import Record, RecordFormat

_LOOKED_AT = 100
"""Number of lines in which a source's columns are looked for."""


class Jsonl(RecordFormat):
    """Plain or gzipped files of JSON objects."""

    name = "jsonl"
    suffixes = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
    place = "@"

    def divisible(self, name: str) -> bool:
        return not is_packed(name)

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

    def records(self, piece: Piece) -> Iterator[tuple[int, Record]]:
        for seq, line in lines(piece):
            yield seq, partial(_json_object, line)


def lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """Yields byte offset and text of each line of a piece that is not empty."""
    with opened(piece.folder, piece.name) as raw:
        stream: Any = raw if is_packed(piece.name) else io.BufferedReader(raw, 2**20)  # type: ignore[type-var]
        at = piece.start
        if at:
            stream.seek(at - 1)
            at += len(stream.readline()) - 1
        while (piece.end is None or at < piece.end) and (line := stream.readline()):
            text = line.removeprefix(b"\xef\xbb\xbf") if at == 0 else line
            if text.strip():
                yield at, text
            at += len(line)


def _json_object(line: bytes) -> dict[str, Any]:
    """Parses a line. Raises RowError: it is no JSON object."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError("bad_utf8", f"byte {error.start} of the line is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise RowError("bad_json", str(error).partition(":")[0]) from None
    if not isinstance(value, dict):
        raise RowError("wrong_type", "the line is not a JSON object")
    return value
