"""Folders of models at addresses (s3:// and others): fetched once per node, and published whole or not at all.

Route: files -> uploaded below the address -> the manifest, which is written last and names each file with its size and
digest. A reader begins with the manifest, takes just its files into a folder of the node's cache that is named after
the manifest's digest, and compares each file with it: half an upload, or files of two, are never read.
The files keep their names, so that other programs read a published folder too.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from infra import temporary
from infra.errors import ConcurrentRunError, InputError
from infra.remote import reading
from infra.storage import Storage, retrying

MANIFEST = "pplug-manifest.json"
"""Name of the file that is written last. A published folder without it is not whole."""
REPLACING = "pplug-manifest.replacing"
"""Name of the file that names a writer at work and the files which it may replace: after a kill they may be others than
the manifest says, though of the same size."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")
"""Ends of the names of files that a caller who wants no weights does without."""
UNUSED_DAYS = 30.0
"""Days after which a cached folder that nobody has asked for is deleted."""
REPLACED_WAIT_S = 60.0
"""Seconds for which a reader waits for a writer that is replacing the files."""
_BLOCK = 2**22


def is_address(where: str | os.PathLike[str]) -> bool:
    """Says whether this is an address such as s3://bucket/plug, and not a folder of this machine."""
    text = os.fspath(where)
    return "://" in text and not text.startswith("file://")


def cache_folder() -> Path:
    """Folder of this node for what is fetched: $PPLUG_CACHE, or pplug in the user's cache."""
    own = os.environ.get("PPLUG_CACHE")
    return (
        Path(own).expanduser() if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pplug"
    )


class _Replaced(Exception):
    """A file is not the one that the manifest names."""


def exists(uri: str) -> bool:
    """Says whether a whole folder has been published at an address."""
    return reading(uri).is_file(MANIFEST)


def fetch(where: str, weights: bool = True) -> Path:
    """Returns a folder of this machine with the files of `where`; processes of one node fetch them once.

    Args:
        where: a folder of this machine, which is returned as it is, or an address.
        weights: False leaves the weights out; their digests stand in the manifest, which is a file of the folder.

    Raises:
        InputError: there is no whole folder at the address, or its files are being replaced.
    """
    if not is_address(where):
        return Path(os.fspath(where).removeprefix("file://")).expanduser()
    storage, until = reading(where), time.monotonic() + REPLACED_WAIT_S
    while True:
        content = _read_manifest(storage)
        try:
            return _cached(storage, content, weights)
        except _Replaced as error:
            if time.monotonic() > until:
                raise InputError(
                    f"{storage.uri}: {error}: a writer is replacing the files, or was killed while it did; run again "
                    "the job that publishes them"
                ) from error
            time.sleep(1.0)


def publish(folder: Path, uri: str) -> tuple[int, int]:
    """Uploads a folder; its manifest comes last. Files that are there already, of the same content, stay.

    Returns:
        Number of files uploaded, and of files that were there.

    Raises:
        InputError: the address is one that is only read.
        ConcurrentRunError: another writer publishes here at the same time, and files of both may lie there.
    """
    storage, writer = Storage(uri), uuid.uuid4().hex
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {name: path for name, path in files.items() if name not in (MANIFEST, REPLACING)}  # of a copy's source
    with ThreadPoolExecutor(8) as pool:
        facts = dict(zip(files, pool.map(_facts, files.values()), strict=True))
        doubtful = _mark(storage)[1]
        # before the manifest is read: of two writers one then sees the other's files or is seen at its end
        _put_mark(storage, writer, doubtful | files.keys())
        before = _files(storage.read_bytes(MANIFEST)) if storage.is_file(MANIFEST) else {}
        there = storage.facts()
        todo = [
            name
            for name in files
            if before.get(name) != facts[name]
            or name not in there
            or there[name].size != facts[name]["size"]
            or name in doubtful
        ]
        gone = (before.keys() | doubtful) - facts.keys()
        if _mark(storage)[0] == writer:
            _put_mark(storage, writer, doubtful | set(todo) | gone)
        for _ in pool.map(lambda name: retrying(partial(_upload, storage, name, files[name]), f"write {name}"), todo):
            pass
    _refuse_another_writer(storage, writer, files.keys() | gone)
    content = json.dumps({"format": 1, "files": facts}, indent=1, sort_keys=True)
    storage.write_bytes(MANIFEST, content.encode())
    for name in gone:
        storage.delete(name)
    _refuse_another_writer(storage, writer, files.keys() | gone)  # a write may have waited while another published
    try:
        storage.delete(REPLACING)
    except PermissionError:  # who may not delete says that nothing is doubtful any more
        _put_mark(storage, writer, ())
    return len(todo), len(files) - len(todo)


def _refuse_another_writer(storage: Storage, writer: str, names: Iterable[str]) -> None:
    """Refuses to go on where the mark is not one's own; it leaves one, so that the other stops too, and a later writer
    uploads all of these files.

    Raises:
        ConcurrentRunError: another writer is, or was, at work.
    """
    found, doubtful = _mark(storage)
    if found == writer:
        return
    _put_mark(storage, writer, doubtful | set(names))
    raise ConcurrentRunError(
        f"{storage.uri}: another job publishes here at the same time, so that files of both may lie there. Run one of "
        "them again when both have ended, and it uploads all files anew"
    )


