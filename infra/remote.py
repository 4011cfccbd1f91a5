"""Files of a source at any address that fsspec knows: gs, az, https, hf, memory and others, for reading only.

Tables stay on a disk or on S3 (`infra/storage.py`), since a commit needs what these two promise.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs

from infra.errors import InputError
from infra.storage import FileFacts, Storage, retrying

EXTRAS = {"gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure", "adl": "azure"}
"""Extra of this package that brings the library of an address's scheme."""
_MARKS = ("ETag", "etag", "md5Hash", "md5", "content_settings", "blob_id", "checksum", "LastModified", "last_modified")
"""Facts of a listing that change when a file is written again, the surest first."""


def reading(uri: str) -> Storage:
    """Opens a folder for reading: a local path, S3, or any address that fsspec has a library for.

    Raises:
        InputError: the scheme is not known, or its library is not installed.
    """
    scheme, is_address, _ = uri.partition("://")
    return Remote(uri) if is_address and scheme not in ("s3", "file") else Storage(uri)


@lru_cache(maxsize=8)
def _library(scheme: str) -> Any:
    try:
        kind = fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        extra = EXTRAS.get(scheme)
        advice = f"pip install 'pplug[{extra}]'" if extra else "install the package that the message names"
        raise InputError(f"{scheme}:// addresses need a package that is not installed ({error}): {advice}") from error
    except ValueError as error:
        raise InputError(
            f"{scheme}://: no library is known for this kind of address; expected a local path, s3://bucket/prefix, "
            "or gs://, az://, https://, hf://"
        ) from error
    return kind(use_listings_cache=False, skip_instance_cache=True)


@dataclass(frozen=True)
class Remote(Storage):
    """A folder at an address that fsspec reads. Credentials come from the usual environment of its library."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "uri", self.uri.rstrip("/"))
        _library(self.scheme)

    @property
    def scheme(self) -> str:
        """Part of the address before `://`."""
        return self.uri.partition("://")[0]

    @property
    def path(self) -> str:
        return _library(self.scheme)._strip_protocol(self.uri).rstrip("/")

    @property
    def filesystem(self) -> pafs.FileSystem:
        return pafs.PyFileSystem(pafs.FSSpecHandler(_library(self.scheme)))

    def join(self, *names: str) -> Storage:
        return Remote(self.full("/".join(names)))

    def facts(self, name: str = "") -> dict[str, FileFacts]:
        """Returns the size of every file below, by name relative to this folder; the time is 0 where none is told."""
        at = self._at(name)

        def look() -> dict[str, FileFacts]:
            found = _library(self.scheme).find(at, detail=True)
            return {path: FileFacts(info.get("size") or 0, 0.0) for path, info in found.items()}

        facts = retrying(look, f"list {self.full(name)}")
        return {path.removeprefix(self.path + "/"): facts[path] for path in sorted(facts)}

    def state_of(self, name: str) -> str:
        """Describes a file unread: its size, and the mark by which its storage tells two versions apart."""
        info = retrying(lambda: _library(self.scheme).info(self._at(name)), f"look at {self.full(name)}")
        mark = next((f"{key} {info[key]}" for key in _MARKS if info.get(key)), "no mark")
        return f"{info.get('size')} bytes, {mark}"

    def content_of(self, name: str) -> str:
        """Describes the content of a file: its size and its digest; the file is read for it."""
        digest, size = hashlib.blake2b(digest_size=16), 0
        with self.open_input(name) as stream:
            while block := stream.read(2**22):
                digest.update(block)
                size += len(block)
        return f"{size} bytes, digest {digest.hexdigest()}"

    def write_bytes(self, name: str, data: bytes) -> None:
        raise self._refusal()

    def delete(self, name: str) -> None:
        raise self._refusal()

    def open_output(self, name: str) -> pa.NativeFile:
        raise self._refusal()

    def _refusal(self) -> InputError:
        return InputError(
            f"{self.uri}: addresses of this kind are only read; write to a local path or s3://bucket/prefix"
        )
