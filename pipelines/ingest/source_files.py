"""The files that an ingest reads: their names, their content, and whether they change meanwhile."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from infra.errors import InputError
from infra.remote import reading
from infra.storage import Storage
from pipelines.ingest.sources.base import Piece


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


def _of_each(pieces: Sequence[Piece], look: Callable[[Storage, str], str]) -> list[tuple[tuple[Storage, str], str]]:
    """Calls `look` for every file, each once; a version of a table never changes, and its identity stands for it."""
    single = [part for piece in pieces for part in (piece.parts or (piece,))]
    known = {(piece.folder, name): piece.identity for piece in single for name in piece.files}
    files = [(reading(folder), name, identity) for (folder, name), identity in known.items()]
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(lambda file: file[2] or look(file[0], file[1]), files)
        return [((storage, name), said) for (storage, name, _), said in zip(files, found, strict=True)]