def _mark(storage: Storage) -> tuple[str | None, set[str]]:
    """The writer that is, or was, at work at an address, and the files that are doubtful; None, and none of them."""
    try:
        mark = json.loads(storage.read_bytes(REPLACING))
    except FileNotFoundError:
        return None, set()
    # a list of names alone is of the release before
    return (None, set(mark)) if isinstance(mark, list) else (mark["writer"], set(mark["files"]))


def _put_mark(storage: Storage, writer: str, names: Iterable[str]) -> None:
    storage.write_bytes(REPLACING, json.dumps({"writer": writer, "files": sorted(names)}).encode())


def check_publishable(uri: str, known: Sequence[str]) -> None:
    """Refuses an address that a folder cannot be published at; a job asks before it works for hours.

    Args:
        known: patterns of the names that such a folder may hold.

    Raises:
        ValueError: something else lies there.
        InputError: the address is one that is only read.
    """
    storage = Storage(uri)
    if not storage.is_s3:
        raise InputError(f"{uri}: not an address to publish at; expected s3://bucket/prefix")
    manifest = _files(storage.read_bytes(MANIFEST)) if storage.is_file(MANIFEST) else {}
    replaced = _mark(storage)[1]
    patterns = (*known, *(f"{one}/*" for one in known))
    strange = [
        name
        for name in storage.list()
        if name not in {MANIFEST, REPLACING, *manifest, *replaced} and not any(fnmatch(name, one) for one in patterns)
    ]
    if strange:
        raise ValueError(
            f"{uri} holds {strange[0]} ({len(strange)} such in all): only {', '.join(known)} belong there; give an "
            "address of its own"
        )


@contextmanager
def published(uri: str) -> Iterator[Path]:
    """Yields an empty local folder, which is published when the block ends without an error."""
    with temporary.folder("publish") as folder:
        yield Path(folder)
        publish(Path(folder), uri)


# --- parts


def _read_manifest(storage: Storage) -> bytes:
    try:
        return storage.read_bytes(MANIFEST)
    except FileNotFoundError as error:
        raise InputError(
            f"{storage.uri}: no {MANIFEST}, so that nothing whole has been published there; correct the address, wait "
            f"for the job that writes it, or put a folder there with `publish FOLDER --to {storage.uri}`"
        ) from error


def _files(manifest: bytes) -> dict[str, dict[str, Any]]:
    """Size and digest by name."""
    try:
        found: dict[str, dict[str, Any]] = json.loads(manifest)["files"]
        if all({"size", "sha256"} <= facts.keys() for facts in found.values()):
            return found
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise InputError(f"{MANIFEST}: not a manifest of this release; publish the folder again")


def _cached(storage: Storage, content: bytes, weights: bool) -> Path:
    files = _files(content)
    for name in files:
        if name.startswith("/") or ".." in name.split("/"):
            raise InputError(f"{storage.full(MANIFEST)}: names {name!r}, which leads out of its folder")
    root = cache_folder() / "artifacts"
    whole = root / hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:32]
    wanted = [name for name in files if weights or not name.endswith(WEIGHTS)]
    folder = whole if len(wanted) == len(files) or whole.is_dir() else whole.with_name(f"{whole.name}-texts")
    root.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes of one node wait here for the first of them
        if not folder.is_dir():
            _sweep(root, folder)
            draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}~", dir=root))
            try:
                _download(storage, {name: files[name] for name in wanted}, draft)
                (draft / MANIFEST).write_bytes(content)
                draft.rename(folder)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        os.utime(folder)  # in use
    return folder


def _sweep(root: Path, folder: Path) -> None:
    """Removes drafts of killed processes, since we hold the lock, and folders that nobody has asked for in weeks."""
    for draft in root.glob(f".{folder.name}~*"):
        shutil.rmtree(draft, ignore_errors=True)
    for old in root.iterdir():
        try:
            if old.is_dir() and time.time() - old.stat().st_mtime > UNUSED_DAYS * 86_400:
                shutil.rmtree(old, ignore_errors=True)
        except FileNotFoundError:  # another process was quicker
            continue


def _download(storage: Storage, files: dict[str, dict[str, Any]], folder: Path) -> None:
    def one(name: str) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            found = retrying(partial(_copy, storage, name, path), f"read {storage.full(name)}")
        except FileNotFoundError as error:
            raise _Replaced(f"{name} is not there") from error
        if found != files[name]:
            raise _Replaced(f"{name} is not the one that {MANIFEST} names")

    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(one, files):
            pass


def _copy(storage: Storage, name: str, path: Path) -> dict[str, Any]:
    with storage.open_input(name) as source, path.open("wb") as out:
        return _pass_on(iter(partial(source.read, _BLOCK), b""), out)


def _upload(storage: Storage, name: str, path: Path) -> None:
    with path.open("rb") as source, storage.open_output(name) as out:
        while block := source.read(_BLOCK):
            out.write(block)


def _facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as source:
        return _pass_on(iter(partial(source.read, _BLOCK), b""))


def _pass_on(blocks: Iterable[bytes], out: Any = None) -> dict[str, Any]:
    """Size and digest of the bytes, which are written to `out` on the way."""
    size, digest = 0, hashlib.sha256()
    for block in blocks:
        size += len(block)
        digest.update(block)
        if out is not None:
            out.write(block)
    return {"size": size, "sha256": digest.hexdigest()}
