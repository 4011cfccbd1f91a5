"""Folders among the temporary files that hold users' data, and that outlive a killed process no longer than needed.

A folder is called `pplug-<what>-<pid>-<host>-…`. Whoever makes one removes those of the same kind whose process is no
more. The host stands in the name because machines may share a folder of temporary files: another one's process is not
among the processes here, and may be alive.
"""

import os
import re
import shutil
import socket
import tempfile
from hashlib import blake2b
from pathlib import Path

PREFIX = "pplug-"


def folder(what: str) -> "tempfile.TemporaryDirectory[str]":
    """Makes a folder among the temporary files, which is removed at the end of a `with` block.

    Args:
        what: word for what it holds, as in `pplug-train-4711-…`.
    """
    parent = tempfile.gettempdir()
    return tempfile.TemporaryDirectory(prefix=_prefix(what, parent), dir=parent)


def lasting(what: str, parent: str) -> Path:
    """Makes a folder in `parent`, such as a disk in memory, which its owner removes."""
    return Path(tempfile.mkdtemp(prefix=_prefix(what, parent), dir=parent))


def _prefix(what: str, parent: str) -> str:
    """Returns the beginning of a folder's name, after the folders of killed processes have been removed."""
    host = blake2b(socket.gethostname().encode(), digest_size=4).hexdigest()
    for path in Path(parent).glob(f"{PREFIX}{what}-*"):
        found = re.fullmatch(rf"{PREFIX}{what}-(\d+)-{host}-\w+", path.name)
        if found and not _is_alive(int(found[1])):
            shutil.rmtree(path, ignore_errors=True)
    return f"{PREFIX}{what}-{os.getpid()}-{host}-"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True
