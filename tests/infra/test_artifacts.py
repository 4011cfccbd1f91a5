"""Folders at addresses: fetched once per node, published whole or not at all, and never read half."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from infra import artifacts
from infra.errors import ConcurrentRunError, InputError
from infra.storage import Storage

ROOT = Path(__file__).parents[2]
KNOWN = ("config.json", "*.safetensors", "query_encoder")
FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 4_000, "query_encoder/config.json": b"[1]"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PPLUG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def folder(root, **changed):
    for name, content in (FILES | changed).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def content(root):
    files = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    files.pop(artifacts.MANIFEST, None)
    return files


def asked(s3_server, method):
    """Addresses of the requests from now on, by the server's own account."""
    seen = []

    def note(environ):
        if environ["REQUEST_METHOD"] == method and "list-type" not in environ.get("QUERY_STRING", ""):
            seen.append(environ["PATH_INFO"].rpartition("/")[2])

    s3_server.fault = note
    return seen


def test_what_was_published_is_fetched_once_and_is_the_same(s3_server, s3, tmp_path):
    assert artifacts.publish(folder(tmp_path / "plug"), s3) == (3, 0)
    assert artifacts.exists(s3) and not artifacts.exists(f"{s3}/other")
    gets = asked(s3_server, "GET")
    first = artifacts.fetch(s3)
    assert content(first) == FILES
    assert {name for name in gets if name != artifacts.MANIFEST} == {"config.json", "model.safetensors"}
    del gets[:]
    assert artifacts.fetch(s3) == first
    assert set(gets) == {artifacts.MANIFEST}
    assert artifacts.publish(tmp_path / "plug", s3) == (0, 3)  # all there


def test_a_copy_of_what_was_published_elsewhere_is_published_anew(s3_server, s3, tmp_path):
    artifacts.publish(folder(tmp_path / "plug"), f"{s3}/one")
    (tmp_path / "copy").mkdir()
    for name, data in {**FILES, artifacts.MANIFEST: Storage(f"{s3}/one").read_bytes(artifacts.MANIFEST)}.items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(data)
    (tmp_path / "copy" / "config.json").write_bytes(b"changed")
    assert artifacts.publish(tmp_path / "copy", f"{s3}/two") == (3, 0)
    assert content(artifacts.fetch(f"{s3}/two")) == FILES | {"config.json": b"changed"}


def test_processes_of_one_node_that_come_at_once_fetch_once(s3_server, s3, tmp_path):
    artifacts.publish(folder(tmp_path / "plug"), s3)
    gets = asked(s3_server, "GET")
    code = "import sys; from infra import artifacts; print(artifacts.fetch(sys.argv[1]))"

    def one(_):
        return subprocess.run([sys.executable, "-c", code, s3], cwd=ROOT, capture_output=True, text=True, check=True)

    with ThreadPoolExecutor(3) as pool:
        places = {done.stdout for done in pool.map(one, range(3))}
    assert len(places) == 1
    assert gets.count(artifacts.MANIFEST) >= 3 and gets.count("model.safetensors") == 1


def test_half_an_upload_is_refused_by_the_name_of_what_lacks(s3_server, s3, tmp_path):
    def no_manifest(environ):
        return "403" if environ["REQUEST_METHOD"] == "PUT" and artifacts.MANIFEST in environ["PATH_INFO"] else None

    s3_server.fault = no_manifest  # as if the writer had been killed before its last file
    with pytest.raises(PermissionError):
        artifacts.publish(folder(tmp_path / "plug"), s3)
    s3_server.fault = lambda environ: None
    assert Storage(s3).list() == sorted({*FILES, artifacts.REPLACING})
    with pytest.raises(InputError, match=f"{s3}: no {artifacts.MANIFEST}, .*publish FOLDER --to {s3}"):
        artifacts.fetch(s3)
    artifacts.check_publishable(s3, KNOWN)  # the writer may come back
    artifacts.publish(tmp_path / "plug", s3)
    assert content(artifacts.fetch(s3)) == FILES


