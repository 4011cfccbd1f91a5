"""Digests of large files: kept beside size and time, read anew where either changes, taken from the hub's cache."""

import hashlib
import os
import time

import pytest

from pplug import digests


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    """Files of any size are kept, below the test's own folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "KEPT_BYTES", 0)
    return tmp_path / "cache" / "pplug" / "digests"


def write(path, content, age=60.0):
    """A file that was written a while ago, or just now."""
    path.write_bytes(content)
    then = time.time() - age
    os.utime(path, (then, then))
    return path


def test_a_file_is_read_once_and_again_when_it_changes(tmp_path, kept, monkeypatch):
    path, reads = write(tmp_path / "a", b"one"), []
    read = digests._read
    monkeypatch.setattr(digests, "_read", lambda *args: reads.append(args[0]) or read(*args))
    for _ in range(3):
        assert digests.sha256(path) == hashlib.sha256(b"one").hexdigest()
        assert digests.blake2b(path) == hashlib.blake2b(b"one", digest_size=16).hexdigest()
    assert len(reads) == 2 == len(list(kept.iterdir()))
    write(path, b"two", age=50)  # as long as before
    assert digests.sha256(path) == hashlib.sha256(b"two").hexdigest()
    write(path, b"three", age=50)  # at the same time
    assert digests.sha256(path) == hashlib.sha256(b"three").hexdigest()
    assert len(reads) == 4


def test_a_file_of_this_instant_is_not_kept(tmp_path, kept):
    path = write(tmp_path / "a", b"one", age=0)
    assert digests.sha256(path) == hashlib.sha256(b"one").hexdigest()
    assert not kept.exists()


def test_a_cut_or_strange_record_is_made_anew(tmp_path, kept):
    path = write(tmp_path / "a", b"one")
    digests.sha256(path)
    (record,) = kept.iterdir()
    for content in ('{"path": ', "[]", "{}"):
        record.write_text(content)
        assert digests.sha256(path) == hashlib.sha256(b"one").hexdigest()
    assert "digest" in record.read_text()


def test_a_cache_that_cannot_be_written_is_no_hindrance(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = write(tmp_path / "a", b"one")
    assert digests.sha256(path) == hashlib.sha256(b"one").hexdigest()


def test_the_name_of_a_file_in_the_hubs_cache_is_its_digest(tmp_path):
    name, snapshot = "ab" * 32, tmp_path / "snapshots" / "commit"
    (tmp_path / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs" / name).write_bytes(b"not read")
    (snapshot / "model.safetensors").symlink_to(tmp_path / "blobs" / name)
    assert digests.sha256(snapshot / "model.safetensors") == name
    short = "ab" * 20  # a small file is named after git's hash
    (tmp_path / "blobs" / short).write_bytes(b"{}")
    (snapshot / "config.json").symlink_to(tmp_path / "blobs" / short)
    assert digests.sha256(snapshot / "config.json") == hashlib.sha256(b"{}").hexdigest()
