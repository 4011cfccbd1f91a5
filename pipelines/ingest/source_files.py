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
    """Calls `look` for every file, each once."""
    addresses = dict.fromkeys((piece.folder, name) for piece in pieces for name in piece.files)
    files = [(reading(folder), name) for folder, name in addresses]
    with ThreadPoolExecutor(16) as pool:
        return list(zip(files, pool.map(lambda file: look(*file), files), strict=True))
