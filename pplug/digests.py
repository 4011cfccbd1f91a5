"""Digests of large files without reading them at every start: the hub's own, or one kept beside size and time.

A file in the hub's cache is a link to one that is named after its SHA-256. Another file is read once; its digest is
kept in the user's cache folder as long as its size and time stay.
"""

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

KEPT_BYTES = 64 * 2**20
"""A smaller file is read anew each time, in less than a tenth of a second."""
_SETTLED_S = 2.0
"""A file that was written within these seconds may be written again without a change of its time."""


def cache_folder() -> Path:
    """Folder of files that can be made again: $PPLUG_CACHE, or pplug in the user's cache."""
    if own := os.environ.get("PPLUG_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pplug"


def sha256(path: Path) -> str:
    """64 hex characters of a file's bytes; those of a file in the hub's cache are its name there."""
    blob = path.resolve()
    if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
        return blob.name
    return _kept(path, "sha256", hashlib.sha256)


def blake2b(path: Path) -> str:
    """32 hex characters of a file's bytes."""
    return _kept(path, "blake2b", lambda: hashlib.blake2b(digest_size=16))


def _kept(path: Path, name: str, make: Callable[[], Any]) -> str:
    """The digest that was kept for this file as it is now, or a new one."""
    state = path.stat()
    if state.st_size < KEPT_BYTES:
        return _read(path, make)
    address = str(path.resolve())
    key = hashlib.blake2b(f"{name}:{address}".encode(), digest_size=16).hexdigest()
    kept = cache_folder() / "digests" / f"{key}.json"
    now = {"path": address, "size": state.st_size, "mtime_ns": state.st_mtime_ns, "inode": state.st_ino}
    known = _known(kept, now)
    if known is not None:
        return known
    digest = _read(path, make)
    if time.time() - state.st_mtime > _SETTLED_S and path.stat().st_mtime_ns == state.st_mtime_ns:
        _keep(kept, json.dumps(now | {"digest": digest}))
    return digest


def _known(kept: Path, now: dict[str, Any]) -> str | None:
    """The digest of a record, where it is whole and of the file as it is now."""
    try:
        record = json.loads(kept.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    digest = record.pop("digest", None) if isinstance(record, dict) else None
    return digest if isinstance(digest, str) and record == now else None


def _read(path: Path, make: Callable[[], Any]) -> str:
    with path.open("rb") as file:
        return str(hashlib.file_digest(file, make).hexdigest())


def _keep(path: Path, content: str) -> None:
    """Writes a file as a whole; where the folder cannot be written to, nothing is kept."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as draft:
            draft.write(content)
        os.replace(draft.name, path)
    except OSError:
        return