def test_files_of_two_publications_are_never_read_together(s3, tmp_path, monkeypatch, cache):
    artifacts.publish(folder(tmp_path / "one"), s3)
    Storage(s3).write_bytes("config.json", b"{2}")  # the second writer is on its way
    monkeypatch.setattr(artifacts, "REPLACED_WAIT_S", 0.0)
    with pytest.raises(InputError, match="config.json is not the one that pplug-manifest.json names: a writer"):
        artifacts.fetch(s3)
    assert not [path for path in (cache / "artifacts").iterdir() if path.is_dir()]
    newer = folder(tmp_path / "two", **{"config.json": b"{2}"})
    (newer / "query_encoder" / "config.json").unlink()
    artifacts.publish(newer, s3)
    assert content(artifacts.fetch(s3)) == content(newer)
    assert Storage(s3).list() == ["config.json", "model.safetensors", artifacts.MANIFEST]


def test_a_reader_waits_for_a_writer_that_replaces_the_files(s3, tmp_path, monkeypatch):
    artifacts.publish(folder(tmp_path / "one"), s3)
    Storage(s3).write_bytes("config.json", b"{2}")
    newer = folder(tmp_path / "two", **{"config.json": b"{2}"})
    monkeypatch.setattr(artifacts.time, "sleep", lambda pause: artifacts.publish(newer, s3))
    assert content(artifacts.fetch(s3)) == content(newer)


def test_weights_stay_where_they_are_for_a_caller_who_needs_none(s3_server, s3, tmp_path):
    artifacts.publish(folder(tmp_path / "llm"), s3)
    gets = asked(s3_server, "GET")
    texts = artifacts.fetch(s3, weights=False)
    assert content(texts).keys() == {"config.json", "query_encoder/config.json"} and "model.safetensors" not in gets
    assert content(artifacts.fetch(s3)) == FILES
    assert content(artifacts.fetch(s3, weights=False)) == FILES  # they are there now


def test_what_else_lies_at_an_address_is_not_written_over(s3, tmp_path):
    Storage(s3).write_bytes("histories/_delta_log/0.json", b"{}")
    with pytest.raises(ValueError, match=f"{s3} holds histories/_delta_log/0.json .*give an address of its own"):
        artifacts.check_publishable(s3, KNOWN)
    with pytest.raises(InputError, match="expected .*s3://bucket/prefix"):
        artifacts.check_publishable("gs://bucket/plug", KNOWN)


def test_any_address_that_fsspec_knows_is_read(s3, tmp_path):
    artifacts.publish(folder(tmp_path / "plug"), s3)
    memory = fsspec.filesystem("memory")
    for name in Storage(s3).list():
        memory.pipe(f"/plugs/one/{name}", Storage(s3).read_bytes(name))
    try:
        assert artifacts.fetch("memory://plugs/one") == artifacts.fetch(s3)  # the same content, the same folder
    finally:
        memory.rm("/plugs", recursive=True)


def test_a_manifest_cannot_lead_out_of_the_cache(s3, tmp_path):
    artifacts.publish(folder(tmp_path / "plug"), s3)
    evil = Storage(s3).read_bytes(artifacts.MANIFEST).replace(b'"config.json"', b'"../../config.json"')
    Storage(s3).write_bytes(artifacts.MANIFEST, evil)
    with pytest.raises(InputError, match="leads out of its folder"):
        artifacts.fetch(s3)


def test_folders_of_this_machine_stay_as_they_are(tmp_path):
    assert artifacts.fetch(str(tmp_path)) == artifacts.fetch(f"file://{tmp_path}") == tmp_path


def test_a_publish_that_dies_before_its_last_deletes_can_be_run_again(s3_server, s3, tmp_path, monkeypatch):
    """A folder with fewer files than the one before: four shards have become two."""
    artifacts.publish(folder(tmp_path / "one", **{"shard-4": b"old"}), s3)
    delete = Storage.delete

    def dies(storage, name):
        raise ConnectionAbortedError("the publisher dies here")

    monkeypatch.setattr(Storage, "delete", dies)
    with pytest.raises(ConnectionAbortedError):
        artifacts.publish(folder(tmp_path / "two"), s3)
    monkeypatch.setattr(Storage, "delete", delete)
    assert content(artifacts.fetch(s3)) == FILES and Storage(s3).is_file("shard-4")
    artifacts.check_publishable(s3, tuple(FILES))  # the file that is left is no stranger's
    assert artifacts.publish(tmp_path / "two", s3)[1] == 3 and not Storage(s3).is_file("shard-4")


