"""Files on a local disk and on S3: one face, whole or not at all, patient with a storage that fails for a moment."""

import logging
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import boto3
import pytest

from infra import storage as storage_module
from infra import upkeep
from infra.errors import InputError
from infra.storage import Storage, is_transient, retrying
from infra.table import Table


def test_the_same_calls_work_on_a_local_disk_and_on_s3(place):
    store = pickle.loads(pickle.dumps(Storage(place)))
    assert not store.exists("a/b.txt") and store.list() == []
    store.write_bytes("a/b.txt", b"one")
    store.write_bytes("a/b.txt", b"two")
    store.join("a").write_bytes("c.txt", b"")
    with store.open_output("big.bin") as out:
        out.write(b"0123456789" * 100)
    with store.open_input("big.bin") as source:
        source.seek(995)
        assert source.read() == b"56789"
    assert (store.exists("a/b.txt"), store.read_bytes("a/b.txt"), store.size("big.bin")) == (True, b"two", 1000)
    assert store.list() == ["a/b.txt", "a/c.txt", "big.bin"]
    assert store.list("a") == ["a/b.txt", "a/c.txt"] and store.list(recursive=False) == ["big.bin"]
    store.delete("a/b.txt")
    store.delete("a/b.txt")  # the aim is reached already
    assert store.list("a") == ["a/c.txt"]
    with pytest.raises(FileNotFoundError):
        store.read_bytes("a/b.txt")


def test_a_name_with_signs_of_patterns_is_deleted_as_it_stands(place):
    store = Storage(f"{place}/a[1]")
    names = ["a[b].bin", "ab.bin", "a*.bin", "a?.bin"]
    for name in names:
        store.write_bytes(name, b"x")
    for name in ("a[b].bin", "a*.bin", "a?.bin"):
        store.delete(name)
        names.remove(name)
        assert store.list() == sorted(names)


def test_an_empty_object_that_stands_for_a_folder_is_no_file(s3, s3_server):
    """The console of S3 and some copying programs leave one."""
    store = Storage(s3).join("runs")
    store.write_bytes("foo/report.json", b"{}")
    bucket, _, prefix = store.path.partition("/")
    client = boto3.client("s3", endpoint_url=s3_server.url, region_name="us-east-1")
    for folder in ("", "foo/", "empty/"):
        client.put_object(Bucket=bucket, Key=f"{prefix}/{folder}")
    assert store.list() == ["foo/report.json"] and list(store.facts()) == ["foo/report.json"]
    assert store.list(recursive=False) == [] and store.list("empty") == []
    client.put_object(Bucket=bucket, Key=f"{prefix}/full/", Body=b"x")  # an erase must not pass over it
    assert "full/" in store.list() and "full/" in store.facts()


