"""Files on a local disk or on S3 behind one interface.

A `Storage` is a folder: a local path or `s3://bucket/prefix`. It pickles as its address only: every process opens its
own connection, with endpoint and credentials as `infra/s3.py` finds them on its machine, so that these are in no
config, log or pickle. An operation that fails for a moment (503, time-out, cut connection) is
tried again with backoff and jitter, within a budget of seconds.
"""

import hashlib
import os
import random
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from infra import s3
from infra.errors import InputError

T = TypeVar("T")

BUDGET_S = 120.0
"""Seconds for which one operation is tried again before its error is passed on; PPLUG_STORAGE_BUDGET_S overrides."""

DRAFT = re.compile(r"\.[0-9a-f]{32}\.tmp")
"""Name of a file on a local disk that is being written, or that a killed writer has left."""
DRAFT_S = 3600.0
"""Seconds without a write after which a draft is a killed writer's."""

_TRANSIENT_TYPES = frozenset(  # by name: botocore, aiohttp and urllib3 are not imported just to know their errors
    "TimeoutError ConnectTimeoutError ReadTimeoutError EndpointConnectionError ConnectionClosedError HTTPClientError "
    "ServerDisconnectedError ClientPayloadError ClientOSError ClientConnectorError ServerTimeoutError "
    "IncompleteReadError ResponseStreamingError ConnectionError "
    "FileExpired".split()  # s3fs: the object was written anew between its opening and its reading
)
_ACCESS_TYPES = re.compile(rf"\b({'|'.join(sorted(_TRANSIENT_TYPES))}|ConnectionResetError|PermissionError)\b")
_TRANSIENT_TEXT = re.compile(
    # A bare 503 may be part of a file's name; it counts only as a status.
    r"(status|code|error|http|server)[^\n]{0,20}\b50[0234]\b|\b50[0234] (internal|bad|service|gateway|slow)"
    r"|slow ?down|internal ?error|service ?unavailable|request ?timeout|timed out"
    r"|connection (reset|closed|refused|aborted)|broken pipe|server disconnected|reduce your request rate|try again"
    r"|incompleteread|incomplete message|error sending request|error decoding response body"
    r"|response payload is not completed|error reading a body|end of file before message length|response body error",
    re.IGNORECASE,
)
_READINGS = 20
"""Number of times that a folder is read anew which others change meanwhile."""
_SLASH_LOST = re.compile(r"(s3|gs|gcs|az|abfss?|https?):/(?!/)")
"""An address that went through a path, which makes one slash of two: it would be a folder called `s3:`."""
_UPLOAD_GONE = "(NoSuchUpload)"
"""Code of an upload that S3 has completed when the answer was lost: the repetition finds none. s3fs tells of it as of
a missing file, with botocore's error as the cause. To write the file again is safe."""
_FINAL = (InputError, pa.ArrowInvalid, FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError)


def is_transient(error: BaseException | None) -> bool:
    """Says whether trying again may help. It looks through the causes, because libraries wrap the decisive error."""
    depth = 0
    while error is not None and depth < 8:
        if _UPLOAD_GONE in str(error.__cause__):
            return True
        if isinstance(error, _FINAL) or not isinstance(error, Exception):
            return False
        if isinstance(error, ConnectionError) or type(error).__name__ in _TRANSIENT_TYPES:
            return True
        if _TRANSIENT_TEXT.search(str(error)):
            return True
        error, depth = error.__cause__ or error.__context__, depth + 1
    return False


def tells_of_access(words: str) -> bool:
    """True for the words of an error, all that another library leaves of it, if they tell of a lost connection, a
    missing right, or a server that does not answer."""
    return bool(_TRANSIENT_TEXT.search(words) or _ACCESS_TYPES.search(words))


def retrying(action: Callable[[], T], what: str, budget_s: float | None = None) -> T:
    """Runs `action`, again and again while its error is transient and the budget lasts.

    Raises:
        Exception: the action's last error, with `what` and the number of tries added as a note.
    """
    budget_s = float(os.environ.get("PPLUG_STORAGE_BUDGET_S", BUDGET_S)) if budget_s is None else budget_s
    end, tries = time.monotonic() + budget_s, 0
    while True:
        tries += 1
        try:
            return action()
        except Exception as error:
            # Full jitter: a thousand workers refused at once must not come back at once.
            pause = random.uniform(0.05, min(10.0, 0.2 * 2**tries))
            if not is_transient(error) or time.monotonic() + pause > end:
                error.add_note(f"while: {what} (tried {tries} time{'s' if tries > 1 else ''})")
                raise
        time.sleep(pause)


@lru_cache(maxsize=8)
def _s3(around: tuple[tuple[str, str], ...], pid: int) -> pafs.FileSystem:
    # around and pid only part the cache: other credentials or a forked process need another connection.
    import s3fs

    connection = s3.connection()
    filesystem = s3fs.S3FileSystem(
        endpoint_url=connection.endpoint,
        client_kwargs={"region_name": connection.region},
        config_kwargs={
            "retries": {"max_attempts": 2, "mode": "standard"},
            "connect_timeout": 10,
            "read_timeout": 60,
            "max_pool_connections": 32,
        },
        use_listings_cache=False,  # another process's files must be seen
        default_cache_type="none",  # Parquet asks for the ranges it needs; read-ahead would read the gaps too
        default_block_size=16 * 2**20,  # parts of a multipart upload; also what an upload holds in memory
        skip_instance_cache=True,
    )
    filesystem.retries = 2  # times botocore's 2: the layers multiply, and the budget is kept by `retrying` above them
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem))