def test_the_former_model_can_be_put_back_after_a_publish_that_was_killed(s3_server, s3, tmp_path, monkeypatch):
    """The second model's weights are as large as the first's, and its publish dies before the manifest."""
    monkeypatch.setattr(artifacts, "REPLACED_WAIT_S", 0.0)
    artifacts.publish(folder(tmp_path / "one"), s3)
    turned = bytes(reversed(FILES["model.safetensors"]))
    write = Storage.write_bytes

    def dies(storage, name, content, *more):
        if name == artifacts.MANIFEST:
            raise ConnectionAbortedError("the publisher dies here")
        return write(storage, name, content, *more)

    monkeypatch.setattr(Storage, "write_bytes", dies)
    with pytest.raises(ConnectionAbortedError):
        artifacts.publish(folder(tmp_path / "two", **{"model.safetensors": turned}), s3)
    monkeypatch.setattr(Storage, "write_bytes", write)
    artifacts.check_publishable(s3, tuple(FILES))
    assert artifacts.publish(tmp_path / "one", s3) == (1, 2)
    assert content(artifacts.fetch(s3)) == FILES
    assert artifacts.publish(tmp_path / "one", s3) == (0, 3)


def test_of_two_publishers_at_once_one_is_told_and_a_rerun_mends_what_they_left(s3, tmp_path, monkeypatch):
    """The second's file lies there first, then the first's: of the same size, and another than the second would say."""
    monkeypatch.setattr(artifacts, "REPLACED_WAIT_S", 0.0)
    artifacts.publish(folder(tmp_path / "before"), s3)
    one = folder(tmp_path / "one", **{"model.safetensors": bytes(reversed(FILES["model.safetensors"]))})
    two = folder(tmp_path / "two", **{"model.safetensors": FILES["model.safetensors"][::-2] * 2})
    upload, ended = artifacts._upload, []

    def beside(storage, name, path):
        upload(storage, name, path)
        if path.is_relative_to(two) and not ended:
            ended.append(True)
            artifacts.publish(one, s3)

    monkeypatch.setattr(artifacts, "_upload", beside)
    with pytest.raises(ConcurrentRunError, match="another job publishes here at the same time"):
        artifacts.publish(two, s3)
    assert ended
    assert artifacts.publish(two, s3)[0] == 3  # whoever runs again uploads all
    assert content(artifacts.fetch(s3)) == content(two)
    assert not Storage(s3).is_file(artifacts.REPLACING)


@pytest.mark.parametrize("step", ["write_bytes", "delete"])
def test_a_publisher_that_is_held_up_at_its_end_notices_another(s3, tmp_path, monkeypatch, step):
    """At its manifest, or at a file that it removes, which the other one has."""
    artifacts.publish(folder(tmp_path / "before", extra=b"old"), s3)
    one = folder(tmp_path / "one", **{"model.safetensors": bytes(reversed(FILES["model.safetensors"]))})
    two = folder(tmp_path / "two", **{"model.safetensors": FILES["model.safetensors"][::-2] * 2, "extra": b"new"})
    at, ended = {"write_bytes": artifacts.MANIFEST, "delete": "extra"}[step], []
    does = getattr(Storage, step)

    def held_up(storage, name, *more):
        if name == at and not ended:
            ended.append(True)
            artifacts.publish(two, s3)
        return does(storage, name, *more)

    monkeypatch.setattr(Storage, step, held_up)
    with pytest.raises(ConcurrentRunError, match="another job publishes here at the same time"):
        artifacts.publish(one, s3)
    assert ended
    artifacts.publish(one, s3)
    assert content(artifacts.fetch(s3)) == content(one)


def test_who_may_not_delete_publishes_all_the_same(s3, tmp_path, monkeypatch):
    def refused(storage, name):
        raise PermissionError(name)

    monkeypatch.setattr(Storage, "delete", refused)
    assert artifacts.publish(folder(tmp_path / "one"), s3) == (3, 0)
    assert artifacts.publish(tmp_path / "one", s3) == (0, 3)


def test_a_mark_of_the_release_before_still_names_doubtful_files(s3, tmp_path):
    artifacts.publish(folder(tmp_path / "one"), s3)
    Storage(s3).write_bytes(artifacts.REPLACING, b'["model.safetensors", "shard-9"]')
    artifacts.check_publishable(s3, tuple(FILES))
    assert artifacts.publish(tmp_path / "one", s3) == (1, 2)
