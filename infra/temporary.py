"""Folders among the temporary files that hold users' data, and that outlive a killed process no longer than needed.

A folder is called `pplug-<what>-<host>-<32 digits>`, and whoever has made it holds a lock on it (flock) while it is
needed: the system takes the lock away with the process. Whoever makes one removes those of the same kind and host that
nobody holds. A process number would not do: containers that share a folder count their processes apart. The host stands
in the name because some network disks keep locks per machine. Where a disk has no locks at all, the folders of killed
processes stay, and so do those of a container whose host name does not come back.
"""

import fcntl
import os
import re
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path

PREFIX = "pplug-"
_held: dict[Path, int] = {}
"""Folders of this process, each with the open file that has its lock."""


@contextmanager
def folder(what: str) -> Iterator[str]:
    """Makes a folder among the temporary files, which is removed at the end of the `with` block.

    Args:
        what: word for what it holds, as in `pplug-train-…`.
    """
    path = lasting(what, tempfile.gettempdir())
    try:
        yield str(path)
    finally:
        remove(path)


def lasting(what: str, parent: str) -> Path:
    """Makes a folder in `parent`, such as a disk in memory, which its owner gives to `remove`."""
    _sweep(what, parent)
    path = Path(parent) / f"{_kind(what)}{uuid.uuid4().hex}"
    made = path.with_name(f".{path.name}")  # without its name, until nobody can sweep it
    made.mkdir(0o700)
    lock = os.open(made, os.O_RDONLY)
    with suppress(OSError):  # a disk without locks
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    made.rename(path)
    _held[path] = lock
    return path


def remove(path: Path) -> None:
    """Removes a folder of `lasting`; one that is no longer there is no error."""
    shutil.rmtree(path, ignore_errors=True)
    if (lock := _held.pop(path, None)) is not None:
        os.close(lock)


def _kind(what: str) -> str:
    """The beginning of the names of this machine's folders of one kind."""
    host = blake2b(socket.gethostname().encode(), digest_size=4).hexdigest()
    return f"{PREFIX}{what}-{host}-"


def _sweep(what: str, parent: str) -> None:
    """Removes the folders of killed processes."""
    for path in Path(parent).glob(f"{_kind(what)}*"):
        if not re.fullmatch("[0-9a-f]{32}", path.name.removeprefix(_kind(what))):
            continue
        with suppress(OSError):  # held, another user's, no folder, or on a disk without locks
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)
