"""JSON: one record per line, or one array of records. A damaged record is a reject, and the next one is read.

A plain file of lines is read in pieces of some megabytes; each line belongs to the piece that it begins in. It is read
by hand: the readers of Arrow and DuckDB give up a block, or the file, for one damaged line, and guess types.
An array, or an object with an array of objects in it, is read by ijson, record by record; damage ends it there.
"""

import io
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import ijson

from pipelines.ingest.source_rows import RowError
from pipelines.ingest.sources.base import Options, Piece, begins_packed, opened
from pipelines.ingest.sources.discover import File
from pipelines.ingest.sources.records import NotThisFormat, Record, RowFormat, refuse_content

_BOM = b"\xef\xbb\xbf"
_BEGINNING = 2**16


class Jsonl(RowFormat):
    """Files under the common names of files with one JSON object per line."""

    name = "jsonl"
    suffixes = (".jsonl", ".ndjson")
    wraps = False
    """True if a file may be one object that holds the array of records."""

    def divisible(self, file: File, options: Options) -> bool:
        return not begins_packed(file.folder, file.name) and self._array(file.folder, file.name, options) is None

    def records(self, piece: Piece, options: Options) -> Iterator[tuple[int, str, Record]]:
        refuse_content(piece, "JSON")
        array = None if piece.start else self._array(piece.folder, piece.name, options)
        if array is None:
            for seq, line in lines(piece):
                yield seq, f"@{seq}", partial(_json_object, line)
            return
        with opened(piece.folder, piece.name) as stream:
            if stream.peek(3)[:3] == _BOM:
                stream.read(3)
            try:
                for seq, value in enumerate(ijson.items(stream, array, use_float=True)):
                    yield seq, f" record {seq + 1}", partial(_an_object, value)
            except (ijson.JSONError, UnicodeDecodeError) as error:
                raise NotThisFormat("the JSON array is damaged or cut off; the records before that are read") from error

    def _array(self, folder: str, name: str, options: Options) -> str | None:
        """Returns ijson's path to the array of records that a file is; None for a file of lines."""
        with opened(folder, name) as stream:
            text = stream.read(_BEGINNING).removeprefix(_BOM).lstrip()
        line, _, more = text.partition(b"\n")
        if text.startswith(b"["):
            return "item" if text[1:].lstrip()[:1] in (b"{", b"]") and not (_parses(line) and more.strip()) else None
        if not self.wraps or options.explode or not text.startswith(b"{") or (_parses(line) and more.strip()):
            return None
        return _path_to_array(text)


class Json(Jsonl):
    """Files that end in .json: an array of objects, an object with an array of objects in it, or lines."""

    name = "json"
    suffixes = (".json",)
    beside = True
    wraps = True


def _parses(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _path_to_array(text: bytes) -> str | None:
    """Returns the path of the first array of objects right in an object of which this is the beginning."""
    depth, above = 0, None
    try:
        for prefix, event, _ in ijson.parse(io.BytesIO(text)):
            if event == "start_map" and above is not None and depth == 1:
                return f"{above}.item"
            above = prefix if event == "start_array" and depth == 1 else None
            depth += (event in ("start_map", "start_array")) - (event in ("end_map", "end_array"))
    except (ijson.JSONError, UnicodeDecodeError):
        pass  # cut off at the end of the beginning, or damaged: its lines will say so
    return None


def lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """Yields byte offset and text of each line of a piece that is not empty."""
    with opened(piece.folder, piece.name) as stream:
        at = piece.start
        if at:
            stream.seek(at - 1)
            at += len(stream.readline()) - 1
        while (piece.end is None or at < piece.end) and (line := stream.readline()):
            text = line.removeprefix(_BOM) if at == 0 else line
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
    return _an_object(value)


def _an_object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowError("wrong_type", "the record is not a JSON object")
    return value