def test_an_upload_larger_than_a_part_arrives_whole(s3):
    data = bytes(range(256)) * (40 * 2**20 // 256)  # 40 MiB: three parts
    with Storage(s3).open_output("large.bin") as out:
        out.write(data)
    assert Storage(s3).read_bytes("large.bin") == data


def test_a_local_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    store = Storage(str(tmp_path))
    store.write_bytes("report.json", b"old")

    def no_power(source, target):
        raise OSError("the power went")

    monkeypatch.setattr(storage_module.os, "replace", no_power)
    with pytest.raises(OSError, match="the power went"):
        store.write_bytes("report.json", b"new")
    monkeypatch.undo()
    assert store.read_bytes("report.json") == b"old" and store.list() == ["report.json"]


def test_a_file_is_copied_whole_to_a_local_disk_and_to_s3(place, tmp_path):
    store, path = Storage(place), tmp_path / "from" / "x.bin"
    path.parent.mkdir()
    for data in (b"", b"0123456789" * 1000):  # the second takes the first one's place
        path.write_bytes(data)
        store.write_file("a/x.bin", path)
        assert (store.read_bytes("a/x.bin"), store.list()) == (data, ["a/x.bin"])


def test_drafts_of_killed_writers_go_when_they_are_old(tmp_path):
    store, now = Storage(str(tmp_path)), time.time()
    hours = {
        f".{'a' * 32}.tmp": 2,
        f"b/.{'0' * 32}.tmp": 1.1,
        f".{'b' * 32}.tmp": 0.5,
        "c.tmp": 2,
        f"{'a' * 32}.tmp": 2,
    }
    for name, age in hours.items():
        store.write_bytes(name, b"x")
        os.utime(tmp_path / name, (now - age * 3600,) * 2)
    store.sweep_drafts()
    assert store.list() == sorted([f".{'b' * 32}.tmp", "c.tmp", f"{'a' * 32}.tmp"])


def test_a_relative_path_means_the_same_in_every_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Storage("data").uri == str(tmp_path / "data") == Storage(f"file://{tmp_path}/data").uri


@pytest.mark.parametrize("uri", ["gs://bucket/x", "s3://", "http://host/x"])
def test_an_address_of_another_kind_is_refused(uri):
    with pytest.raises(InputError, match="expected .*s3://bucket/prefix"):
        Storage(uri)


def test_a_name_cannot_lead_out_of_the_folder(tmp_path):
    with pytest.raises(ValueError, match="must not lead out"):
        Storage(str(tmp_path / "a")).write_bytes("../b", b"")


def test_credentials_come_from_the_environment_and_stand_in_no_pickle_or_text(s3):
    store = Storage(s3)
    options = store.delta_options()
    assert options["AWS_SECRET_ACCESS_KEY"] == "test-secret-value" and options["AWS_ALLOW_HTTP"] == "true"
    assert b"test-secret" not in pickle.dumps(store) and "test-" not in repr(store)
    assert Storage("/tmp/x").delta_options() == {}


# -- faults


def every(n: int, kind: str, methods: str = "GET PUT POST HEAD"):
    """Each n-th request fails."""
    seen = {"n": 0}

    def fault(environ):
        if environ["REQUEST_METHOD"] not in methods.split():
            return None
        seen["n"] += 1
        return kind if seen["n"] % n == 0 else None

    return fault


def test_refusals_are_waited_out_in_a_whole_life_of_a_table(s3_server, s3, spec, rows):
    s3_server.fault = every(3, "503")
    table = Table.open_or_create(f"{s3}/things", spec, 4)
    for n in range(2):
        files = table.write(rows(bucket=n, n=n), f"run{n}")
        table.commit(files, run_id=f"run{n}", group=0, mode="append", planned_on=table.version, complete=True)
    assert sorted(table.snapshot(complete=True).read()["n"].to_pylist()) == [0, 0, 1, 1]
    assert s3_server.failed >= 5


def test_a_cut_body_is_read_again(s3_server, s3):
    store = Storage(s3)
    store.write_bytes("x.bin", b"0123456789" * 10_000)
    cut = iter(["cut"])
    s3_server.fault = lambda environ: next(cut, None) if environ["REQUEST_METHOD"] == "GET" else None
    assert store.read_bytes("x.bin") == b"0123456789" * 10_000
    assert s3_server.failed == 1


def test_a_body_cut_at_any_one_of_its_requests_costs_no_commit_and_no_reading(s3_server, s3, spec, rows):
    """Also where the library asks for the log once more by itself, on a version that is loaded already.

    The first requests are tried one by one, later ones further and further apart.
    """

    def failed_at(turn: int) -> bool:
        s3_server.fault = lambda environ: None
        table = Table.create(f"{s3}/things-{turn}", spec, 4)
        files = table.write(rows(bucket=1), "run")
        asked = iter([None] * turn + ["cut"])
        before = s3_server.failed
        s3_server.fault = lambda environ: next(asked, None) if environ["REQUEST_METHOD"] == "GET" else None
        assert not table.commit(files, run_id="run", group=0, mode="append", planned_on=0, complete=True).already
        assert table.committed("run") == range(1) and table.snapshot(complete=True).rows == 2
        return s3_server.failed > before

    turn = tried = 0
    while failed_at(turn):
        tried, turn = tried + 1, max(turn + 1, turn * 5 // 4)
    assert tried > 6 and turn > 10


def test_a_commit_whose_answer_was_lost_stands_once(s3_server, s3, spec, rows):
    table = Table.create(f"{s3}/things", spec, 4)
    files = table.write(rows(bucket=1), "run")
    lost = iter(["lost answer"])

    def fault(environ):
        is_commit = environ["REQUEST_METHOD"] in ("PUT", "POST") and "_delta_log" in environ["PATH_INFO"]
        return next(lost, None) if is_commit else None

    s3_server.fault = fault
    done = table.commit(files, run_id="run", group=0, mode="append", planned_on=0)
    assert s3_server.failed == 1 and (done.version, done.already) == (1, False)
    assert (table.version, table.snapshot().rows) == (1, 2)


def refused_by_key(environ):
    """Answers a DeleteObjects as S3 does where the role may not delete, and lets all else pass but a DeleteObject."""
    if environ["REQUEST_METHOD"] == "DELETE":
        return "403"
    return "keys refused" if "delete" in environ["QUERY_STRING"].split("&") else None


def test_a_delete_that_is_refused_is_an_error(s3_server, s3, spec, rows):
    table = Table.create(f"{s3}/things", spec, 4)
    store = table.storage
    table.write(rows(["a"]), "killed")
    before = store.list()
    s3_server.fault = refused_by_key
    with pytest.raises(PermissionError):
        store.delete(before[-1])
    with pytest.raises(PermissionError):
        upkeep.vacuum(table, 0, alone=True)
    assert store.list() == before
    turns = iter(["503"])
    s3_server.fault = lambda environ: next(turns, None) if environ["REQUEST_METHOD"] == "DELETE" else None
    assert upkeep.vacuum(table, 0, alone=True).deleted == 1  # one that may pass is tried again
    assert len(store.list()) == len(before) - 1


def test_an_upload_whose_last_answer_was_lost_is_written_again(s3_server, s3):
    """It is complete, so that the library's own repetition finds no such upload."""
    data = bytes(range(256)) * (20 * 2**20 // 256)  # two parts
    answers = iter(["lost answer", "no such upload"])
    s3_server.fault = lambda environ: next(answers, None) if completes(environ) else None
    Storage(s3).write_bytes("large.bin", data)
    assert s3_server.failed == 2 and Storage(s3).read_bytes("large.bin") == data
    with pytest.raises(FileNotFoundError):  # which a missing file still is at once
        Storage(s3).read_bytes("no.bin")


def completes(environ):
    return environ["REQUEST_METHOD"] == "POST" and environ["QUERY_STRING"].startswith("uploadId=")


def test_a_storage_that_stays_down_is_given_up_within_the_budget(s3_server, s3, monkeypatch):
    store = Storage(s3)
    store.write_bytes("x", b"x")
    monkeypatch.setenv("PPLUG_STORAGE_BUDGET_S", "0.5")
    s3_server.fault = lambda environ: "503"
    with pytest.raises(OSError) as error:
        store.read_bytes("x")
    assert f"while: read {s3}/x (tried" in error.value.__notes__[0]


def test_only_what_may_pass_is_tried_again(monkeypatch):
    monkeypatch.setattr(storage_module.time, "sleep", lambda pause: None)

    def count(error, budget_s=30.0):
        tries = []

        def action():
            tries.append(1)
            if len(tries) < 4:
                raise error
            return "done"

        try:
            assert retrying(action, "try", budget_s) == "done"
        except type(error):
            pass
        return len(tries)

    for error in (
        OSError("An error occurred (SlowDown) when calling PutObject"),
        OSError("Generic S3 error: Server returned error status code: 503"),
        OSError("Generic S3 error: HTTP error: error reading a body from connection: end of file before message"),
        ConnectionResetError(104, "reset"),
        TimeoutError(),
    ):
        assert count(error) == 4, error
    for error in (
        FileNotFoundError("part-503.parquet"),
        PermissionError("Forbidden"),
        OSError("No space left on device"),
        ValueError("bucket=503/part-500.parquet"),
        InputError("connection timed out"),
    ):
        assert count(error) == 1, error
    assert count(ConnectionResetError(), budget_s=0) == 1


def test_the_cause_is_looked_at_because_libraries_wrap_it():
    try:
        try:
            raise ConnectionResetError("peer")
        except ConnectionResetError as cause:
            raise OSError("could not read") from cause
    except OSError as error:
        assert is_transient(error)
    assert not is_transient(None)


def test_nothing_of_the_credentials_is_logged(s3_server, s3, spec, rows, caplog, capfd):
    caplog.set_level(logging.INFO)
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # the server's own access log
    s3_server.fault = every(4, "503")
    table = Table.create(f"{s3}/things", spec, 4)
    table.commit(table.write(rows(["a"]), "run"), run_id="run", group=0, mode="append", planned_on=0)
    out, err = capfd.readouterr()
    assert "test-secret-value" not in caplog.text + out + err


def test_a_folder_that_goes_while_it_is_listed_hides_no_other_file(tmp_path):
    """Threads make and remove folders beside a file that stays; each listing holds the file, and none is an error."""
    (tmp_path / "stays").write_text("x")
    ends = threading.Event()

    def change(name):
        while not ends.is_set():
            (tmp_path / name).mkdir()
            (tmp_path / name).rmdir()

    with ThreadPoolExecutor(3) as pool:
        changes = [pool.submit(change, f"goes-{number}") for number in range(3)]
        try:
            for _ in range(300):
                assert Storage(str(tmp_path)).list() == ["stays"]
                assert Storage(str(tmp_path)).list("goes-0", recursive=False) == []
                assert list(Storage(str(tmp_path)).facts()) == ["stays"]
        finally:
            ends.set()
    assert all(done.exception() is None for done in changes)


def test_an_object_that_is_written_anew_while_it_is_read_is_read_anew(s3_server, s3):
    storage = Storage(s3)
    storage.write_bytes("lease", b"old")
    rewrites = iter([b"new"])

    def fault(environ):
        if environ["REQUEST_METHOD"] == "GET" and environ["PATH_INFO"].endswith("/lease"):
            for content in rewrites:
                storage.write_bytes("lease", content)

    s3_server.fault = fault
    assert storage.read_bytes("lease") == b"new" and next(rewrites, None) is None
