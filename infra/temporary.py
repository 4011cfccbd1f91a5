"""Folders among the temporary files that hold users' data, and that outlive a killed process no longer than needed.

A folder is called `pplug-<what>-…`, and whoever has made it holds a lock on it (flock) while it is needed: the system
takes the lock away with the process. Whoever makes one removes those of the same kind that nobody holds. A process
number would not do: containers that share a folder count their processes apart. Where a disk has no such locks, as some
network disks, the folders of killed processes stay.
"""

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    made = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=parent))  # without its name, until nobody can sweep it
    path = made.with_name(f"{PREFIX}{what}-{made.name.removeprefix(f'.{PREFIX}')}")
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


def _sweep(what: str, parent: str) -> None:
    """Removes the folders of killed processes."""
    for path in Path(parent).glob(f"{PREFIX}{what}-*"):
        found = re.fullmatch(rf"{PREFIX}{what}-(?:(\d+)-)?\w+", path.name)
        if not found or found[1] and Path(f"/proc/{found[1]}").exists():  # of earlier releases, which held no lock
            continue
        with suppress(OSError):  # held, another user's, no folder, or on a disk without locks
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)
