"""The files that an ingest reads: which they are, what tells their content, and whether they stay as they are."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from infra.errors import InputError
from infra.storage import Storage
from pipelines.ingest.sources.lamp import LampFiles
from pipelines.ingest.sources.records import Piece


def states(pieces: Sequence[Piece | LampFiles]) -> dict[str, str]:
    """By address of a file, what changes when the file is written again; no file is read."""
    return {
        storage.full(name): state for (storage, name), state in _of_each(pieces, lambda at, name: at.state_of(name))
    }


def contents(pieces: Sequence[Piece | LampFiles]) -> list[tuple[str, str]]:
    """Name of each file in the order of reading, and what tells its content; files on a disk are read for it."""
    return [(name, content) for (_, name), content in _of_each(pieces, lambda at, name: at.content_of(name))]


def refuse_changed(before: dict[str, str], pieces: Sequence[Piece | LampFiles]) -> None:
    """Raises InputError: a file is no longer as it was, so that nobody knows which of its rows were read."""
    for address, state in states(pieces).items():
        if state != before[address]:
            raise InputError(
                f"{address} has changed while it was read: {before[address]}, then {state}; nothing has been written. "
                "Wait until the file is complete, then run ingest again, with another run_id"
            )


def _of_each(
    pieces: Sequence[Piece | LampFiles], look: Callable[[Storage, str], str]
) -> list[tuple[tuple[Storage, str], str]]:
    """What `look` says of every file, each once."""
    found: dict[tuple[str, str], None] = {}
    for piece in pieces:
        names = (piece.questions, piece.outputs) if isinstance(piece, LampFiles) else (piece.name,)
        found |= {(piece.folder, name): None for name in names if name is not None}
    files = [(Storage(folder), name) for folder, name in found]
    with ThreadPoolExecutor(16) as pool:
        return list(zip(files, pool.map(lambda file: look(*file), files), strict=True))
