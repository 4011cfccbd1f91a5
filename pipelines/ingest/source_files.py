"""The files that an ingest reads: their names, their content, and whether they change meanwhile."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from infra.errors import InputError
from infra.remote import reading
from infra.storage import Storage
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.sources.base import Kind, Piece
from pipelines.ingest.sources.discover import Source


def states(pieces: Sequence[Piece]) -> dict[str, str]:
    """Returns a state per file address that changes when the file is written again; no file is read."""
    return {
        storage.full(name): state for (storage, name), state in _of_each(pieces, lambda at, name: at.state_of(name))
    }


def contents(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """Returns name and content mark of each file in the order of reading; files on a disk are read for it."""
    return [(name, content) for (_, name), content in _of_each(pieces, lambda at, name: at.content_of(name))]


def refuse_changed(before: dict[str, str], pieces: Sequence[Piece]) -> None:
    """Raises InputError: a file is no longer as it was, so that the rows read may be of either state."""
    for address, state in states(pieces).items():
        if state != before[address]:
            raise InputError(
                f"{address} has changed while it was read: {before[address]}, then {state}; nothing has been written. "
                "Wait until the file is complete, then run ingest again, with another run_id"
            )


def refuse_empty(config: IngestConfig, pieces: Sequence[Piece], rows: Mapping[int, int]) -> None:
    """Refuses a source without any row, unless the config allows it.

    Args:
        rows: number of rows by the place of their file in the order of reading.

    Raises:
        InputError: the items or the requests have none.
    """
    if config.allow_empty or config.follow:  # a change of a table may bring no row
        return
    for kind in dict.fromkeys(piece.kind for piece in pieces):
        files = {piece.file: piece for piece in pieces if piece.kind == kind}
        if not any(rows.get(file) for file in files):
            names = ", ".join(piece.name for piece in list(files.values())[:3])
            raise InputError(
                f"{names}{' and more' if len(files) > 3 else ''}: no row in the {len(files)} files of the {kind}, "
                "nothing has been written; check the source, or give --allow-empty where that is right"
            )


def in_report(
    found: Mapping[Kind, Source], pieces: Sequence[Piece], rows: Mapping[int, int], most: int
) -> dict[str, Any]:
    """Returns the files that were read, with their rows, and those left out, at most so many of each, for a report."""
    read = {piece.file: piece for piece in pieces}
    listed = [
        {"file": _address(piece), "kind": piece.kind, "format": piece.format, "bytes": piece.size,
         "rows": rows.get(number, 0)}
        for number, piece in list(read.items())[:most]
    ]  # fmt: skip
    left = [{"file": name, "why": why} for source in found.values() for name, why in source.left_out]
    return {"files_read": listed, "files_left_out": left[:most], "files": {"read": len(read), "left_out": len(left)}}


def _address(piece: Piece) -> str:
    """Returns a file's address without a web address's query, which may hold a key."""
    if piece.parts:
        return ", ".join(_address(part) for part in piece.parts[:3]) + (" and more" if len(piece.parts) > 3 else "")
    address = reading(piece.folder).full(piece.name)
    return address.partition("?")[0] if address.startswith("http") else address


def _of_each(pieces: Sequence[Piece], look: Callable[[Storage, str], str]) -> list[tuple[tuple[Storage, str], str]]:
    """Calls `look` for every file, each once; a version of a table never changes, and its identity stands for it."""
    single = [part for piece in pieces for part in (piece.parts or (piece,))]
    known = {(piece.folder, name): piece.identity for piece in single for name in piece.files}
    files = [(reading(folder), name, identity) for (folder, name), identity in known.items()]
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(lambda file: file[2] or look(file[0], file[1]), files)
        return [((storage, name), said) for (storage, name, _), said in zip(files, found, strict=True)]