@dataclass(frozen=True)
class FileFacts:
    """A file's size and time in a listing."""

    size: int
    """Size in bytes."""
    modified: float
    """Time of the last write in seconds since 1970, by the storage's clock."""


@dataclass(frozen=True)
class Storage:
    """A folder, local or on S3. All names given to its methods are relative to it."""

    uri: str

    def __post_init__(self) -> None:
        uri = os.fspath(self.uri)
        if uri.startswith("s3://"):
            uri = uri.rstrip("/")
            if len(uri) <= len("s3://"):
                raise InputError(f"{self.uri!r} names no bucket; expected s3://bucket/prefix")
        elif _SLASH_LOST.match(uri):
            raise InputError(f"{self.uri!r}: an address begins with two slashes; expected s3://bucket/prefix")
        elif "://" in uri and not uri.startswith("file://"):
            raise InputError(
                f"{self.uri!r}: this kind of storage is not known; expected a local path or s3://bucket/prefix"
            )
        else:
            # Absolute at once: a worker's current folder is not the driver's.
            uri = os.path.abspath(os.path.expanduser(uri.removeprefix("file://")))
        object.__setattr__(self, "uri", uri)

    @property
    def is_s3(self) -> bool:
        return self.uri.startswith("s3://")

    @property
    def path(self) -> str:
        """Folder as `filesystem` names it, without a scheme."""
        return self.uri.removeprefix("s3://")

    @property
    def filesystem(self) -> pafs.FileSystem:
        if not self.is_s3:
            return pafs.LocalFileSystem()
        return _s3(s3.surroundings(), os.getpid())

    def delta_options(self) -> dict[str, str]:
        """Returns endpoint and credentials for deltalake, which has an S3 client of its own."""
        if not self.is_s3:
            return {}
        waits = {"timeout": "60s", "connect_timeout": "10s", "max_retries": "5", "retry_timeout": "60s"}
        return s3.connection().delta_options() | waits

    def join(self, *names: str) -> "Storage":
        """Returns the folder below this one."""
        return Storage(self.full("/".join(names)))

    def full(self, name: str) -> str:
        """Returns the whole address of a name in this folder."""
        return f"{self.uri}/{_inside(name)}" if name else self.uri

    def _at(self, name: str) -> str:
        return f"{self.path}/{_inside(name)}" if name else self.path

    def exists(self, name: str = "") -> bool:
        return retrying(lambda: self._info(name).type != pafs.FileType.NotFound, f"look for {self.full(name)}")

    def is_file(self, name: str) -> bool:
        """Says whether a name is a file, and neither a folder nor missing."""
        return retrying(lambda: self._info(name).type == pafs.FileType.File, f"look for {self.full(name)}")

    def is_folder(self, name: str = "") -> bool:
        """Says whether a name is a folder, or on S3 the beginning of names."""
        return retrying(lambda: self._info(name).type == pafs.FileType.Directory, f"look for {self.full(name)}")

    def size(self, name: str) -> int:
        return retrying(lambda: self._info(name).size, f"size of {self.full(name)}")

    def _info(self, name: str) -> pafs.FileInfo:
        return self.filesystem.get_file_info(self._at(name))

    def folders(self, name: str = "") -> list[str]:
        """Lists the names of the folders right below, sorted."""
        selector = pafs.FileSelector(self._at(name), allow_not_found=True)
        infos = retrying(lambda: self._found(selector), f"list {self.full(name)}")
        return sorted(info.base_name for info in infos if info.type == pafs.FileType.Directory)

    def list(self, name: str = "", recursive: bool = True) -> list[str]:
        """Lists the names of all files below, sorted, relative to this folder; none when there is no such folder. Empty
        objects that stand for a folder on S3 are no files."""
        selector = pafs.FileSelector(self._at(name), recursive=recursive, allow_not_found=True)
        infos = retrying(lambda: self._found(selector), f"list {self.full(name)}")
        files = [info for info in infos if info.type == pafs.FileType.File]
        return sorted(info.path.removeprefix(self.path + "/") for info in files if not _is_marker(info.path, info.size))

    def _found(self, selector: pafs.FileSelector) -> "Sequence[pafs.FileInfo]":
        """Reads folders anew where one of them went while they were read: Arrow tells of that as of an error."""
        for _ in range(_READINGS):
            try:
                return self.filesystem.get_file_info(selector)
            except FileNotFoundError:
                pass
        return self.filesystem.get_file_info(selector)

    def facts(self, name: str = "") -> dict[str, "FileFacts"]:
        """Returns size and time of every file below, by name relative to this folder; see `list`."""
        at = self._at(name)

        def look() -> dict[str, FileFacts]:
            if self.is_s3:  # Arrow's wrapper of s3fs has no times
                objects = self.filesystem.handler.fs.find(at, detail=True)
                return {
                    path: FileFacts(info["size"], info["LastModified"].timestamp())
                    for path, info in objects.items()
                    # of an empty folder that gets its first file meanwhile s3fs tells the folder itself
                    if info["type"] == "file" and not _is_marker(path, info["size"])
                }
            infos = self._found(pafs.FileSelector(at, recursive=True, allow_not_found=True))
            files = [info for info in infos if info.type == pafs.FileType.File]
            return {info.path: FileFacts(info.size, info.mtime_ns / 1e9) for info in files}

        facts = retrying(look, f"list {self.full(name)}")
        return {path.removeprefix(self.path + "/"): facts[path] for path in sorted(facts)}

    def state_of(self, name: str) -> str:
        """Describes a file unread, so that a rewrite changes it: size, and ETag on S3 or time of writing on a disk."""
        if self.is_s3:
            facts = retrying(lambda: self.filesystem.handler.fs.info(self._at(name)), f"look at {self.full(name)}")
            return f"{facts['size']} bytes, etag {facts['ETag'].strip(chr(34))}"
        info = retrying(lambda: self._info(name), f"look at {self.full(name)}")
        return f"{info.size} bytes, written at {info.mtime_ns} ns"

    def content_of(self, name: str) -> str:
        """Describes the content of a file: its size, and its ETag on S3 or its digest on a disk."""
        if self.is_s3:
            return self.state_of(name)
        with open(self._at(name), "rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
            return f"{file.tell()} bytes, digest {digest}"

    def read_bytes(self, name: str) -> bytes:
        def read() -> bytes:
            with self.filesystem.open_input_file(self._at(name)) as source:
                return source.readall()

        return retrying(read, f"read {self.full(name)}")

    def write_bytes(self, name: str, data: bytes) -> None:
        """Writes a file whole or not at all: a reader sees the old one or the new one."""
        if self.is_s3:  # an S3 object appears only when its upload is complete
            return retrying(lambda: self._write(self._at(name), data), f"write {self.full(name)}")
        with _in_place(Path(self._at(name))) as out:
            out.write(data)

    def write_file(self, name: str, path: str | Path) -> None:
        """Copies a local file to a name here, whole or not at all, and never all of it in memory."""
        if self.is_s3:
            files = self.filesystem.handler.fs
            return retrying(lambda: files.put_file(str(path), self._at(name)), f"write {self.full(name)}")
        with open(path, "rb") as source, _in_place(Path(self._at(name))) as out:
            shutil.copyfileobj(source, out, 2**20)

    def sweep_drafts(self) -> None:
        """Deletes the drafts that killed writers have left below this folder (`old_drafts`)."""
        for name in self.old_drafts():
            self.delete(name)

    def old_drafts(self, name: str = "") -> Sequence[str]:
        """Lists the drafts below a folder that nobody has written to for an hour: no writer is still at work on them.

        The hour is more than the clocks of this machine and of a shared disk may differ by.
        """
        since = time.time() - DRAFT_S
        files = self.facts(name).items()
        return [one for one, facts in files if DRAFT.fullmatch(one.rpartition("/")[2]) and facts.modified < since]

    def _write(self, path: str, data: bytes) -> None:
        with self.filesystem.open_output_stream(path) as out:
            out.write(data)

    def delete(self, name: str) -> None:
        """Removes a file; a missing file is no error, since the aim is reached.

        Raises:
            PermissionError: the storage does not let these credentials delete it.
        """

        def remove() -> None:
            try:
                if self.is_s3:
                    # Arrow would have s3fs delete all keys that match, and pass over what the server refuses.
                    self.filesystem.handler.fs.rm_file(self._at(name))
                else:
                    self.filesystem.delete_file(self._at(name))
            except FileNotFoundError:
                pass

        retrying(remove, f"delete {self.full(name)}")

    def open_input(self, name: str) -> pa.NativeFile:
        """Opens a seekable file. The caller handles errors while reading: wrap the whole read in `retrying`."""
        return retrying(lambda: self.filesystem.open_input_file(self._at(name)), f"open {self.full(name)}")

    def open_output(self, name: str) -> pa.NativeFile:
        """Opens a stream, multipart on S3. It is not atomic on a local disk: give it a name that no job reads yet."""
        if not self.is_s3:
            Path(self._at(name)).parent.mkdir(parents=True, exist_ok=True)
        return retrying(lambda: self.filesystem.open_output_stream(self._at(name)), f"open {self.full(name)}")


@contextmanager
def _in_place(target: Path) -> Iterator[IO[bytes]]:
    """Yields a draft beside a local file, which takes the file's place when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(draft, "wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)


def _is_marker(path: str, size: int) -> bool:
    """Says whether an object on S3 stands for a folder, as the console leaves one; it cannot be opened as a file."""
    return path.endswith("/") and size == 0


def _inside(name: str) -> str:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise ValueError(f"{name!r}: a name inside a folder must not lead out of it")
    return "/".join(parts)
